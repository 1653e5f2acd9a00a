"""Reference numbers: CLIP, pretraining steps and trajectories, classifiers, training rules."""

import json
import math

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay

import clip
import models_milan
import models_vit
from tests.golden.deterministic import fill, images, load_deterministic, shuffle_ids, weights
from tests.helpers import SHARED, TESTS, golden
from util.lars import LARS
from util.lr_decay import param_groups_lrd
from util.lr_sched import Schedule, adjust_learning_rate
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed

TINY = [
    'milan_tiny',
    'milan_tiny_pixels',
    'milan_tiny_pixels_norm',
    'mae_tiny_clip',
    'mae_tiny_pixels',
    'mae_tiny_pixels_norm',
]
LARGE = ['milan_vit_base_patch16', 'mae_vit_base_patch16']


SIZES = (
    'img_size patch_size embed_dim depth num_heads decoder_embed_dim decoder_depth '
    'decoder_num_heads norm_pix_loss use_clip target_dim'
).split()


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def close(actual, expected, rtol):
    """Compare relative to the largest expected value, as rounding errors scale."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= rtol * np.abs(expected).max()


def build(name):
    """Return (case, model, call arguments) of a pretraining case in float64."""
    case = golden(name)
    c = case['config']
    model = models_milan.MaskedAutoencoderViT(
        **{k: c[k] for k in SIZES}, change_decoder=c['decoder'] == 'prompting'
    )
    model = load_deterministic(model.double())
    n, length = c['n'], model.patch_embed.num_patches
    teacher_out = None
    if c['use_clip']:
        tokens = fill(f'{name}.teacher_tokens', (n, length + 1, c['target_dim']))
        teacher_out = (torch.from_numpy(tokens), None)
    call = dict(
        imgs=torch.from_numpy(images(f'{name}.images', n, c['img_size'])),
        mask_ratio=c['mask_ratio'],
        teacher_out=teacher_out,
        ids_shuffle=torch.from_numpy(shuffle_ids(f'{name}.ids_shuffle', n, length)),
    )
    return case, model, call


def to_float32(model, call):
    """Convert a case to float32, in place."""
    model.float()
    call['imgs'] = call['imgs'].float()
    if call['teacher_out']:
        call['teacher_out'] = (call['teacher_out'][0].float(), None)


def build_and_fill(make, **sizes):
    """Build a model in float64 with all its weights from load_deterministic, without its own."""
    with torch.device('meta'):
        model = make(**sizes).double()
    assert not list(model.buffers())
    return load_deterministic(model.to_empty(device='cpu'), skip=())


def check_gradients(model, expected, rtol):
    """Compare the gradients' norms, and clear them."""
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for k, norm in expected.items():
        close(grads[k].double().norm().item(), norm, rtol)
    model.zero_grad()


