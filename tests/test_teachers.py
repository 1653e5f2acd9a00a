"""Every kind of teacher: what it tells, by what names and files it is found, and what is refused."""

import copy
import functools
import json
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY_CLIP, pretrain, run
from deterministic import images, load_deterministic
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import clip
from main_pretrain import get_args_parser
from models_milan import MODELS
from util.errors import UserError
from util.teacher import Teacher, build_teacher
from util.teachers_timm import load_timm

SMALL = dict(embed_dim=64, depth=2, num_heads=2)
CLASS, POOL, MEAN = 'class token', 'attention pooling', 'mean'
FAMILIES = {  # name: (timm's model, where its importance comes from, overrides); tests skip what an older timm lacks
    'CLIP': ('vit_base_patch16_clip_quickgelu_224.openai', CLASS, {}),
    'CLIP of LAION': ('vit_base_patch32_clip_224.laion2b', CLASS, {}),
    'CLIP, fine-tuned': ('vit_base_patch16_clip_224.openai_ft_in1k', CLASS, {}),
    'EVA-CLIP': ('eva02_base_patch16_clip_224.merged2b', CLASS, {}),
    'EVA-CLIP with norms behind': ('eva02_enormous_patch14_clip_224.laion2b', CLASS, {}),
    'SigLIP': ('vit_base_patch16_siglip_224.webli', POOL, {}),
    'SigLIP 2': ('vit_base_patch32_siglip_256.v2_webli', POOL, {}),
    'SigLIP without pooling': ('vit_base_patch16_siglip_gap_224.webli', MEAN, {}),
    'pooling with registers': ('vit_so150m_patch16_reg4_map_256', POOL, {}),
    'DINO': ('vit_small_patch16_224.dino', CLASS, {}),
    'DINOv2': ('vit_small_patch14_dinov2.lvd142m', CLASS, {}),
    'DINOv2 with registers': ('vit_small_patch14_reg4_dinov2.lvd142m', CLASS, {}),
    'DINOv3': ('vit_small_patch16_dinov3.lvd1689m', CLASS, {}),
    'DINOv3 with biases': ('vit_small_patch16_dinov3_qkvb.lvd1689m', CLASS, {}),
    'EVA-02': ('eva02_tiny_patch14_224.mim_in22k', MEAN, {}),
    'AIMv2': ('aimv2_large_patch14_224', MEAN, {}),
    'PE': ('vit_pe_core_tiny_patch16_384.fb', POOL, {}),
    'BEiT': ('beit_base_patch16_224.in22k_ft_in22k', MEAN, {}),
    'DeiT, distilled': ('deit_tiny_distilled_patch16_224.fb_in1k', CLASS, {}),
    'RADIO': ('vit_base_patch16_radio_v3', CLASS, {}),
    'rotations learnt': ('vit_small_patch16_rope_mixed_224.naver_in1k', CLASS, {}),
    'norms of queries, shared keys': ('vit_base_patch16_sapiens2', CLASS, dict(num_kv_heads=[2, 1])),
    'norms behind attention': ('vit_base_patch16_rpn_224.sw_in1k', MEAN, {}),
}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """weights(name, **overrides): a file of such a model with weights of its own; skips if this timm does not have the model."""
    @functools.cache
    def make(name, **overrides):
        if not timm.is_model(name):
            pytest.skip(f'timm {timm.__version__} has no {name}')
        model = timm.create_model(name, num_classes=24 if '_clip_' in name and '_ft_' not in name else 0, **overrides)
        path = tmp_path_factory.mktemp('weights') / 'model.pth'
        torch.save(load_deterministic(model, skip=('rope.freqs',)).state_dict(), path)
        return path
    return lambda name, **overrides: make(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})


@pytest.fixture(params=FAMILIES)
def family(request, weights):
    """(tower of 4x4 patches, where its importance comes from)."""
    name, answer, overrides = FAMILIES[request.param]
    overrides = {**SMALL, **overrides}
    return load_timm(name, 4, weights(name, **overrides), **overrides), answer


def batch(name='teachers', size=64):
    return torch.from_numpy(images(name, 3, size)).float()


