"""Runs that are stopped, killed and resumed: real signals, and the same weights at the end.

Kills of one process and of a node are tested in tests/stress/kills.py and nodes.py.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import (
    ROOT,
    checkpoint,
    finetune,
    log_records,
    ok,
    pretrain,
    start,
    torchrun,
    wait,
    wait_for,
    weights_equal,
)

EPOCHS = 4
PRETRAIN = ROOT / 'main_pretrain.py'


def flags_of(data, out, batch_size):
    """Flags of a run of 4 epochs with 6 steps each, with a log line after every step."""
    flags = '--model mae_vit_tiny_patch8 --input_size 32 --amp fp32 --warmup_epochs 1 --blr 0.05'
    flags += f' --epochs {EPOCHS} --batch_size {batch_size} --num_workers 1 --save_every 100'
    flags = [*flags.split(), '--print_freq', 1, '--log_dir', '']
    return [*flags, '--data_path', data, '--output_dir', out]


@pytest.fixture(scope='module')
def one_process(small_images, tmp_path_factory):
    """The output of an uninterrupted run."""
    out = tmp_path_factory.mktemp('one')
    ok(pretrain(*flags_of(small_images, out, 4)))
    return out


@pytest.fixture(scope='module')
def two_processes(small_images, tmp_path_factory):
    """The output of an uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp('two')
    ok(pretrain(*flags_of(small_images, out, 2), launcher=torchrun(2)))
    return out


def assert_same_run(expected, out):
    last = f'checkpoint-{EPOCHS - 1}.pth'
    assert weights_equal(expected / last, out / last)
    records = log_records(out)
    assert [r['epoch'] for r in records] == list(range(EPOCHS))
    for x, y in zip(log_records(expected), records):
        assert x == pytest.approx(y, rel=1e-12)


