"""torch.compile and bf16 change nothing but rounding."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import clip
from models_milan import MODELS, MaskedAutoencoderViT
from models_teacher import Teacher
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import TINY_CLIP, log_records, ok, pretrain
from util.masking import patch_order, sample_noise

TINY = dict(
    img_size=64,
    patch_size=8,
    embed_dim=96,
    depth=1,
    num_heads=3,
    decoder_embed_dim=64,
    decoder_depth=1,
    decoder_num_heads=4,
)


def tiny_teacher(dtype=None):
    model = load_deterministic(clip.CLIP(**{**TINY_CLIP, 'embed_dim': 24}), skip=())
    return Teacher(model.visual, dtype=dtype)


def batch(name, n=3):
    return torch.from_numpy(images(name, n, 64)).float()


@pytest.fixture
def tiny_flags(milan_flags, monkeypatch):
    """Flags of a MILAN run of the smallest model."""
    monkeypatch.setitem(MODELS, 'tiny', lambda **kwargs: MaskedAutoencoderViT(**{**TINY, **kwargs}))
    return [*milan_flags, '--model', 'tiny', '--log_dir', '']


@pytest.mark.parametrize(
    'flags',
    [
        dict(use_clip=True, attn_mask=True, change_decoder=True, target_dim=24),
        dict(),
        dict(norm_pix_loss=True, change_decoder=True),
        dict(use_clip=True, target_dim=24),
    ],
    ids=['MILAN', 'MAE', 'prompting decoder, pixels', 'CLIP target'],
)
def test_model_and_teacher_compile_to_one_graph_each(flags):
    """Check that there is no graph break (fullgraph) and no recompilation (counters)."""
    torch._dynamo.reset()
    counters = CompileCounter(), CompileCounter()
    model = MaskedAutoencoderViT(**TINY, **flags)
    compiled = torch.compile(model, backend=counters[0], fullgraph=True)
    teacher = torch.compile(tiny_teacher(), backend=counters[1], fullgraph=True)
    for step in range(3):
        imgs = batch(f'speed{step}')
        tokens, importance = teacher(imgs) if model.use_clip else (None, None)
        noise = sample_noise(0, step, torch.arange(3), 64)
        ids = patch_order(noise, importance if model.attn_mask else None)
        loss, _, _ = compiled(imgs, 0.75, (tokens, importance), ids, return_pred=False)
        loss.backward()
        torch.testing.assert_close(loss, model(imgs, 0.75, (tokens, importance), ids)[0])
    assert [c.frame_count for c in counters] == [1, int(model.use_clip)]


def test_teacher_in_bf16():
    """Its tokens keep their direction to 1 - cos < 1e-3, and importance its values."""
    imgs = batch('teacher', 4)
    tokens, importance = tiny_teacher()(imgs)
    tokens_bf16, importance_bf16 = tiny_teacher(torch.bfloat16)(imgs)
    assert tokens_bf16.dtype == torch.bfloat16 and importance_bf16.dtype == torch.float32
    assert (1 - torch.cosine_similarity(tokens, tokens_bf16.float(), dim=-1)).max() < 1e-3
    torch.testing.assert_close(importance, importance_bf16, rtol=0.05, atol=1e-3)


@pytest.mark.slow
def test_training_in_bf16_ends_at_the_loss_of_fp32(tiny_flags, tmp_path):
    """From the same start, the mean loss of the last epochs agrees to 1 %."""
    means = {}
    for amp in ('fp32', 'bf16'):
        out = tmp_path / amp
        flags = '--epochs 25 --blr 0.05 --print_freq 6 --amp'.split()
        ok(pretrain(*tiny_flags, *flags, amp, '--output_dir', out))
        losses = [record['train_loss'] for record in log_records(out)]
        assert losses[-1] < 0.6 * losses[0]
        means[amp] = sum(losses[-5:]) / 5
    assert means['bf16'] != means['fp32']
    assert means['bf16'] == pytest.approx(means['fp32'], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_training_has_the_same_losses(tiny_flags, tmp_path):
    losses = {}
    for choice in ('off', 'on'):
        out = tmp_path / choice
        flags = ['--epochs', 2, '--compile', choice, '--output_dir', out]
        assert (', compiled' in ok(pretrain(*tiny_flags, *flags))) == (choice == 'on')
        losses[choice] = [record['train_loss'] for record in log_records(out)]
    assert losses['on'] == pytest.approx(losses['off'], rel=1e-4)