def resized(imgs, tower):
    size = tower.input_resolution
    return imgs if imgs.shape[-1] == size else F.interpolate(imgs, size=(size, size), mode='bicubic', antialias=True)


def naive_attention(model, imgs):
    """The last block's attention matrix [N, heads, T, T], caught where timm's plain formula drops parts of it out."""
    model = copy.deepcopy(model)
    attn = model.blocks[-1].attn
    attn.fused_attn = False
    caught = []
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
    model(imgs)
    return caught[0]


def naive_pooling(model, x):
    """Weights of timm's attention pooling over tokens x [N, T, D], by PyTorch's function: [N, T]."""
    pool = model.attn_pool
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        pool.latent.expand(x.shape[1], -1, -1).transpose(0, 1), x, x, x.shape[-1], pool.num_heads,
        torch.cat([pool.q.weight, pool.kv.weight]), torch.cat([pool.q.bias, pool.kv.bias]), None, None, False, 0.0,
        pool.proj.weight, pool.proj.bias, training=False, need_weights=True)[1][:, 0]


@torch.no_grad()
def test_importance_is_that_of_explicit_attention(family):
    tower, answer = family
    imgs = batch()
    _, importance = Teacher(tower)(imgs)
    assert tower.answer == answer and importance.shape == (3, 16) and importance.dtype == torch.float32
    if answer == POOL:
        x = tower.model.forward_features(resized(imgs, tower))
        pools_all = tower.model.num_prefix_tokens and getattr(tower.model, 'pool_include_prefix', True)
        of_all = naive_pooling(tower.model, x if pools_all else x[:, tower.model.num_prefix_tokens:])
    else:
        attention = naive_attention(tower.model, resized(imgs, tower)).mean(dim=1)
        of_all = attention[:, 0] if answer == CLASS else attention.mean(dim=1)
    torch.testing.assert_close(of_all.sum(1), torch.ones(3))
    torch.testing.assert_close(importance, of_all[:, -16:], rtol=1e-4, atol=1e-6)  # without class token and registers
    torch.testing.assert_close(importance.sum(1), 1 - of_all[:, :-16].sum(1))
    assert (importance.amax(1) > 1.1 * importance.amin(1)).all()  # or the comparison would say little
    if of_all.shape[1] > 16:
        assert (importance.sum(1) < 0.99).all()


@torch.no_grad()
def test_tokens_are_timms_features(family):
    tower, answer = family
    model, imgs = tower.model, batch()
    tokens, _ = Teacher(tower)(imgs)
    x = model.forward_features(resized(imgs, tower))
    patches = x[:, -16:] if isinstance(model.fc_norm, torch.nn.Identity) else model.fc_norm(x[:, -16:])
    first = x[:, 0] if answer == CLASS else model.forward_head(x, pre_logits=True)
    expected = torch.cat([first.unsqueeze(1), patches], dim=1)
    if tower.project:
        expected = model.head(expected)
        torch.testing.assert_close(tokens[:, 0], model(resized(imgs, tower)))  # what captions are compared with
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert tokens.shape[-1] == tower.output_dim == (24 if tower.project else 64)


def test_a_teacher_never_learns_and_is_one_graph(family):
    """No autograd graph; torch.compile takes it whole (fullgraph fails at a break), resizing and averaging included, once."""
    tower, _ = family
    teacher = Teacher(tower, 'own', average_targets=2)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(teacher, backend=counter, fullgraph=True)
    for step in range(2):
        imgs = batch(f'graph{step}', 72).requires_grad_()
        result = compiled(imgs)
        assert not any(t.requires_grad for t in result)
        for ours, expected in zip(result, teacher(imgs)):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert not teacher.train().training and not any(p.requires_grad for p in teacher.parameters())


