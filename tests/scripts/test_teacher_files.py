"""Names and files of teachers, runs with them, and wrong use."""

import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from main_pretrain import get_args_parser
from models_milan import MODELS
from models_teacher import Teacher, TeacherSpec, build_teacher
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import checkpoint, log_records, ok, one_error_line, pretrain, run
from util.errors import UserError
from util.timm_tower import load_timm

SMALL = dict(embed_dim=64, depth=2, num_heads=2)
DINO = 'vit_small_patch16_224.dino'


def batch():
    return torch.from_numpy(images('teachers', 3, 64)).float()


def changed(path, out, **changes):
    """Save the state dict in ``path`` with tensors replaced, or removed if None, as ``out``."""
    state_dict = {**torch.load(path), **{k.replace('__', '.'): v for k, v in changes.items()}}
    torch.save({k: v for k, v in state_dict.items() if v is not None}, out)
    return out


def test_fine_tuned_clip_does_not_project(timm_weights, tmp_path):
    """A head of 1000 classes is a classifier and not a projection."""
    name = 'vit_base_patch16_clip_224.openai'
    head = dict(head__weight=torch.ones(1000, 64), head__bias=torch.ones(1000))
    path = changed(timm_weights(name, **SMALL), tmp_path / 'tuned.pth', **head)
    assert load_timm(name, 4, timm_weights(name, **SMALL), **SMALL).output_dim == 24
    assert load_timm(name, 4, path, **SMALL).output_dim == 64


def test_files_of_every_format(timm_weights, tmp_path):
    path = timm_weights(DINO, **SMALL)
    state_dict = torch.load(path)
    expected = Teacher(load_timm(DINO, 4, path, **SMALL))(batch())
    wrapped = {f'module.{k}': v for k, v in state_dict.items()}
    # tensors that do not belong to the encoder are ignored
    extra = {'decoder_embed.weight': torch.zeros(3), 'head.weight': torch.zeros(1000, 64)}
    save_file(state_dict, tmp_path / 'a.safetensors')
    torch.save({'state_dict': wrapped}, tmp_path / 'b.pth.tar')
    torch.save({'model': {**state_dict, **extra}}, tmp_path / 'c.pth')
    for file in ('a.safetensors', 'b.pth.tar', 'c.pth'):
        tower = load_timm(DINO, 4, tmp_path / file, **SMALL)
        for ours, theirs in zip(Teacher(tower)(batch()), expected):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_pretrained_encoder_is_a_teacher(tmp_path):
    """The tokens are those of the encoder for all patches in image order."""
    torch.manual_seed(0)
    model, path = MODELS['mae_vit_tiny_patch8'](), tmp_path / 'checkpoint.pth'
    torch.save({'model': model.state_dict(), 'epoch': 0}, path)
    sizes = dict(embed_dim=192, depth=6, num_heads=3)
    tower = load_timm('vit_small_patch8_224.dino', 8, path, **sizes)
    expected = model.forward_encoder(batch(), torch.arange(64).expand(3, -1))
    torch.testing.assert_close(Teacher(tower)(batch())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'changes, tensor',
    [
        (dict(norm__weight=None), 'norm.weight'),
        (dict(blocks__1__norm1__weight=torch.zeros(32)), 'blocks.1.norm1.weight'),
        (dict(blocks__2__norm1__weight=torch.zeros(64)), 'blocks.2.norm1.weight'),
        (dict(reg_token=torch.zeros(1, 4, 64)), 'reg_token'),
        (dict(pos_embed=torch.zeros(1, 64)), DINO),
        (dict(pos_embed='text'), ''),
    ],
    ids=['missing', 'other shape', 'extra block', 'extra token', 'other rank', 'not a tensor'],
)
def test_file_of_another_model_is_an_error(changes, tensor, timm_weights, tmp_path):
    path = changed(timm_weights(DINO, **SMALL), tmp_path / 'changed.pth', **changes)
    with pytest.raises(UserError) as error:
        load_timm(DINO, 4, path, **SMALL)
    message = str(error.value)
    assert tensor in message and str(path) in message and '\n' not in message