@pytest.mark.parametrize('name', [*TINY, *map(slow, LARGE)])
def test_pretraining_step(name):
    case, model, call = build(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == case['keys']
    latents = []
    model.norm.register_forward_hook(lambda module, inputs, out: latents.append(out.detach()))
    for scalar_rtol, array_rtol in ((1e-9, 1e-6), (1e-4, 1e-4)):  # float64, float32
        loss, pred, mask = model(**call)
        loss.backward()
        close(loss.item(), case['loss'], scalar_rtol)
        assert (mask.numpy() == case['mask']).all()
        if 'pred' in case:
            close(pred.detach(), case['pred'], array_rtol)
        close(latents.pop(), case['latent'], array_rtol)
        check_gradients(model, case['grad_norms'], scalar_rtol)
        to_float32(model, call)


@pytest.mark.parametrize('name', ['milan_tiny', 'mae_tiny_pixels_norm'])
def test_pretraining_step_in_bf16(name):
    """Loss to 1 %, prediction to 2 %, gradient norms to 5 %, as 8 bits of mantissa allow."""
    case, model, call = build(name)
    to_float32(model, call)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, pred, _ = model(**call)
        only_loss, *nothing = model(**call, return_pred=False)
    assert torch.equal(loss, only_loss) and nothing == [None, None]
    loss.backward()
    assert loss.item() == pytest.approx(case['loss'].item(), rel=0.01)
    expected = torch.from_numpy(case['pred']).float()
    assert (pred.float() - expected).norm() < 0.02 * expected.norm()
    largest = max(case['grad_norms'].values())
    for key, norm in case['grad_norms'].items():
        assert abs(model.get_parameter(key).grad.norm().item() - norm) < 0.05 * largest, key


@pytest.mark.parametrize('name', ['milan_tiny', 'mae_tiny_pixels'])
def test_training_trajectory(name):
    """12 steps with the optimizer, parameter groups and schedule of main_pretrain.py."""
    case, model, call = build(name)
    schedule = Schedule(lr=1e-3, min_lr=0.0, warmup_epochs=1, epochs=3)
    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95))
    losses, lrs, steps = [], [], len(case['trajectory_losses'])
    for step in range(steps):
        lrs.append(adjust_learning_rate(optimizer, step * 3 / steps, schedule))
        loss, _, _ = model(**call, return_pred=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, case['trajectory_losses'], rtol=1e-9)
    np.testing.assert_allclose(lrs, case['trajectory_lrs'], rtol=1e-9, atol=1e-18)


def test_parameter_count():
    """111.9 M with pixels; a 512-wide target saves 768 - 512 outputs of the last layer."""
    count = {}
    for dim in (None, 512):
        with torch.device('meta'):
            model = models_milan.mae_vit_base_patch16(
                change_decoder=True, use_clip=dim is not None, target_dim=dim
            )
        count[dim] = sum(p.numel() for p in model.parameters())
    assert count[None] == 111_907_840
    assert count[None] - count[512] == (768 - 512) * (512 + 1)


@pytest.mark.parametrize('name', ['clip_tiny', slow('clip_vit_b16')])
@torch.no_grad()
def test_clip(name):
    case = golden(name)
    model = build_and_fill(clip.CLIP, **case['config'])
    assert sorted(model.state_dict()) == case['keys']
    size = case['config']['image_resolution']
    imgs = torch.from_numpy(images(f'{name}.images', len(case['tokens']), size))
    ids = torch.from_numpy(case['text_ids'])
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        model, imgs = model.to(dtype), imgs.to(dtype)
        tokens, importance = model.encode_tokens(imgs)
        close(tokens, case['tokens'], rtol)
        close(importance, case['importance'], rtol)
        close(model.encode_text(ids), case['text_features'], rtol)
        close(model(imgs, ids)[0], case['logits_per_image'], rtol)
        close(model.encode_image(imgs), case['tokens'][:, 0], rtol)


RULES = json.loads((TESTS / 'golden' / 'training_rules.json').read_text())