class Softmaxes(TorchDispatchMode):
    """Keeps the shapes of all softmaxes that are computed outside fused attention."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.shapes.append(tuple(out.shape[2:]))
        return out


def test_attention_is_fused_but_for_the_importance(family):
    """One row of the last block for a class token, one query for a pooling; the whole of one matrix for attention received."""
    tower, answer = family
    tokens = 16 + (0 if answer == POOL and tower.model.cls_token is None else tower.model.num_prefix_tokens)
    with Softmaxes() as softmaxes:
        Teacher(tower)(batch())
    assert softmaxes.shapes == [(tokens if answer == MEAN else 1, tokens)]


@torch.no_grad()
def test_patches_cover_the_students(family):
    """For a student of 4x4 patches of 16 pixels: where one is bright, the token of that number changes most."""
    tower = copy.deepcopy(family[0])
    for p in tower.model.blocks.parameters():
        p.mul_(0.2)  # blocks that mix little
    teacher = Teacher(tower)
    before = batch()[:1]
    for k in (1, 6, 11, 12):
        after = before.clone()
        row, column = 16 * (k // 4), 16 * (k % 4)
        after[:, :, row:row + 16, column:column + 16] += 2
        change = (teacher(after)[0] - teacher(before)[0])[0, 1:].norm(dim=-1)
        assert change.argmax() == k and change[k] > 1.5 * change.sort().values[-2]


@pytest.mark.parametrize('name', ['DINOv2 with registers', 'SigLIP', 'EVA-02', 'BEiT'])
@torch.no_grad()
def test_average_targets(name, weights):
    """The mean of what the teacher gives and what it gives without its last block; importance stays that of the last block."""
    name, sizes = FAMILIES[name][0], {**SMALL, 'depth': 3}
    tower = load_timm(name, 4, weights(name, **sizes), **sizes)
    shorter = copy.deepcopy(tower)
    shorter.model.blocks = shorter.model.blocks[:2]
    (long, importance), (short, _) = Teacher(tower)(batch()), Teacher(shorter)(batch())
    tokens, same = Teacher(tower, average_targets=2)(batch())
    assert (long - short).abs().max() > 0.1
    torch.testing.assert_close(tokens, (long + short) / 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(same, importance)


@torch.no_grad()
def test_own_normalisation_and_bf16(weights):
    """SigLIP's mean and deviation are a half; in bf16 its tokens point where they did."""
    name = FAMILIES['SigLIP'][0]
    tower = load_timm(name, 4, weights(name, **SMALL), **SMALL)
    raw = torch.rand(2, 3, 64, 64)
    imagenet = (raw - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    tokens, importance = Teacher(tower, 'own')(imagenet)
    torch.testing.assert_close(tokens, Teacher(tower)(2 * raw - 1)[0], rtol=1e-4, atol=1e-4)
    assert (tokens - Teacher(tower)(imagenet)[0]).abs().max() > 0.01
    half, importance_half = Teacher(copy.deepcopy(tower), 'own', dtype=torch.bfloat16)(imagenet)
    assert half.dtype == torch.bfloat16 and importance_half.dtype == torch.float32
    assert (1 - torch.cosine_similarity(tokens, half.float(), dim=-1)).max() < 1e-3
    torch.testing.assert_close(importance, importance_half, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize('grid_size', [4, 6])
@torch.no_grad()
def test_openais_clip_is_the_same_here_and_in_timm(grid_size, tmp_path):
    """One file in OpenAI's names, read by clip/ and by timm's model; at another grid too, the position embedding resized."""
    model = clip.CLIP(**{**TINY_CLIP, 'vision_patch_size': 16})
    torch.save(load_deterministic(model, skip=()).state_dict(), tmp_path / 'clip.pt')
    ours = clip.load(str(tmp_path / 'clip.pt'), 'cpu')[0].visual
    ours.set_grid_size(grid_size)
    theirs = load_timm('vit_base_patch16_clip_quickgelu_224.openai', grid_size, tmp_path / 'clip.pt',
                       embed_dim=128, depth=2, num_heads=2)
    assert (ours.output_dim, ours.input_resolution) == (theirs.output_dim, theirs.input_resolution) == (48, 16 * grid_size)
    assert (ours.mean, ours.std, ours.answer, ours.layers) == (theirs.mean, theirs.std, theirs.answer, theirs.layers)
    imgs = batch(size=72)
    for average in (1, 2):
        for a, b in zip(Teacher(ours, 'own', average)(imgs), Teacher(theirs, 'own', average)(imgs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- files and names ----

DINO = 'vit_small_patch16_224.dino'


def changed(path, out, **changes):
    """The state dict in ``path`` with tensors replaced, or left out where None is given, as a new file."""
    state_dict = {**torch.load(path), **{k.replace('__', '.'): v for k, v in changes.items()}}
    torch.save({k: v for k, v in state_dict.items() if v is not None}, out)
    return out


def test_files_of_every_format(weights, tmp_path):
    path = weights(DINO, **SMALL)
    state_dict = torch.load(path)
    expected = Teacher(load_timm(DINO, 4, path, **SMALL))(batch())
    save_file(state_dict, tmp_path / 'a.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}, tmp_path / 'b.pth.tar')
    torch.save({'model': {**state_dict, 'decoder_embed.weight': torch.zeros(3), 'head.weight': torch.zeros(1000, 64)}},
               tmp_path / 'c.pth')  # what is not of the encoder does not matter
    for file in ('a.safetensors', 'b.pth.tar', 'c.pth'):
        for ours, theirs in zip(Teacher(load_timm(DINO, 4, tmp_path / file, **SMALL))(batch()), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize('changes, message', [
    (dict(norm__weight=None), 'it has no norm.weight'),
    (dict(blocks__1__norm1__weight=torch.zeros(32)), 'blocks.1.norm1.weight is [32] and not [64]'),
    (dict(blocks__2__norm1__weight=torch.zeros(64)), 'it has blocks.2.norm1.weight too'),
    (dict(reg_token=torch.zeros(1, 4, 64)), 'it has reg_token too'),
    (dict(pos_embed=torch.zeros(1, 64)), 'is no vit_small_patch16_224.dino'),
    (dict(pos_embed='text'), 'there are no weights in it'),
])
def test_files_of_another_model_are_refused(changes, message, weights, tmp_path):
    path = changed(weights(DINO, **SMALL), tmp_path / 'changed.pth', **changes)
    with pytest.raises(UserError) as error:
        load_timm(DINO, 4, path, **SMALL)
    assert message in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def test_published_teachers(tmp_path, monkeypatch):
    """--use_clip_dino and --use_clip_slip take the published files from the working directory: weights of nothing but a bias and,
    for SLIP, its projection."""
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


def test_pretraining_with_a_teacher_of_another_patch_size(teacher_flags, weights, tmp_path):
    """Student: 8x8 patches of 8 pixels. Teacher: 8x8 of 16, on images of 128 pixels. --teacher turns --use_clip on."""
    flags = [*teacher_flags, '--teacher', 'test_vit', '--teacher_path', weights('test_vit'), '--teacher_norm', 'own',
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
    'file absent': (['--teacher', 'test_vit', '--teacher_path', 'nowhere.pth'], 'nowhere.pth does not exist'),
    'file of no weights': (['--teacher', 'test_vit', '--teacher_path', __file__], 'cannot be read'),
    'file of no CLIP': (['--teacher', 'ViT-B/16', '--teacher_path', __file__], f'--teacher_path {__file__}: '),
    'file of nothing': (['--teacher_path', __file__], 'name that by --teacher'),
    'two teachers': (['--teacher', 'test_vit', '--use_clip_dino'], '--teacher and --use_clip_dino name two teachers'),
    'two files': (['--teacher', 'test_vit', '--clip_path', __file__], '--teacher and --clip_path name two teachers'),
    'DINO absent': (['--use_clip_dino'], '--use_clip_dino: dino_vitbase16_pretrain.pth is not here'),
    'SLIP absent': (['--use_clip_slip'], '--use_clip_slip: slip_vit_base_16.pth.tar is not here'),
    'too many targets': (['--teacher', 'test_vit', '--teacher_path', 'WEIGHTS', '--average_targets', 7], 'has 6 blocks'),
    'image size': (['--teacher', 'test_vit', '--input_size', 60], '--input_size 60 is not a multiple'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_is_one_line(case, teacher_flags, weights):
    flags, message = WRONG[case]
    result = pretrain(*teacher_flags, '--epochs', 1, *[weights('test_vit') if f == 'WEIGHTS' else f for f in flags])
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode == 1 and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], result.stderr


def test_blocks_of_another_make_are_refused(weights):
    name = 'vit_base_patch16_18x2_224'
    with pytest.raises(UserError, match='4x4 patches and a last block of NoneType make no teacher'):
        load_timm(name, 4, weights(name, **SMALL), **SMALL)
