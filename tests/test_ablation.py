"""tools/ablation.py: what it runs, how it goes on, what it makes of the results."""

import fcntl
import itertools
import json
import re
import sys

import pytest
from conftest import ROOT, draw_photo, run, script
from PIL import Image

import main_pretrain
from tools.ablation import SETTINGS, pretrain_flags
from tools.ablation_report import FACTORS, RANDOM, VARIANTS, add_result, effects, read_results, table

ablation = script('tools.ablation')


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """A folder like CIFAR-10's, with as many pictures as the quick setting takes."""
    root = tmp_path_factory.mktemp('cifar')
    for split, count in (('train', 16), ('test', 2)):
        for label, i in itertools.product(range(10), range(count)):
            draw_photo(root / split / f'class{label}' / f'{i:04d}.png', (split, label, i), (32, 32))
    return root


def line(variant, seed=0, linear=20.0, finetune=30.0):
    return {**dict(zip(FACTORS, variant)), 'seed': seed, 'linear': linear, 'finetune': finetune}


def test_the_runs_that_are_missing(cifar, tmp_path):
    """Of the nine runs of a seed, seven are there: the other two are made by the real scripts, and table and plot of all."""
    missing = [('pixels', 'MAE', 'semantic'), RANDOM]
    for variant in VARIANTS:
        if variant not in missing:
            add_result(tmp_path, line(variant))
    flags = ['--data_path', cifar, '--output_dir', tmp_path, '--setting', 'quick', '--seeds', 1, '--jobs', 2, '--num_workers', 0]
    result = run(sys.executable, 'tools/ablation.py', *flags, '--device', 'cpu')
    assert result.returncode == 0, result.stdout + result.stderr
    assert '2 of 9 runs to do' in result.stdout
    results = read_results(tmp_path)
    assert len(results) == 9
    for variant in missing:
        row = results[(*variant, 0)]
        folder = tmp_path / 'runs' / f'{"-".join(w for w in variant if w).replace(" ", "-")}-seed0'
        assert (folder / 'pretrain').exists() == (variant != RANDOM)
        for kind in ('linear', 'finetune'):
            assert row[kind] == json.loads((folder / kind / 'log.txt').read_text().splitlines()[-1])['test_acc1']
    assert len(list((tmp_path / 'data' / 'train').rglob('*.png'))) == SETTINGS['quick']['images']
    assert (tmp_path / 'ablation.md').read_text() in result.stdout
    with Image.open(tmp_path / 'ablation.png') as image:
        assert image.size[0] > 600

    assert '0 of 9 runs to do' in ablation(*flags, '--device', 'cpu').stdout
    with open(tmp_path / '.lock') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'still works in there' in ablation(*flags, '--device', 'cpu').stderr
    other = ablation(*[{'quick': 'cpu'}.get(flag, flag) for flag in flags], '--device', 'cpu')
    assert other.returncode == 1 and 'has results of another setting or of other data' in other.stderr


@pytest.mark.parametrize('variant', VARIANTS[:8])
def test_flags_make_the_variant(variant, tiny_clip):
    """What main_pretrain.py builds of them."""
    target, decoder, masking = variant
    flags = [str(f) for f in pretrain_flags(*variant, tiny_clip)]
    args = main_pretrain.get_args_parser().parse_args(
        ['--model', 'mae_vit_tiny_patch8', '--input_size', '64', '--amp', 'fp32', '--lr', '1', *flags])
    args.compile = args.distributed = False
    main_pretrain.check(args)
    teacher, _, model, *_ = main_pretrain.build_training(args, 'cpu')
    assert model.use_clip == (target == 'CLIP') and model.norm_pix_loss == (target == 'pixels')
    assert model.change_decoder == (decoder == 'prompting')
    assert model.attn_mask == args.attn_mask == (masking == 'semantic')
    assert model.decoder_pred.out_features == (48 if target == 'CLIP' else 192)
    assert (teacher is None) == (target == 'pixels' and masking == 'uniform')


def test_table():
    """Known accuracies: effects are differences between halves of the family, a seed each; nothing is lost in the table."""
    def accuracy(variant, seed):
        on = [level == FACTORS[name][1] for name, level in zip(FACTORS, variant)]
        return 20 + 30 * on[0] + 4 * on[1] - 2 * on[2] + seed * on[0]

    results = {(*v, seed): line(v, seed, 10 if v == RANDOM else accuracy(v, seed), 50) for v in VARIANTS for seed in range(3)}
    assert effects(results, 'linear') == {'target': [30, 31, 32], 'decoder': [4, 4, 4], 'masking': [-2, -2, -2]}
    setting = SETTINGS['cpu']
    text = table(results, setting, 55.5)
    assert '| CLIP | prompting | semantic | 53.0 ± 1.0 | 50.0 ± 0.0 | 3 |' in text
    assert '| random weights |  |  | 10.0 ± 0.0 | 50.0 ± 0.0 | 3 |' in text
    assert '| target: CLIP instead of pixels | +31.0 ± 1.0 points | +0.0 ± 0.0 points |' in text
    assert '| masking: semantic instead of uniform | -2.0 ± 0.0 points |' in text
    assert 'right in 55.5 %' in ' '.join(text.split())

    half = {key: row for key, row in results.items() if key[:2] != ('CLIP', 'prompting') or key[-1] == 0}
    assert effects(half, 'linear')['target'] == [30]  # of whole families only
    assert re.search(r'CLIP \| prompting \| uniform \| 54.0 \| 50.0 \| 1 \|', table(half, setting, 55.5))


WRONG = {
    'no data': (['--data_path', 'EMPTY'], 'torchvision could not provide CIFAR-10'),
    'too few images': (['--setting', 'cpu'], 'has not 20000 images'),
    'no results': (['--report'], 'has no results.jsonl'),
    'no seeds': (['--seeds', '0'], '--seeds'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, cifar, tmp_path):
    flags, message = WRONG[case]
    (tmp_path / 'EMPTY').write_text('a file')
    flags = [tmp_path / 'EMPTY' if flag == 'EMPTY' else flag for flag in flags]
    command = ['--data_path', cifar, '--setting', 'quick', '--output_dir', tmp_path / 'out', '--device', 'cpu', *flags]
    result = run(sys.executable, ROOT / 'tools/ablation.py', *command)
    assert result.returncode != 0 and 'Traceback' not in result.stderr, result.stderr
    assert result.stderr.startswith('error: ') and message in result.stderr and result.stderr.count('\n') == 1