def spec_of(*flags):
    return TeacherSpec.from_args(get_args_parser().parse_args([*flags]))


def test_spec_of_the_flags(tiny_clip):
    """Naming a teacher implies --use_clip, except by --clip_path. Only CLIPs encode texts."""
    assert spec_of() is None and spec_of('--clip_path', 'nowhere.pt') is None
    spec = spec_of('--use_clip')
    assert (spec.flag, spec.kind, spec.text_tower) == ('clip_path', 'clip', 'ViT-B/16')
    spec = spec_of('--teacher', 'ViT-B/32', '--teacher_path', str(tiny_clip))
    assert (spec.flag, spec.kind, spec.text_tower) == ('teacher', 'clip', str(tiny_clip))
    spec = spec_of('--teacher', DINO, '--teacher_norm', 'own', '--average_targets', '2')
    assert (spec.flag, spec.kind, spec.text_tower) == ('teacher', 'timm', '')
    assert (spec.name, spec.norm, spec.average_targets) == (DINO, 'own', 2)


@pytest.mark.slow
def test_teachers_of_the_published_code(tmp_path, monkeypatch):
    """--use_clip_dino and --use_clip_slip read the published files from the working directory.

    All weights are zero except the last bias and SLIP's projection.
    """
    with torch.device('meta'):
        shapes = MODELS['mae_vit_base_patch16']().state_dict()
    tower = {
        name: torch.zeros(1).expand(p.shape)  # a few bytes per tensor in the file
        for name, p in shapes.items()
        if not name.startswith(('decoder_', 'mask_token'))
    }
    tower['norm.bias'], projection = torch.randn(768), torch.randn(768, 512)
    slip = {f'module.visual.{name}': p for name, p in tower.items()}
    slip['module.image_projection'] = slip['module.text_projection'] = projection
    monkeypatch.chdir(tmp_path)
    torch.save(tower, 'dino_vitbase16_pretrain.pth')
    torch.save({'epoch': 25, 'state_dict': slip}, 'slip_vit_base_16.pth.tar')
    for flag, expected in (
        ('--use_clip_dino', tower['norm.bias']),
        ('--use_clip_slip', tower['norm.bias'] @ projection),
    ):
        spec = spec_of(flag)
        teacher = build_teacher(spec, grid_size=4, input_size=64, model_name='', device='cpu')
        tokens, importance = teacher(batch())
        torch.testing.assert_close(tokens, expected.expand(3, 17, -1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(importance, torch.full((3, 16), 1 / 17))
        assert teacher.dim == len(expected)


HUB = """
from util.errors import UserError
from util.timm_tower import load_timm
print(load_timm('test_vit.r160_in1k', 8).model.norm.bias.sum().item())
try:
    load_timm('test_vit2.r160_in1k', 8)
except UserError as e:
    print(e)
"""


@pytest.mark.slow
def test_timms_hub(tmp_path):
    """Weights in the hub's cache are used; without a network, others are a one-line error."""
    if not timm.models._hub.has_hf_hub():
        pytest.skip(f'timm {timm.__version__} cannot use the huggingface_hub that is installed')
    folder = tmp_path / 'hub' / 'models--timm--test_vit.r160_in1k'
    snapshot = folder / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (folder / 'refs').mkdir()
    (folder / 'refs' / 'main').write_text('0' * 40)
    model = load_deterministic(timm.create_model('test_vit'))
    save_file(model.state_dict(), snapshot / 'model.safetensors')
    env = {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    note, total, error = ok(run(sys.executable, '-c', HUB, env=env)).splitlines()
    assert 'r160_in1k' in note and '1000 classes' in note
    assert float(total) == pytest.approx(model.norm.bias.sum().item(), abs=1e-5)
    assert error.startswith('--teacher test_vit2.r160_in1k: ') and '--teacher_path' in error


# ---- main_pretrain.py ----


@pytest.fixture
def teacher_flags(milan_flags):
    """Flags of a short MILAN run, without its teacher."""
    flags = [f for f in milan_flags if f != '--use_clip']
    i = flags.index('--clip_path')
    return flags[:i] + flags[i + 2 :]


@pytest.mark.slow
def test_teacher_of_another_patch_size(teacher_flags, timm_weights, tmp_path):
    """8x8 patches of 8 pixels for the student, of 16 pixels in 128-pixel images for the teacher."""
    flags = '--teacher test_vit --teacher_norm own --average_targets 2 --epochs 4'.split()
    out = ok(pretrain(*teacher_flags, *flags, '--teacher_path', timm_weights('test_vit')))
    (line,) = [line for line in out.splitlines() if line.startswith('Teacher ')]
    for words in ('test_vit', '8x8', '128 pixels', '64 wide', 'class token', 'own'):
        assert words in line
    records = log_records(tmp_path / 'out')
    assert records[-1]['train_loss'] < 0.8 * records[0]['train_loss']
    assert checkpoint(tmp_path / 'out' / 'checkpoint-last.pth')['args'].use_clip


@pytest.mark.slow
def test_teacher_by_clips_name(teacher_flags, tiny_clip):
    """The file decides the sizes of the CLIP; its 8x8 patches of 8 pixels become 4x4."""
    flags = '--model mae_vit_small_patch16 --teacher ViT-B/16 --batch_size 24 --epochs 1'.split()
    out = ok(pretrain(*teacher_flags, *flags, '--teacher_path', tiny_clip))
    assert 'Teacher ViT-B/16: 4x4 patches at 32 pixels, 48 wide' in out


# flags, words of the error line
WRONG = {
    'unknown': ('--teacher vit_base_patch16_siglpi_224', 'vit_base_patch16_siglip_224'),
    'misspelled CLIP': ('--teacher ViT-B-16', 'ViT-B/16'),
    'similar to nothing': ('--teacher qqqq', '--teacher qqqq'),
    'unknown weights': (
        '--teacher vit_base_patch16_clip_224.lion2b',
        'vit_base_patch16_clip_224.laion2b',
    ),
    'old name': ('--teacher vit_base_patch16_224_dino', 'vit_base_patch16_224.dino'),
    'ResNet': ('--teacher resnet50.a1_in1k', 'docs/teachers.md'),
    'Swin': ('--teacher swin_tiny_patch4_window7_224', 'docs/teachers.md'),
    'no weights': ('--teacher vit_base_patch16_18x2_224', '--teacher_path'),
    'file as a name': (f'--teacher {__file__}', '--teacher_path'),
    'file of DINO absent': ('--use_clip_dino --teacher_path nowhere.pth', 'nowhere.pth'),
    'file absent': ('--teacher test_vit --teacher_path nowhere.pth', 'nowhere.pth'),
    'file without weights': (f'--teacher test_vit --teacher_path {__file__}', __file__),
    'file is not a CLIP': (
        f'--teacher ViT-B/16 --teacher_path {__file__}',
        f'--teacher_path {__file__}: ',
    ),
    'file without a name': (f'--teacher_path {__file__}', '--teacher NAME'),
    'two teachers': ('--teacher test_vit --use_clip_dino', '--teacher and --use_clip_dino'),
    'two files': (f'--teacher test_vit --clip_path {__file__}', '--teacher and --clip_path'),
    'DINO absent': ('--use_clip_dino', '--use_clip_dino: dino_vitbase16_pretrain.pth'),
    'SLIP absent': ('--use_clip_slip', '--use_clip_slip: slip_vit_base_16.pth.tar'),
    'too many targets': (
        '--teacher test_vit --teacher_path WEIGHTS --average_targets 7',
        '--average_targets 7',
    ),
    'image size': ('--teacher test_vit --input_size 60', '--input_size 60'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_is_one_error_line(case, teacher_flags, timm_weights):
    flags, words = WRONG[case]
    flags = [timm_weights('test_vit') if f == 'WEIGHTS' else f for f in flags.split()]
    one_error_line(pretrain(*teacher_flags, '--epochs', 1, *flags), words)


def test_unknown_attention_is_an_error(timm_weights):
    name = 'vit_base_patch16_18x2_224'
    with pytest.raises(UserError, match=f'--teacher {name}: .*last block'):
        load_timm(name, 4, timm_weights(name, **SMALL), **SMALL)