@pytest.mark.parametrize('recipe', ['pretrain', 'finetune', 'linprobe'])
def test_schedule(recipe):
    groups = [
        {'params': [torch.nn.Parameter(torch.zeros(1))]},
        {'params': [torch.nn.Parameter(torch.zeros(1))], 'lr_scale': 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = Schedule(**RULES[recipe]['args'])
    for epoch, lr, half in RULES[recipe]['epoch_lr_lrhalf']:
        assert adjust_learning_rate(optimizer, epoch, schedule) == pytest.approx(lr, rel=1e-9)
        assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([lr, half], rel=1e-9)


@pytest.mark.parametrize(
    'name', ['vit_tiny_cls_token', 'vit_tiny_global_pool', slow('vit_base_patch16_global_pool')]
)
def test_classifier(name):
    case = golden(name)
    c = dict(case['config'])
    n = c.pop('n')
    model = build_and_fill(models_vit.VisionTransformer, **c).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == case['keys']
    imgs = torch.from_numpy(images(f'{name}.images', n, c['img_size']))
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        logits = model.to(dtype)(imgs.to(dtype))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(n))
        loss.backward()
        stored = 1e-6 if case['logits'].dtype == np.float32 else 0
        close(logits.detach(), case['logits'], max(rtol, stored))
        close(loss.item(), case['loss'], rtol)
        check_gradients(model, case['grad_norms'], rtol)


def test_layer_decay():
    with torch.device('meta'):
        model = models_vit.vit_base_patch16(global_pool=True)
    names = {p: n for n, p in model.named_parameters()}
    groups = param_groups_lrd(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65
    )
    ours = {names[p]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    expected = RULES['layer_decay_vit_base_0.65']
    assert ours.keys() == expected.keys()
    for name, rule in expected.items():
        assert ours[name] == pytest.approx(rule, rel=1e-9), name


def test_pretraining_weight_decay():
    (key,) = [k for k in RULES if 'weight_decay' in k]
    with torch.device('meta'):
        model = models_milan.mae_vit_base_patch16(
            use_clip=True, change_decoder=True, target_dim=512
        )
    names = {p: n for n, p in model.named_parameters()}
    ours = {
        names[p]: g['weight_decay']
        for g in param_groups_weight_decay(model, 0.05)
        for p in g['params']
    }
    assert ours == RULES[key]


def test_position_tables():
    case = golden('pos_embed')
    close(get_2d_sincos_pos_embed(48, 4, cls_token=True), case['sincos_48_grid4'], 1e-9)
    close(
        get_2d_sincos_pos_embed(768, 14, cls_token=True)[[0, 1, 2, 15, 100, 196]],
        case['sincos_768_grid14_rows'],
        1e-9,
    )
    with pytest.raises(ValueError, match='multiple of 4'):
        get_2d_sincos_pos_embed(50, 4)


def test_position_interpolation():
    model = models_vit.VisionTransformer(img_size=384, embed_dim=48, depth=1, num_heads=3)
    state_dict = {'pos_embed': torch.from_numpy(fill('pos.ckpt', (1, 197, 48)))}
    interpolate_pos_embed(model, state_dict)
    close(state_dict['pos_embed'], golden('pos_embed')['interpolated_14_to_24'], 1e-6)


def test_lars():
    case = golden('lars')
    c = case['config']
    params = {
        'w': torch.from_numpy(weights('lars.weight', (5, 7))),
        'b': torch.from_numpy(weights('lars.bias', (5,))),
        'z': torch.zeros(3, 2, dtype=torch.float64),
    }
    optimizer = LARS(
        params.values(),
        lr=c['lr'],
        weight_decay=c['weight_decay'],
        momentum=c['momentum'],
        trust_coefficient=c['trust_coefficient'],
    )
    for step in range(c['steps']):
        for letter, p in params.items():
            p.grad = torch.from_numpy(fill(f'lars.grad_{letter}{step}', tuple(p.shape)))
        optimizer.step()
        for letter, key in (('w', 'weight'), ('b', 'bias'), ('z', 'zero')):
            close(params[letter], case[key][step], 1e-9)

    before = [(p.clone(), optimizer.state[p]['mu'].clone()) for p in params.values()]
    for found_inf in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found_inf)
        for p in params.values():
            p.grad = torch.full_like(p, math.nan if found_inf else 1.0)
        optimizer.step()
        now = [(p, optimizer.state[p]['mu']) for p in params.values()]
        unchanged = [torch.equal(a, b) for pair in zip(now, before) for a, b in zip(*pair)]
        assert all(unchanged) if found_inf else not any(unchanged)


@pytest.mark.skipif(not SHARED.exists(), reason='needs ../shared')
def test_copies_match_the_shared_files():
    for path in (TESTS / 'golden').iterdir():
        if path.suffix in ('.npz', '.json'):
            assert path.read_bytes() == (SHARED / 'golden' / path.name).read_bytes(), path.name
