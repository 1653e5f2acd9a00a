"""Test that the textbook formulation of a step equals ours: teacher, loss, gradients, updates."""

import argparse
import copy

import pytest
import torch
from timm.optim import param_groups_weight_decay

import clip
from engine_pretrain import train_one_epoch
from models_milan import MaskedAutoencoderViT
from models_teacher import Teacher
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import TINY_CLIP
from tools.benchmark import textbook
from util.amp import NativeScalerWithGradNormCount
from util.lr_sched import Schedule, adjust_learning_rate
from util.masking import patch_order, sample_noise

SIZES = dict(
    img_size=64,
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=3,
    decoder_num_heads=4,
    use_clip=True,
    attn_mask=True,
    change_decoder=True,
    target_dim=TINY_CLIP['embed_dim'],
)


@pytest.fixture
def imgs():
    return torch.from_numpy(images('textbook.images', 4, 64))


@pytest.fixture
def visual():
    return load_deterministic(clip.CLIP(**TINY_CLIP).double(), skip=()).visual


@pytest.fixture
def models():
    """Two copies of a model in float64: for our formulation, and for the textbook's."""
    model = load_deterministic(MaskedAutoencoderViT(**SIZES).double())
    return model, copy.deepcopy(model)


def assert_close(actual, expected, name):
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max(), name


def test_teacher(imgs, visual):
    tokens, importance = Teacher(visual)(imgs)
    book_tokens, book_importance = textbook.encode_tokens(visual, imgs)
    assert_close(book_tokens, tokens, 'tokens')
    assert_close(book_importance, importance, 'importance')


@pytest.mark.parametrize('mask_ratio', [0.75, 0.4])
def test_loss_and_gradients(models, imgs, visual, mask_ratio):
    ours, book = models
    tokens, importance = Teacher(visual)(imgs)
    ids = patch_order(torch.rand(4, 64, generator=torch.Generator().manual_seed(0)), importance)
    loss = ours(imgs, mask_ratio, (tokens, importance), ids)[0]
    book_loss = textbook.milan_loss(book, imgs, tokens, ids, mask_ratio)
    assert_close(book_loss, loss, 'loss')
    loss.backward()
    book_loss.backward()
    for (name, p), q in zip(ours.named_parameters(), book.parameters()):
        if not p.requires_grad:
            assert q.grad is None, name
            continue
        if name.endswith('kv.bias'):
            # Softmax ignores the bias of the keys, so its gradient is nothing but rounding.
            width = len(p) // (3 if 'qkv' in name else 2)
            keys = slice(width, 2 * width) if 'qkv' in name else slice(width)
            assert max(x.grad[keys].abs().max() for x in (p, q)) < 1e-15
        assert_close(q.grad, p.grad, name)


def test_three_updates(models, imgs, visual):
    """Compare the loop of engine_pretrain.py with the textbook's, including the masks."""
    ours, book = models
    ids = torch.arange(4)
    args = argparse.Namespace(
        accum_iter=1,
        attn_mask=True,
        batch_size=4,
        epochs=4,
        mask_ratio=0.75,
        max_skipped_steps=0,
        output_dir='',
        print_freq=10,
        seed=0,
    )
    schedule = Schedule(lr=1e-2, min_lr=0, warmup_epochs=1, epochs=4)
    groups = param_groups_weight_decay(ours, 0.05)
    stats = train_one_epoch(
        ours,
        [(imgs, ids, ids)] * 3,
        torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95)),
        torch.device('cpu'),
        1,
        NativeScalerWithGradNormCount(enabled=False, device='cpu'),
        args=args,
        schedule=schedule,
        teacher=Teacher(visual),
    )

    optimizer = textbook.build_optimizer(book, schedule.lr)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    losses = []
    for step in range(3):
        adjust_learning_rate(optimizer, 1 + step / 3, schedule)
        noise = sample_noise(0, 1, ids, 64)
        losses.append(textbook.train_step(book, visual, optimizer, scaler, imgs, noise))
    assert stats['loss'] == pytest.approx(sum(losses) / 3, rel=1e-6)  # the log is in float32
    assert losses[2] < losses[0]
    for (name, p), q in zip(ours.named_parameters(), book.parameters()):
        assert_close(q, p, name)
