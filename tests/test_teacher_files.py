"""The names and files that teachers are found by, the runs that they teach, and what is refused."""

import json
import sys

import pytest
import timm
import torch
from conftest import pretrain, run
from deterministic import images, load_deterministic
from safetensors.torch import save_file

from main_pretrain import get_args_parser
from models_milan import MODELS
from util.errors import UserError
from util.teacher import Teacher, build_teacher
from util.teachers_timm import load_timm

SMALL = dict(embed_dim=64, depth=2, num_heads=2)
DINO = 'vit_small_patch16_224.dino'


def batch():
    return torch.from_numpy(images('teachers', 3, 64)).float()


def changed(path, out, **changes):
    """The state dict in ``path`` with tensors replaced, or left out where None is given, as a new file."""
    state_dict = {**torch.load(path), **{k.replace('__', '.'): v for k, v in changes.items()}}
    torch.save({k: v for k, v in state_dict.items() if v is not None}, out)
    return out


def test_a_clip_that_was_fine_tuned_does_not_project(timm_weights, tmp_path):
    """1000 classes are no space of captions."""
    name = 'vit_base_patch16_clip_224.openai'
    head = dict(head__weight=torch.ones(1000, 64), head__bias=torch.ones(1000))
    path = changed(timm_weights(name, **SMALL), tmp_path / 'tuned.pth', **head)
    assert load_timm(name, 4, timm_weights(name, **SMALL), **SMALL).output_dim == 24
    assert load_timm(name, 4, path, **SMALL).output_dim == 64


