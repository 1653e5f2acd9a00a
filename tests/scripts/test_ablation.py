"""Test tools.ablation: its runs, resuming, the table, its errors."""

import fcntl
import itertools
import re
import signal

import pytest
import torch
from PIL import Image

import main_pretrain
from tests.helpers import draw_photo, log_records, main_module, ok, one_error_line, script
from tools.ablation.__main__ import SETTINGS
from tools.ablation.report import (
    FACTORS,
    RANDOM,
    VARIANTS,
    add_result,
    effects,
    read_results,
    table,
)
from tools.ablation.runs import Runs, pretrain_flags
from util.runtime import Runtime


@pytest.fixture
def ablation():
    """A function that runs the tool in this process and returns a CompletedProcess."""
    handler = signal.getsignal(signal.SIGTERM)
    yield script('tools.ablation')
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """A folder like CIFAR-10's, with as many images as the quick setting needs."""
    root = tmp_path_factory.mktemp('cifar')
    for split, count in (('train', 16), ('test', 2)):
        for label, i in itertools.product(range(10), range(count)):
            draw_photo(root / split / f'class{label}' / f'{i:04d}.png', (split, label, i), (32, 32))
    return root


def row(variant, seed=0, linear=20.0, finetune=30.0):
    return {**dict(zip(FACTORS, variant)), 'seed': seed, 'linear': linear, 'finetune': finetune}


@pytest.mark.slow
def test_missing_run(ablation, cifar, tmp_path):
    """Eight of nine runs exist. The real scripts do the ninth; the report has all of them."""
    missing = 'pixels', 'MAE', 'semantic'
    for variant in VARIANTS:
        if variant != missing:
            add_result(tmp_path, row(variant))
    flags = ['--data_path', cifar, '--output_dir', tmp_path, '--seeds', 1, '--jobs', 2]
    flags += ['--num_workers', 0, '--device', 'cpu', '--setting']
    out = ok(ablation(*flags, 'quick'))
    assert '1 of 9' in out
    results = read_results(tmp_path)
    assert len(results) == 9
    folder = tmp_path / 'runs' / 'pixels-MAE-semantic-seed0'
    assert (folder / 'pretrain' / 'checkpoint-1.pth').exists()
    for kind in ('linear', 'finetune'):
        assert results[(*missing, 0)][kind] == log_records(folder / kind)[-1]['test_acc1']
    assert len(list((tmp_path / 'data' / 'train').rglob('*.png'))) == SETTINGS['quick']['images']
    assert (tmp_path / 'ablation.md').read_text() in out
    with Image.open(tmp_path / 'ablation.png') as image:
        assert image.size[0] > 600

    assert '0 of 9' in ok(ablation(*flags, 'quick'))
    with open(tmp_path / '.lock') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_error_line(ablation(*flags, 'quick'), '--output_dir')
    one_error_line(ablation(*flags, 'cpu'), '--output_dir', 'setting.json')


@pytest.mark.parametrize('variant', [RANDOM, VARIANTS[7]], ids=['random weights', 'MILAN'])
def test_commands_of_a_run(variant, tmp_path):
    """Test that the scripts accept their flags, and that random weights are not pretrained."""
    runs = Runs(tmp_path, SETTINGS['quick'], None, device='cpu', jobs=1, num_workers=0)
    commands = runs.commands(tmp_path / 'run', variant, 3)
    stages = ['linear', 'finetune'] if variant == RANDOM else ['pretrain', 'linear', 'finetune']
    assert list(commands) == stages
    for name, *flags in commands.values():
        args = main_module(name.removesuffix('.py')).get_args_parser().parse_args(flags)
        assert args.seed == 3
    start = '' if variant == RANDOM else str(tmp_path / 'run' / 'pretrain' / 'checkpoint-1.pth')
    assert args.finetune == start


@pytest.mark.parametrize('variant', VARIANTS[:8])
def test_flags_of_a_variant(variant, tiny_clip):
    """Test the model and the teacher that main_pretrain.py builds from them."""
    target, decoder, masking = variant
    flags = [str(flag) for flag in pretrain_flags(*variant, tiny_clip)]
    tiny = '--model mae_vit_tiny_patch8 --input_size 64'.split()
    args = main_pretrain.get_args_parser().parse_args([*tiny, *flags])
    cpu = Runtime(torch.device('cpu'), 'fp32', False, 0, 1, num_workers=0, pin_mem=False)
    teacher, model, *_ = main_pretrain.build_training(args, cpu, main_pretrain.check(args))
    assert model.use_clip == (target == 'CLIP') and model.norm_pix_loss == (target == 'pixels')
    assert model.change_decoder == (decoder == 'prompting')
    assert model.attn_mask == args.attn_mask == (masking == 'semantic')
    assert model.decoder_pred.out_features == (48 if target == 'CLIP' else 192)
    assert (teacher is None) == (target == 'pixels' and masking == 'uniform')


def test_table():
    """Known accuracies: an effect is the difference between two halves of the variants."""

    def accuracy(variant, seed):
        on = [level == FACTORS[name][1] for name, level in zip(FACTORS, variant)]
        return 20 + 30 * on[0] + 4 * on[1] - 2 * on[2] + seed * on[0]

    results = {
        (*v, seed): row(v, seed, 10 if v == RANDOM else accuracy(v, seed), 50)
        for v in VARIANTS
        for seed in range(3)
    }
    assert effects(results, 'linear') == {
        'target': [30, 31, 32],
        'decoder': [4, 4, 4],
        'masking': [-2, -2, -2],
    }
    setting = SETTINGS['cpu']
    text = table(results, setting, 55.5)
    assert '| CLIP | prompting | semantic | 53.0 ± 1.0 | 50.0 ± 0.0 | 3 |' in text
    assert '| random weights |  |  | 10.0 ± 0.0 | 50.0 ± 0.0 | 3 |' in text
    assert '| target: CLIP instead of pixels | +31.0 ± 1.0 points | +0.0 ± 0.0 points |' in text
    assert '| masking: semantic instead of uniform | -2.0 ± 0.0 points |' in text
    assert '55.5 %' in text

    half = {k: r for k, r in results.items() if k[:2] != ('CLIP', 'prompting') or k[-1] == 0}
    assert effects(half, 'linear')['target'] == [30]  # of seeds with all eight variants only
    text = table(half, setting, 55.5)
    assert re.search(r'CLIP \| prompting \| uniform \| 54.0 \| 50.0 \| 1 \|', text)


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--data_path', __file__], ['--data_path', 'CIFAR-10']),
        (['--setting', 'cpu'], ['--data_path', '2000 images']),
        (['--report'], ['--output_dir', 'results.jsonl']),
        (['--seeds', '0'], ['--seeds']),
    ],
    ids=lambda words: words[0],
)
def test_errors(flags, words, ablation, cifar, tmp_path):
    common = ['--data_path', cifar, '--output_dir', tmp_path, '--setting', 'quick']
    one_error_line(ablation(*common, '--device', 'cpu', *flags), *words)