def ranks_of(process):
    """Return the process IDs of the ranks that torchrun has started."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    return list(map(int, children.split()))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_signal_saves_within_the_epoch(number, small_images, one_process, tmp_path):
    """Status 75, a checkpoint of the last step, and a resumed run that continues after it."""
    log, out = tmp_path / 'log', tmp_path / 'out'
    flags = flags_of(small_images, out, 4)
    process = start(sys.executable, PRETRAIN, *flags, log=log)
    wait_for('Epoch [1] [3/6]', log, process)
    process.send_signal(number)
    assert wait(process, log) == 75, log.read_text()
    assert number.name in log.read_text() and 'Traceback' not in log.read_text()
    saved = checkpoint(out / 'checkpoint-last.pth')
    assert {'model', 'optimizer', 'epoch', 'scaler', 'args'} <= saved.keys()
    assert f'Resumed from {out}/checkpoint-last.pth' in ok(pretrain(*flags, '--resume', 'auto'))
    assert_same_run(one_process, out)


@pytest.mark.slow
def test_signal_to_two_processes(small_images, two_processes, tmp_path):
    """Torchrun passes SIGTERM on: both ranks save and end after the same step."""
    log, out = tmp_path / 'log', tmp_path / 'out'
    flags = flags_of(small_images, out, 2)
    process = start(*torchrun(2), PRETRAIN, *flags, log=log)
    wait_for('Epoch [1] [2/6]', log, process)
    process.terminate()
    assert wait(process, log) != 0
    assert 'Stopped by' in log.read_text(), log.read_text()
    result = pretrain(*flags, '--resume', 'auto', launcher=torchrun(2))
    assert 'Resumed from' in ok(result)
    assert_same_run(two_processes, out)


@pytest.mark.slow
def test_killed_rank_restarts_the_group(small_images, two_processes, tmp_path):
    """With --max-restarts the run resumes from its own checkpoint, not from an older file."""
    log, out = tmp_path / 'log', tmp_path / 'out'
    out.mkdir()
    last = f'checkpoint-{EPOCHS - 1}.pth'
    shutil.copy(two_processes / last, out / last)  # from an earlier run
    flags = flags_of(small_images, out, 2)
    process = start(*torchrun(2), '--max-restarts=1', PRETRAIN, *flags, log=log)
    wait_for('Epoch [2] [2/6]', log, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    assert wait(process, log) == 0, log.read_text()
    assert f'Resumed from {out}/checkpoint-last.pth: epoch' in log.read_text()
    assert_same_run(two_processes, out)


@pytest.mark.slow
def test_signal_to_fine_tuning(classifier_flags, tmp_path):
    """Mixup, stochastic depth and the best accuracy so far continue as without the stop."""
    more = '--epochs 3 --batch_size 2 --mixup 0.8 --drop_path 0.1 --print_freq 1 --log_dir'
    flags = [*classifier_flags, *more.split(), '']
    whole, out, log = tmp_path / 'whole', tmp_path / 'out', tmp_path / 'log'
    ok(finetune(*flags, '--output_dir', whole))
    process = start(sys.executable, ROOT / 'main_finetune.py', *flags, log=log)
    wait_for('Epoch [1] [ 2/12]', log, process)
    process.terminate()
    assert wait(process, log) == 75, log.read_text()
    assert 'epoch 1, after step' in ok(finetune(*flags, '--resume', 'auto'))
    assert weights_equal(whole / 'checkpoint-2.pth', out / 'checkpoint-2.pth')
    assert log_records(whole) == log_records(out)


@pytest.mark.slow
def test_signal_without_output_dir(small_images, tmp_path):
    log = tmp_path / 'log'
    flags = [*flags_of(small_images, '', 4), '--epochs', 300]
    process = start(sys.executable, PRETRAIN, *flags, log=log)
    wait_for('Epoch [1] [2/6]', log, process)
    process.terminate()
    assert wait(process, log) == 75
    assert 'Stopped by SIGTERM' in log.read_text() and '--output_dir' in log.read_text()


@pytest.mark.slow
def test_stuck_rank_is_named(small_images, tmp_path):
    log = tmp_path / 'log'
    flags = [*flags_of(small_images, tmp_path / 'out', 2), '--epochs', 500, '--dist_timeout', 0.1]
    process = start(*torchrun(2), PRETRAIN, *flags, log=log)
    wait_for('Epoch [0] [3/6]', log, process)
    os.kill(ranks_of(process)[-1], signal.SIGSTOP)
    try:
        assert wait(process, log, 120) == 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    errors = [line for line in log.read_text().splitlines() if line.startswith('error: ')]
    assert any('rank 1' in line and '--dist_timeout' in line for line in errors), log.read_text()


def test_resume_auto_skips_damaged_files(milan_flags, tmp_path):
    """The newest intact checkpoint counts; log.txt and curves have every epoch once."""
    out = tmp_path / 'out'
    flags = [*milan_flags, '--epochs', 3, '--save_every', 1, '--resume', 'auto']
    assert f'no checkpoint in {out}' in ok(pretrain(*flags))
    last, second = out / 'checkpoint-last.pth', out / 'checkpoint-2.pth'
    whole = second.read_bytes()
    last.unlink()
    second.unlink()
    last.write_bytes(whole[:-1000])
    second.write_bytes(b'')
    (out / 'checkpoint-last.pth.tmp').write_bytes(b'half')  # from a kill while writing
    again = pretrain(*flags)
    assert f'Resumed from {out}/checkpoint-1.pth: epoch 1 is done' in ok(again)
    for path in (last, second):
        assert again.stderr.count(str(path)) == 1
    assert [r['epoch'] for r in log_records(out)] == [0, 1, 2]
    steps = [event.step for event in EventAccumulator(str(out)).Reload().Scalars('train_loss')]
    assert steps == sorted(set(steps)) and len(steps) == 18
    starts = log_records(out, 'starts.txt')
    assert len(starts) == 2 and starts[1]['args']['resume'].endswith('checkpoint-1.pth')
    assert starts[0]['versions']['torch'] == torch.__version__
    assert starts[0]['world_size'] == 1 and starts[0]['machine']['cores']