def test_files_of_every_format(timm_weights, tmp_path):
    path = timm_weights(DINO, **SMALL)
    state_dict = torch.load(path)
    expected = Teacher(load_timm(DINO, 4, path, **SMALL))(batch())
    save_file(state_dict, tmp_path / 'a.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}, tmp_path / 'b.pth.tar')
    torch.save({'model': {**state_dict, 'decoder_embed.weight': torch.zeros(3), 'head.weight': torch.zeros(1000, 64)}},
               tmp_path / 'c.pth')  # what is not of the encoder does not matter
    for file in ('a.safetensors', 'b.pth.tar', 'c.pth'):
        for ours, theirs in zip(Teacher(load_timm(DINO, 4, tmp_path / file, **SMALL))(batch()), expected):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_an_encoder_of_ours_is_a_teacher(tmp_path):
    """A checkpoint of main_pretrain.py: the tokens are those of its encoder for all patches in image order."""
    torch.manual_seed(0)
    model = MODELS['mae_vit_tiny_patch8']()
    torch.save({'model': model.state_dict(), 'epoch': 0}, tmp_path / 'checkpoint.pth')
    tower = load_timm('vit_small_patch8_224.dino', 8, tmp_path / 'checkpoint.pth', embed_dim=192, depth=6, num_heads=3)
    expected = model.forward_encoder(batch(), torch.arange(64).expand(3, -1))
    torch.testing.assert_close(Teacher(tower)(batch())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('changes, message', [
    (dict(norm__weight=None), 'it has no norm.weight'),
    (dict(blocks__1__norm1__weight=torch.zeros(32)), 'blocks.1.norm1.weight is [32] in it and [64] here'),
    (dict(blocks__2__norm1__weight=torch.zeros(64)), 'it has blocks.2.norm1.weight too'),
    (dict(reg_token=torch.zeros(1, 4, 64)), 'it has reg_token too'),
    (dict(pos_embed=torch.zeros(1, 64)), 'is no vit_small_patch16_224.dino'),
    (dict(pos_embed='text'), 'there are no weights in it'),
])
def test_files_of_another_model_are_refused(changes, message, timm_weights, tmp_path):
    path = changed(timm_weights(DINO, **SMALL), tmp_path / 'changed.pth', **changes)
    with pytest.raises(UserError) as error:
        load_timm(DINO, 4, path, **SMALL)
    assert message in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def test_published_teachers(tmp_path, monkeypatch):
    """--use_clip_dino and --use_clip_slip take the published files from the working directory. All weights are zero here but
    for the last bias and SLIP's projection."""
    with torch.device('meta'):
        shapes = MODELS['mae_vit_base_patch16']().state_dict()
    tower = {name: torch.zeros(1).expand(p.shape) for name, p in shapes.items()  # a few bytes a tensor in the file
             if not name.startswith(('decoder_', 'mask_token'))}
    tower['norm.bias'], projection = torch.randn(768), torch.randn(768, 512)
    monkeypatch.chdir(tmp_path)
    torch.save(tower, 'dino_vitbase16_pretrain.pth')
    torch.save({'epoch': 25, 'state_dict': {'module.image_projection': projection, 'module.text_projection': projection, **{
        f'module.visual.{name}': p for name, p in tower.items()}}}, 'slip_vit_base_16.pth.tar')
    for flag, expected in (('--use_clip_dino', tower['norm.bias']), ('--use_clip_slip', tower['norm.bias'] @ projection)):
        args = get_args_parser().parse_args([flag, '--amp', 'fp32'])
        args.compile = False
        teacher = build_teacher(args, 4, 'cpu')
        tokens, importance = teacher(batch())
        torch.testing.assert_close(tokens, expected.expand(3, 17, -1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(importance, torch.full((3, 16), 1 / 17))
        assert teacher.dim == len(expected)


HUB = '''
from util.errors import UserError
from util.teachers_timm import load_timm
print(load_timm('test_vit.r160_in1k', 8).model.norm.bias.sum().item())
try:
    load_timm('test_vit2.r160_in1k', 8)
except UserError as e:
    print(e)
'''


def test_timms_hub(tmp_path):
    """What the hub's cache holds is taken; what it does not hold is, without network, one line."""
    if not timm.models._hub.has_hf_hub():
        pytest.skip(f'timm {timm.__version__} cannot use the huggingface_hub that is installed')
    folder = tmp_path / 'hub' / 'models--timm--test_vit.r160_in1k'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text('0' * 40)
    (folder / 'snapshots' / ('0' * 40)).mkdir(parents=True)
    model = load_deterministic(timm.create_model('test_vit'))
    save_file(model.state_dict(), folder / 'snapshots' / ('0' * 40) / 'model.safetensors')
    result = run(sys.executable, '-c', HUB, env={'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'})
    assert result.returncode == 0, result.stderr
    note, total, error = result.stdout.splitlines()
    assert note == 'Note: the weights r160_in1k of test_vit have seen the labels of 1000 classes'
    assert float(total) == pytest.approx(model.norm.bias.sum().item(), abs=1e-5)
    assert error.startswith("--teacher test_vit2.r160_in1k: its weights could not be fetched from timm's hub (")
    assert error.endswith('; fetch them by other means and give --teacher_path FILE')


# ---- main_pretrain.py ----

@pytest.fixture
def teacher_flags(milan_flags):
    """The flags of a MILAN run of seconds, without its teacher."""
    flags = [f for f in milan_flags if f != '--use_clip']
    at = flags.index('--clip_path')
    return flags[:at] + flags[at + 2:]


def test_pretraining_with_a_teacher_of_another_patch_size(teacher_flags, timm_weights, tmp_path):
    """Student: 8x8 patches of 8 pixels. Teacher: 8x8 of 16, on images of 128 pixels. --teacher turns --use_clip on."""
    flags = [*teacher_flags, '--teacher', 'test_vit', '--teacher_path', timm_weights('test_vit'), '--teacher_norm', 'own',
             '--average_targets', 2, '--epochs', 6]
    result = pretrain(*flags)
    assert result.returncode == 0, result.stderr
    assert ('Teacher test_vit: 8x8 patches at 128 pixels, 64 wide, importance from its class token, --teacher_norm own'
            in result.stdout)
    records = [json.loads(line) for line in (tmp_path / 'out' / 'log.txt').read_text().splitlines()]
    assert records[-1]['train_loss'] < 0.7 * records[0]['train_loss']
    assert torch.load(tmp_path / 'out' / 'checkpoint-last.pth', weights_only=False)['args'].use_clip


def test_teacher_by_clips_name(teacher_flags, tiny_clip):
    """--teacher ViT-B/16 --teacher_path: sizes are the file's; here its 8x8 patches of 8 pixels become 4x4."""
    flags = [*teacher_flags, '--model', 'mae_vit_small_patch16', '--teacher', 'ViT-B/16', '--teacher_path', tiny_clip,
             '--batch_size', 24, '--epochs', 1]
    result = pretrain(*flags)
    assert result.returncode == 0, result.stderr
    assert 'Teacher ViT-B/16: 4x4 patches at 32 pixels, 48 wide' in result.stdout


WRONG = {
    'unknown': (['--teacher', 'vit_base_patch16_siglpi_224'], 'did you mean vit_base_patch16_siglip_224'),
    "a misspelt name of CLIP's": (['--teacher', 'ViT-B-16'], 'did you mean ViT-B/16'),
    'like nothing': (['--teacher', 'qqqq'], "neither one of CLIP's names nor a model of timm"),
    'unknown weights': (['--teacher', 'vit_base_patch16_clip_224.lion2b'], 'vit_base_patch16_clip_224.laion2b'),
    'an old name': (['--teacher', 'vit_base_patch16_224_dino'], 'did you mean vit_base_patch16_224.dino'),
    'a ResNet': (['--teacher', 'resnet50.a1_in1k'], 'is no ViT that keeps one square grid of patches'),
    'a Swin': (['--teacher', 'swin_tiny_patch4_window7_224'], 'is no ViT that keeps one square grid of patches'),
    'no weights': (['--teacher', 'vit_base_patch16_18x2_224'], 'timm has no weights for it'),
    'a file': (['--teacher', __file__], 'give the file by --teacher_path'),
    'file of DINO absent': (['--use_clip_dino', '--teacher_path', 'nowhere.pth'], 'nowhere.pth does not exist'),
    'file absent': (['--teacher', 'test_vit', '--teacher_path', 'nowhere.pth'], 'nowhere.pth does not exist'),
    'file of no weights': (['--teacher', 'test_vit', '--teacher_path', __file__], 'cannot be read'),
    'file of no CLIP': (['--teacher', 'ViT-B/16', '--teacher_path', __file__], f'--teacher_path {__file__}: '),
    'file of nothing': (['--teacher_path', __file__], 'name that by --teacher'),
    'two teachers': (['--teacher', 'test_vit', '--use_clip_dino'], '--teacher and --use_clip_dino name two teachers'),
    'two files': (['--teacher', 'test_vit', '--clip_path', __file__], '--teacher and --clip_path name two teachers'),
    'DINO absent': (['--use_clip_dino'], '--use_clip_dino: dino_vitbase16_pretrain.pth is not in the working'),
    'SLIP absent': (['--use_clip_slip'], '--use_clip_slip: slip_vit_base_16.pth.tar is not in the working'),
    'too many targets': (['--teacher', 'test_vit', '--teacher_path', 'WEIGHTS', '--average_targets', 7], 'has 6 blocks'),
    'image size': (['--teacher', 'test_vit', '--input_size', 60], '--input_size 60 is not a multiple'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_is_one_line(case, teacher_flags, timm_weights):
    flags, message = WRONG[case]
    result = pretrain(*teacher_flags, '--epochs', 1, *[timm_weights('test_vit') if f == 'WEIGHTS' else f for f in flags])
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode == 1 and len(errors) == 1, result.stderr
    assert errors[0].startswith('error: ') and message in errors[0]


def test_blocks_of_another_make_are_refused(timm_weights):
    name = 'vit_base_patch16_18x2_224'
    with pytest.raises(UserError, match='4x4 patches and a last block of NoneType make no teacher'):
        load_timm(name, 4, timm_weights(name, **SMALL), **SMALL)
