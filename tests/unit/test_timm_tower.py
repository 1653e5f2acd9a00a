"""Tokens and importance of every kind of timm teacher; compiling it; its geometry."""

import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import clip
from models_teacher import Teacher
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import TINY_CLIP
from util.timm_tower import load_timm

SMALL = dict(embed_dim=64, depth=2, num_heads=2)
CLASS, POOL, MEAN = 'class token', 'attention pooling', 'mean of patches'
# name: (timm's model, source of its importance, overrides)
# Models that the installed timm lacks are skipped.
FAMILIES = {
    'CLIP': ('vit_base_patch16_clip_quickgelu_224.openai', CLASS, {}),
    'CLIP of LAION': ('vit_base_patch32_clip_224.laion2b', CLASS, {}),
    'EVA-CLIP': ('eva02_base_patch16_clip_224.merged2b', CLASS, {}),
    'EVA-CLIP with post-norm': ('eva02_enormous_patch14_clip_224.laion2b', CLASS, {}),
    'SigLIP': ('vit_base_patch16_siglip_224.webli', POOL, {}),
    'SigLIP 2': ('vit_base_patch32_siglip_256.v2_webli', POOL, {}),
    'SigLIP, mean': ('vit_base_patch16_siglip_gap_224.webli', MEAN, {}),
    'pooling with registers': ('vit_so150m_patch16_reg4_map_256', POOL, {}),
    'DINO': ('vit_small_patch16_224.dino', CLASS, {}),
    'DINOv2': ('vit_small_patch14_dinov2.lvd142m', CLASS, {}),
    'DINOv2 with registers': ('vit_small_patch14_reg4_dinov2.lvd142m', CLASS, {}),
    'DINOv3': ('vit_small_patch16_dinov3.lvd1689m', CLASS, {}),
    'EVA-02': ('eva02_tiny_patch14_224.mim_in22k', MEAN, {}),
    'AIMv2': ('aimv2_large_patch14_224', MEAN, {}),
    'PE': ('vit_pe_core_tiny_patch16_384.fb', POOL, {}),
    'BEiT': ('beit_base_patch16_224.in22k_ft_in22k', MEAN, {}),
    'DeiT, distilled': ('deit_tiny_distilled_patch16_224.fb_in1k', CLASS, {}),
    'RADIO': ('vit_base_patch16_radio_v3', CLASS, {}),
    'learned rotations': ('vit_small_patch16_rope_mixed_224.naver_in1k', CLASS, {}),
    'normalized queries, shared keys': (
        'vit_base_patch16_sapiens2',
        CLASS,
        dict(num_heads=4, num_kv_heads=(4, 2)),
    ),
    'post-norm': ('vit_base_patch16_rpn_224.sw_in1k', MEAN, {}),
}


@pytest.fixture(params=FAMILIES)
def family(request, timm_weights):
    """(tower of 4x4 patches, source of its importance)."""
    name, source, overrides = FAMILIES[request.param]
    overrides = {**SMALL, **overrides}
    path = timm_weights(name, **overrides)
    timm.layers.set_fused_attn(False)  # as a bf16 run on a CPU does, for the student
    try:
        return load_timm(name, 4, path, **overrides), source
    finally:
        timm.layers.set_fused_attn(True)


def batch(name='teachers', size=64):
    return torch.from_numpy(images(name, 3, size)).float()


def resized(imgs, tower):
    size = (tower.input_resolution,) * 2
    if imgs.shape[-2:] == size:
        return imgs
    return F.interpolate(imgs, size=size, mode='bicubic', antialias=True)


def naive_attention(model, imgs):
    """Return the last block's attention [N, heads, T, T], from the dropout of timm's formula."""
    model = copy.deepcopy(model)
    attn = model.blocks[-1].attn
    attn.fused_attn = False
    recorded = []
    attn.attn_drop.register_forward_hook(lambda module, inputs, out: recorded.append(inputs[0]))
    model(imgs)
    return recorded[0]


