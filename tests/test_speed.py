"""What makes training fast changes nothing that it computes: compiling, bf16, the loss alone."""

import json
import shutil

import pytest
import torch
from conftest import pretrain
from deterministic import images, load_deterministic
from test_golden import build
from torch._dynamo.testing import CompileCounter

import clip
import models_milan
from models_milan import patch_order
from util.seeding import sample_noise
from util.teacher import Teacher

TINY = dict(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2,
            decoder_num_heads=4)


def tiny_teacher(dtype=None):
    model = clip.CLIP(embed_dim=24, image_resolution=64, vision_layers=2, vision_width=128, vision_patch_size=8, context_length=8,
                      vocab_size=64, transformer_width=64, transformer_heads=1, transformer_layers=1)
    return Teacher(load_deterministic(model, skip=()).visual, dtype=dtype)


@pytest.mark.parametrize('flags', [
    dict(use_clip=True, attn_mask=True, change_decoder=True, target_dim=24), dict(),
    dict(norm_pix_loss=True, change_decoder=True), dict(use_clip=True, target_dim=24),
], ids=['MILAN', 'MAE', 'prompting, pixels', 'CLIP target'])
def test_one_graph_and_never_another(flags):
    """torch.compile takes model and teacher whole (fullgraph fails at a break), once for all steps."""
    torch._dynamo.reset()
    counters = CompileCounter(), CompileCounter()
    model = models_milan.MaskedAutoencoderViT(**TINY, **flags)
    teacher = tiny_teacher() if model.use_clip else None
    compiled = torch.compile(model, backend=counters[0], fullgraph=True)
    look = torch.compile(teacher, backend=counters[1], fullgraph=True) if teacher else lambda imgs: None
    for step in range(4):
        imgs = torch.from_numpy(images(f'speed{step}', 3, 64)).float()
        seen = look(imgs)
        ids = patch_order(sample_noise(0, step, torch.arange(3), 64), seen[1] if model.attn_mask else None)
        loss, _, _ = compiled(imgs, 0.75, seen, ids, loss_only=True)
        loss.backward()
        torch.testing.assert_close(loss, model(imgs, 0.75, seen, ids)[0])
    assert [c.frame_count for c in counters] == [1, 1 if teacher else 0]


@pytest.mark.parametrize('name', ['milan_tiny', 'mae_tiny_pixels_norm'])
def test_golden_cases_in_bf16(name):
    """Loss to 1 %, predictions to 2 % of their size, gradients' norms to 5 % of the largest: what 8 bits of mantissa allow."""
    case, model, call = build(name, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, pred, _ = model(**call)
        alone, nothing, _ = model(**call, loss_only=True)
    assert torch.equal(loss, alone) and nothing is None
    loss.backward()
    assert loss.item() == pytest.approx(case['loss'].item(), rel=0.01)
    expected = torch.from_numpy(case['pred']).float()
    assert (pred.float() - expected).norm() < 0.02 * expected.norm()
    largest = max(case['grad_norms'].values())
    for key, norm in case['grad_norms'].items():
        assert abs(model.get_parameter(key).grad.norm().item() - norm) < 0.05 * largest, key


def test_a_teacher_in_bf16():
    """Its tokens point the same way to 1 - cos < 1e-3, and its importance sums to what it did."""
    imgs = torch.from_numpy(images('teacher', 4, 64)).float()
    tokens, importance = tiny_teacher()(imgs)
    half, importance_half = tiny_teacher(torch.bfloat16)(imgs)
    assert half.dtype == torch.bfloat16 and importance_half.dtype == torch.float32
    assert (1 - torch.cosine_similarity(tokens, half.float(), dim=-1)).max() < 1e-3
    torch.testing.assert_close(importance, importance_half, rtol=0.05, atol=1e-3)


def test_bf16_ends_where_fp32_does(milan_flags, tmp_path):
    """300 steps of each from the same start: the last epochs' losses agree to 1 %."""
    ends = {}
    flags = [*milan_flags, '--epochs', 50, '--blr', 0.02, '--log_dir', '']
    for amp in ('fp32', 'bf16'):
        result = pretrain(*flags, '--amp', amp, '--output_dir', tmp_path / amp)
        assert result.returncode == 0, result.stderr
        losses = [json.loads(line)['train_loss'] for line in (tmp_path / amp / 'log.txt').read_text().splitlines()]
        assert losses[-1] < 0.5 * losses[0]
        ends[amp] = sum(losses[-5:]) / 5
    assert ends['bf16'] != ends['fp32'] and ends['bf16'] == pytest.approx(ends['fp32'], rel=0.01)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile on the CPU needs a C++ compiler')
def test_a_compiled_run(milan_flags, tmp_path):
    losses = {}
    for choice in ('off', 'on'):
        result = pretrain(*milan_flags, '--epochs', 2, '--amp', 'fp32', '--compile', choice, '--output_dir', tmp_path / choice)
        assert result.returncode == 0, result.stderr
        assert (', compiled' in result.stdout) == (choice == 'on')
        losses[choice] = [json.loads(line)['train_loss'] for line in (tmp_path / choice / 'log.txt').read_text().splitlines()]
    assert losses['on'] == pytest.approx(losses['off'], rel=1e-4)
