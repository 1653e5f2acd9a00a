"""Test tools.benchmark: its figures, its JSON file, its errors."""

import builtins
import json
import math
import subprocess
from functools import partial

import pytest
import torch

import clip
from tests.golden.deterministic import load_deterministic
from tests.helpers import TINY_CLIP, ok, one_error_line
from tools.benchmark.__main__ import get_args_parser, main
from util import cli
from util.amp import resolve_amp

TINY = '--model mae_vit_tiny_patch8 --input_size 64 --batch_size 2 --rounds 2'.split()


@pytest.fixture
def benchmark(capsys):
    """A function that runs the tool in this process and returns a CompletedProcess."""

    def start(*words):
        words, status, builtin_print = [str(word) for word in words], 0, builtins.print
        args, flags = get_args_parser().parse_known_args(words)
        try:
            cli.run(partial(main, pretrain_flags=flags), args)
        except SystemExit as e:
            status = e.code
        finally:
            builtins.print = builtin_print
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    return start


@pytest.mark.slow
def test_step(benchmark, tmp_path):
    file = tmp_path / 'speed.json'
    amp = resolve_amp('auto', 'cpu')  # a CPU without bf16 would need minutes to emulate it
    out = ok(benchmark('step', *TINY, '--steps', 1, '--json', file))
    written = json.loads(file.read_text())
    assert written['command'].startswith('python -m tools.benchmark')
    assert written['machine']['cores'] and written['versions']['torch'] == torch.__version__
    (r,) = written['step']
    assert r['precision'] == {'ours': amp, 'textbook': 'fp32'}
    assert r['ratio'] == pytest.approx(r['images_per_s']['ours'] / r['images_per_s']['textbook'])
    assert [len(rounds) for rounds in r['images_per_s_of_rounds'].values()] == [2, 2]
    assert list(r['split_ms_a_step']) == ['teacher', 'forward', 'backward', 'optimiser', 'other']
    assert all(ms > 0 for ms in r['split_ms_a_step'].values())
    assert all(2**26 < peak < 2**33 for peak in r['peak_memory_bytes'].values())
    assert r['flop_per_image'] == 470_907_648
    for key in ('flop_per_s', 'ceiling_flop_per_s', 'share_of_ceiling', 'memory_ratio'):
        assert math.isfinite(r[key]) and r[key] > 0, key
    assert r['first_step_loss']['agree'] and f'{r["ratio"]:.2f}' in out


@pytest.mark.slow
def test_data_and_train(benchmark, tmp_path, small_images):
    file = tmp_path / 'speed.json'
    flags = [*TINY, '--data_path', small_images, '--json', file]
    out = ok(benchmark('data', *flags, '--images', 8, '--num_workers', 1))
    r = json.loads(file.read_text())['data']
    assert r['files'] == 24 and r['num_workers'] == 1
    for rates, ratio in (
        ('images_per_s_a_thread', 'ratio'),
        ('images_per_s_of_loader', 'ratio_of_loader'),
    ):
        assert r[ratio] == pytest.approx(r[rates]['ours'] / r[rates]['pil'])
        assert f'{r[ratio]:.2f}' in out

    out = ok(benchmark('train', *flags, '--seconds', 0, '--num_workers', 0))
    r = json.loads(file.read_text())['train']
    assert r['images_per_s'] > 0 and f'{r["images_per_s"]:.1f} images/s' in out
    assert 0 <= r['share_waiting_for_data'] <= 1 and r['log_lines'] >= 1


def test_errors(benchmark, tmp_path):
    one_error_line(benchmark('all', '--data_path', tmp_path), '--data_path', 'train/')
    one_error_line(benchmark('step', '--teacher', 'test_vit'), '--clip_path')
    one_error_line(benchmark('step', *TINY, '--input_size', 60), '--input_size 60')
    teacher = load_deterministic(clip.CLIP(**TINY_CLIP), skip=())
    teacher.visual.proj.data.fill_(math.nan)
    torch.save(teacher.state_dict(), tmp_path / 'nan.pt')
    flags = ['--clip_path', tmp_path / 'nan.pt', '--max_skipped_steps', 0]
    one_error_line(benchmark('step', *TINY, *flags), '--max_skipped_steps 0')