def naive_pooling(model, x):
    """Return the weights [N, T] of timm's attention pooling over x [N, T, D], by PyTorch."""
    pool = model.attn_pool
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        pool.latent.expand(x.shape[1], -1, -1).transpose(0, 1),
        x,
        x,
        x.shape[-1],
        pool.num_heads,
        torch.cat([pool.q.weight, pool.kv.weight]),
        torch.cat([pool.q.bias, pool.kv.bias]),
        None,
        None,
        False,
        0.0,
        pool.proj.weight,
        pool.proj.bias,
        training=False,
        need_weights=True,
    )[1][:, 0]


def not_pooled(model):
    """Return how many prefix tokens attention pooling skips: the registers, in newer timm."""
    return 0 if getattr(model, 'pool_include_prefix', True) else model.num_prefix_tokens


@torch.no_grad()
def test_importance_equals_explicit_attention(family):
    tower, source = family
    imgs = batch()
    _, importance = Teacher(tower)(imgs)
    assert tower.importance_source == source
    assert importance.shape == (3, 16) and importance.dtype == torch.float32
    if source == POOL:
        x = tower.model.forward_features(resized(imgs, tower))
        expected = naive_pooling(tower.model, x[:, not_pooled(tower.model) :])
    else:
        attention = naive_attention(tower.model, resized(imgs, tower)).mean(dim=1)
        expected = attention[:, 0] if source == CLASS else attention.mean(dim=1)
    torch.testing.assert_close(expected.sum(1), torch.ones(3))
    torch.testing.assert_close(importance, expected[:, -16:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(importance.sum(1), 1 - expected[:, :-16].sum(1))
    assert (importance.amax(1) > 1.1 * importance.amin(1)).all()  # not trivially equal
    if expected.shape[1] > 16:
        assert (importance.sum(1) < 0.99).all()


@torch.no_grad()
def test_tokens_equal_timms_features(family):
    tower, source = family
    model, imgs = tower.model, batch()
    tokens, _ = Teacher(tower)(imgs)
    x = model.forward_features(resized(imgs, tower))
    patches = model.fc_norm(x[:, -16:])
    first = x[:, 0] if source == CLASS else model.forward_head(x, pre_logits=True)
    expected = torch.cat([first.unsqueeze(1), patches], dim=1)
    if tower.project:
        expected = model.head(expected)
        # the image feature that CLIP compares with captions
        torch.testing.assert_close(tokens[:, 0], model(resized(imgs, tower)))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert tokens.shape[-1] == tower.output_dim == (24 if tower.project else 64)


# one of each kind of attention; tracing takes a second or two each
@pytest.mark.slow
@pytest.mark.parametrize(
    'family',
    [
        'CLIP',
        'EVA-CLIP with post-norm',
        'SigLIP',
        'DINOv2 with registers',
        'DINOv3',
        'EVA-02',
        'AIMv2',
        'PE',
        'BEiT',
        'learned rotations',
        'normalized queries, shared keys',
    ],
    indirect=True,
)
def test_teacher_is_frozen_and_compiles_to_one_graph(family):
    """No graph break (fullgraph), with resizing and averaging in the graph; no gradient."""
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
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


class Softmaxes(TorchDispatchMode):
    """Record the shapes of all softmaxes outside fused attention."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.shapes.append(tuple(out.shape[2:]))
        return out


def test_all_attention_except_the_importance_is_fused(family):
    """Importance computes one row, or the last block's matrix for the mean of patches."""
    tower, source = family
    tokens = 16 + tower.model.num_prefix_tokens - (not_pooled(tower.model) if source == POOL else 0)
    with Softmaxes() as softmaxes:
        Teacher(tower)(batch())
    assert softmaxes.shapes == [(tokens if source == MEAN else 1, tokens)]


@torch.no_grad()
def test_patches_cover_the_same_area_as_the_students(family):
    """Brightening patch k of a student with 4x4 patches of 16 pixels changes token k most."""
    tower = copy.deepcopy(family[0])
    for p in tower.model.blocks.parameters():
        p.mul_(0.2)  # so that the blocks mix tokens only a little
    teacher = Teacher(tower)
    before = batch()[:1]
    for k in (1, 6, 11, 12):
        after = before.clone()
        row, column = 16 * (k // 4), 16 * (k % 4)
        after[:, :, row : row + 16, column : column + 16] += 2
        change = (teacher(after)[0] - teacher(before)[0])[0, 1:].norm(dim=-1)
        assert change.argmax() == k and change[k] > 1.5 * change.sort().values[-2]


@pytest.mark.parametrize('name', ['DINOv2 with registers', 'SigLIP', 'EVA-02', 'BEiT'])
@torch.no_grad()
def test_average_targets(name, timm_weights):
    """Tokens are the mean of those with and without the last block; importance is unchanged."""
    name, sizes = FAMILIES[name][0], {**SMALL, 'depth': 3}
    tower = load_timm(name, 4, timm_weights(name, **sizes), **sizes)
    shorter = copy.deepcopy(tower)
    shorter.model.blocks = shorter.model.blocks[:2]
    (long, importance), (short, _) = Teacher(tower)(batch()), Teacher(shorter)(batch())
    tokens, same = Teacher(tower, average_targets=2)(batch())
    assert (long - short).abs().max() > 0.1
    torch.testing.assert_close(tokens, (long + short) / 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(same, importance)


@torch.no_grad()
def test_own_normalization_and_bf16(timm_weights):
    """SigLIP's mean and std are 0.5. In bf16 its tokens keep their direction."""
    name = FAMILIES['SigLIP'][0]
    tower = load_timm(name, 4, timm_weights(name, **SMALL), **SMALL)
    raw = torch.rand(2, 3, 64, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    imagenet = (raw - mean) / std
    tokens, importance = Teacher(tower, 'own')(imagenet)
    torch.testing.assert_close(tokens, Teacher(tower)(2 * raw - 1)[0], rtol=1e-4, atol=1e-4)
    assert (tokens - Teacher(tower)(imagenet)[0]).abs().max() > 0.01
    low = Teacher(copy.deepcopy(tower), 'own', dtype=torch.bfloat16)(imagenet)
    assert (low[0].dtype, low[1].dtype) == (torch.bfloat16, torch.float32)
    assert (1 - torch.cosine_similarity(tokens, low[0].float(), dim=-1)).max() < 1e-3
    torch.testing.assert_close(importance, low[1], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize('grid_size', [4, 6])
@torch.no_grad()
def test_openai_clip_gives_the_same_in_clip_and_timm(grid_size, tmp_path):
    """Read one file by clip/ and by timm's model, also at another grid (resized positions)."""
    model = clip.CLIP(**{**TINY_CLIP, 'vision_patch_size': 16})
    torch.save(load_deterministic(model, skip=()).state_dict(), tmp_path / 'clip.pt')
    ours = clip.load(str(tmp_path / 'clip.pt'), 'cpu')[0].visual
    ours.set_grid_size(grid_size)
    sizes = dict(embed_dim=128, depth=2, num_heads=2)
    name = 'vit_base_patch16_clip_quickgelu_224.openai'
    theirs = load_timm(name, grid_size, tmp_path / 'clip.pt', **sizes)
    assert (ours.output_dim, ours.input_resolution) == (48, 16 * grid_size)
    for field in 'output_dim input_resolution mean std importance_source layers'.split():
        assert getattr(ours, field) == getattr(theirs, field)
    imgs = batch(size=72)
    for average in (1, 2):
        for a, b in zip(Teacher(ours, 'own', average)(imgs), Teacher(theirs, 'own', average)(imgs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
