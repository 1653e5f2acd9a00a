"""The textbook formulation is our training step in other words; and the benchmark that measures one against the other."""

import argparse
import json
import math
import sys

import pytest
import textbook
import torch
from conftest import TINY_CLIP, run
from deterministic import images, load_deterministic
from timm.optim import param_groups_weight_decay

import clip
from engine_pretrain import train_one_epoch
from models_milan import MaskedAutoencoderViT, patch_order
from util import lr_sched, misc
from util.seeding import sample_noise
from util.teacher import Teacher

SIZES = dict(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=3,
             decoder_num_heads=4, use_clip=True, attn_mask=True, change_decoder=True, target_dim=TINY_CLIP['embed_dim'])


@pytest.fixture
def imgs():
    return torch.from_numpy(images('textbook.images', 4, 64))


@pytest.fixture
def visual():
    return load_deterministic(clip.CLIP(**TINY_CLIP).double(), skip=()).visual


def both_models():
    ours = load_deterministic(MaskedAutoencoderViT(**SIZES).double())
    book = textbook.TextbookMilan(**SIZES).double()
    book.load_state_dict(ours.state_dict())
    return ours, book


def close(actual, expected, what):
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max(), what


def test_teacher(imgs, visual):
    tokens, importance = Teacher(visual)(imgs)
    book_tokens, book_importance = textbook.encode_tokens(visual, imgs)
    close(book_tokens, tokens, 'tokens')
    close(book_importance, importance, 'importance')


@pytest.mark.parametrize('mask_ratio', [0.75, 0.4])
def test_loss_and_gradients(imgs, visual, mask_ratio):
    ours, book = both_models()
    tokens, importance = Teacher(visual)(imgs)
    ids = patch_order(torch.rand(4, 64, generator=torch.Generator().manual_seed(0)), importance)
    loss, book_loss = ours(imgs, mask_ratio, (tokens, importance), ids)[0], book(imgs, tokens, ids, mask_ratio)
    close(book_loss, loss, 'loss')
    loss.backward()
    book_loss.backward()
    book_grads = {name: p.grad for name, p in book.named_parameters()}
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            assert book_grads[name] is None, name
            continue
        grad, book_grad = p.grad, book_grads[name]
        if name.endswith('kv.bias'):  # softmax ignores the keys' bias: its gradient is rounding and nothing else
            width = len(grad) // (3 if 'qkv' in name else 2)
            keys = slice(width, 2 * width) if 'qkv' in name else slice(width)
            assert max(grad[keys].abs().max(), book_grad[keys].abs().max()) < 1e-15
        close(book_grad, grad, name)


def test_three_updates(imgs, visual):
    """engine_pretrain.py's loop and the textbook's, masks included, from the same weights."""
    ours, book = both_models()
    numbers = torch.arange(4)
    args = argparse.Namespace(accum_iter=1, amp='fp32', attn_mask=True, batch_size=4, epochs=4, lr=1e-2, mask_ratio=0.75,
                              min_lr=0.0, print_freq=10, seed=0, warmup_epochs=1, world_size=1)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(ours, 0.05), lr=args.lr, betas=(0.9, 0.95))
    scaler = misc.NativeScalerWithGradNormCount(enabled=False, device='cpu')
    stats = train_one_epoch(ours, [(imgs, numbers, numbers)] * 3, optimizer, torch.device('cpu'), 1, scaler, args=args,
                            teacher=Teacher(visual))

    optimizer, scaler = textbook.build_optimizer(book, args.lr), torch.amp.GradScaler('cpu', enabled=False)
    losses = []
    for step in range(3):
        lr_sched.adjust_learning_rate(optimizer, 1 + step / 3, args)
        losses.append(textbook.train_step(book, visual, optimizer, scaler, imgs, sample_noise(0, 1, numbers, 64)))
    assert stats['loss'] == pytest.approx(sum(losses) / 3, rel=1e-6)  # the log's are float32
    assert losses[2] < losses[0]
    for (name, a), b in zip(ours.named_parameters(), book.parameters()):
        close(b, a, name)


# ---- tools/benchmark.py ----

def benchmark(tmp_path, what, *flags):
    """What a tiny run of the tool writes and prints."""
    tiny = ['--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--batch_size', 2, '--rounds', 2]
    result = run(sys.executable, 'tools/benchmark.py', what, *tiny, '--json', tmp_path / 'speed.json', *flags)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / 'speed.json').read_text())
    assert written['command'].startswith(f'python tools/benchmark.py {what}')
    assert written['machine']['cores'] and written['versions']['torch'] == torch.__version__
    return written, result.stdout


def test_benchmark_of_a_step(tmp_path):
    written, said = benchmark(tmp_path, 'step', '--steps', 1, '--amp', 'bf16')
    r, = written['step']
    assert r['precision'] == {'ours': 'bf16', 'textbook': 'fp32'}
    assert r['ratio'] == pytest.approx(r['images_per_s']['ours'] / r['images_per_s']['textbook'])
    assert [len(rounds) for rounds in r['images_per_s_of_rounds'].values()] == [2, 2]
    assert r['split_ms_a_step'].keys() == {'teacher', 'forward', 'backward', 'optimiser', 'other'}
    assert all(ms > 0 for ms in r['split_ms_a_step'].values())
    assert all(2**26 < peak < 2**33 for peak in r['peak_memory_bytes'].values())
    for key in ('flop_per_image', 'flop_per_s', 'ceiling_flop_per_s', 'share_of_ceiling', 'memory_ratio'):
        assert math.isfinite(r[key]) and r[key] > 0, key
    assert r['first_step_loss']['agree'] and 'equal to rounding' in said


def test_benchmark_of_the_loader(tmp_path, small_images):
    written, said = benchmark(tmp_path, 'data', '--images', 8, '--num_workers', 1, '--data_path', small_images)
    r = written['data']
    assert r['files'] == 24 and r['num_workers'] == 1
    for rates, ratio in (('images_per_s_a_thread', 'ratio'), ('images_per_s_of_loader', 'ratio_of_loader')):
        assert r[ratio] == pytest.approx(r[rates]['ours'] / r[rates]['pil'])
    assert 'PIL pipeline' in said


def test_benchmark_of_the_script(tmp_path, small_images):
    written, said = benchmark(tmp_path, 'train', '--seconds', 0, '--num_workers', 0, '--data_path', small_images)
    r = written['train']
    assert r['images_per_s'] > 0 and 0 <= r['share_waiting_for_data'] <= 1 and r['log_lines'] >= 1
    assert 'waiting for data' in said


def test_benchmark_says_what_is_wrong(tmp_path):
    for flags, text in ((['all', '--data_path', tmp_path], 'no folder train/'),
                        (['step', '--teacher', 'test_vit'], 'knows one teacher, CLIP'),
                        (['step', '--model', 'mae_vit_tiny_patch8', '--input_size', 60], '--input_size 60'),
                        (['step', '--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--batch_size', 2, '--amp', 'fp32',
                          '--lr', '1e9', '--warmup_epochs', 0, '--max_skipped_steps', 1], 'steps in a row')):
        result = run(sys.executable, 'tools/benchmark.py', *flags)
        assert result.returncode in (1, 2)
        assert text in result.stderr.splitlines()[-1] and 'Traceback' not in result.stderr
