"""Runs that are stopped, killed and started again: real signals to real processes, the same weights in the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finetune, pretrain, run, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pretrain import checkpoint, weights_equal

from util import misc
from util.lars import LARS


def start(launcher, *flags, log):
    """main_pretrain.py as a process of its own, its output in the file ``log``."""
    command = [str(c) for c in (*launcher, ROOT / 'main_pretrain.py', *flags)]
    with open(log, 'w') as f:
        return subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, start_new_session=True)


def wait_for(text, log, process, seconds=200):
    begin = time.monotonic()
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - begin < seconds, log.read_text()
        time.sleep(0.05)


def end(process, log, seconds=200):
    """The status a process ends with; past the time it and all that it started are killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f'no end: {log.read_text()}')


@pytest.fixture
def flags(milan_flags):
    """10 epochs of 6 steps with two loader workers; a line after every step."""
    return [*milan_flags, '--epochs', 10, '--num_workers', 2, '--save_every', 100, '--print_freq', 1, '--log_dir', '']


@pytest.fixture
def uninterrupted(flags, tmp_path):
    result = pretrain(*flags, '--output_dir', tmp_path / 'whole')
    assert result.returncode == 0, result.stderr
    return tmp_path / 'whole'


def assert_same_run(a, b):
    assert weights_equal(a / 'checkpoint-9.pth', b / 'checkpoint-9.pth')
    records = [[json.loads(line) for line in (out / 'log.txt').read_text().splitlines()] for out in (a, b)]
    assert [r['epoch'] for r in records[1]] == list(range(10))
    for x, y in zip(*records):
        assert x == pytest.approx(y, rel=1e-12)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_inside_the_epoch(number, flags, uninterrupted, tmp_path):
    """The step is finished, the state saved, the status says so; the run goes on with the very next batch."""
    log, out = tmp_path / 'log', tmp_path / 'out'
    process = start((sys.executable,), *flags, log=log)
    wait_for('Epoch [1] [3/6]', log, process)
    process.send_signal(number)
    assert end(process, log) == 75, log.read_text()
    assert f'Stopped by {number.name} after epoch' in log.read_text() and 'Traceback' not in log.read_text()
    saved = checkpoint(out / 'checkpoint-last.pth')
    assert {'model', 'optimizer', 'epoch', 'scaler', 'args'} <= saved.keys()
    result = pretrain(*flags, '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert f'Resumed from {out}/checkpoint-last.pth' in result.stdout
    assert_same_run(uninterrupted, out)


def test_a_signal_to_a_group_of_processes(flags, tmp_path):
    """Two ranks, of which the launcher is told to stop: both save together, at the same step."""
    flags = [*flags, '--batch_size', 2]
    whole = pretrain(*flags, '--output_dir', tmp_path / 'whole', launcher=torchrun(2))
    assert whole.returncode == 0, whole.stderr
    log, out = tmp_path / 'log', tmp_path / 'out'
    process = start(torchrun(2), *flags, log=log)
    wait_for('Epoch [2] [4/6]', log, process)
    process.terminate()
    assert end(process, log) != 0
    assert 'Stopped by' in log.read_text(), log.read_text()
    result = pretrain(*flags, '--resume', 'auto', launcher=torchrun(2))
    assert result.returncode == 0 and 'Resumed from' in result.stdout, result.stderr
    assert_same_run(tmp_path / 'whole', out)


def test_a_killed_run_goes_on_from_the_clock_s_last_save(flags, uninterrupted, tmp_path):
    log, out = tmp_path / 'log', tmp_path / 'out'
    process = start((sys.executable,), *flags, '--save_minutes', 0, log=log)
    wait_for('Epoch [1] [3/6]', log, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = pretrain(*flags, '--resume', 'auto', '--save_minutes', 0)
    assert result.returncode == 0, result.stderr
    assert 'after step' in result.stdout or 'is done' in result.stdout
    assert_same_run(uninterrupted, out)


def test_a_dead_rank_is_restarted_with_the_group(flags, tmp_path):
    """torchrun --max-restarts: the group begins again from what this very run had saved, not from files of an earlier one."""
    flags = [*flags, '--batch_size', 2]
    whole = pretrain(*flags, '--output_dir', tmp_path / 'whole', launcher=torchrun(2))
    assert whole.returncode == 0, whole.stderr
    log, out = tmp_path / 'log', tmp_path / 'out'
    out.mkdir()
    shutil.copy(tmp_path / 'whole' / 'checkpoint-9.pth', out / 'checkpoint-9.pth')  # of an earlier run
    process = start((*torchrun(2), '--max-restarts=1'), *flags, log=log)
    wait_for('Epoch [2] [2/6]', log, process)
    ranks = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert end(process, log) == 0, log.read_text()
    assert f'Resumed from {out}/checkpoint-last.pth: epoch' in log.read_text()
    assert_same_run(tmp_path / 'whole', out)


def test_fine_tuning_is_interrupted_too(classifier_flags, tmp_path):
    """Mixup, erasing, stochastic depth, the best accuracy so far: all as if nothing had happened."""
    flags = [*classifier_flags, '--epochs', 3, '--mixup', 0.8, '--drop_path', 0.1, '--save_minutes', 0, '--log_dir', '']
    whole = finetune(*flags, '--output_dir', tmp_path / 'whole')
    assert whole.returncode == 0, whole.stderr

    class Stop(Exception):
        pass

    save_model, calls = misc.save_model, []

    def save_and_stop(args, epoch, *rest, **more):
        save_model(args, epoch, *rest, **more)
        calls.append(more.get('step'))
        if len(calls) == 4:  # the first save inside the second epoch
            raise Stop

    misc.save_model = save_and_stop
    try:
        with pytest.raises(Stop):
            finetune(*flags)
    finally:
        misc.save_model = save_model
    assert calls == [1, 2, None, 1]
    result = finetune(*flags, '--resume', 'auto')
    assert result.returncode == 0 and 'epoch 1, after step 1' in result.stdout, result.stderr
    assert weights_equal(tmp_path / 'whole' / 'checkpoint-2.pth', tmp_path / 'out' / 'checkpoint-2.pth')
    assert (tmp_path / 'whole' / 'log.txt').read_text() == (tmp_path / 'out' / 'log.txt').read_text()


def test_resume_auto_passes_over_what_is_damaged(milan_flags, tmp_path):
    out = tmp_path / 'out'
    fresh = pretrain(*milan_flags, '--epochs', 3, '--save_every', 1, '--resume', 'auto')
    assert fresh.returncode == 0 and f'no checkpoint in {out}, a fresh start' in fresh.stdout
    whole = (out / 'checkpoint-2.pth').read_bytes()
    for name in ('last', '2'):
        (out / f'checkpoint-{name}.pth').unlink()
    (out / 'checkpoint-last.pth').write_bytes(whole[:-1000])
    (out / 'checkpoint-2.pth').write_bytes(b'')
    (out / 'checkpoint-last.pth.tmp').write_bytes(b'half')  # left by a kill
    again = pretrain(*milan_flags, '--epochs', 3, '--save_every', 1, '--resume', 'auto')
    assert again.returncode == 0 and f'Resumed from {out}/checkpoint-1.pth: epoch 1 is done' in again.stdout
    for name in ('last', '2'):
        assert again.stderr.count(f'Passed over: checkpoint {out}/checkpoint-{name}.pth cannot be read') == 1
    assert [json.loads(line)['epoch'] for line in (out / 'log.txt').read_text().splitlines()] == [0, 1, 2]
    steps = [event.step for event in EventAccumulator(str(out)).Reload().Scalars('train_loss')]
    assert steps == sorted(set(steps)) and len(steps) == 18
    starts = [json.loads(line) for line in (out / 'starts.txt').read_text().splitlines()]
    assert len(starts) == 2 and starts[1]['args']['resume'].endswith('checkpoint-1.pth')
    assert starts[0]['versions']['torch'] == torch.__version__ and starts[0]['world_size'] == 1 and starts[0]['machine']['cores']
    nowhere = pretrain(*milan_flags, '--output_dir', '', '--resume', 'auto')
    assert nowhere.returncode == 1 and '--resume auto looks' in nowhere.stderr


@pytest.mark.parametrize('make', [
    lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True), lambda ps: torch.optim.AdamW(ps, lr=0.1), lambda ps: LARS(ps, lr=0.1)],
    ids=['fused', 'plain', 'LARS'])
@pytest.mark.parametrize('broken', ['loss', 'gradient'])
def test_a_broken_step_changes_nothing(make, broken):
    """Neither weights nor the optimiser's state; steps in a row are counted; the next good one is as if nothing had been."""
    def train(steps):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer, scaler, counts = make(layer.parameters()), misc.NativeScalerWithGradNormCount(enabled=False, device='cpu'), []
        for good in steps:
            optimizer.zero_grad()
            out = layer(torch.ones(2, 4)).square().sum()
            if not good:
                out = out + torch.tensor(float('nan')) if broken == 'loss' else torch.sqrt(out - out.detach()) + 1
            scaler(out, optimizer)
            counts.append(int(scaler.skipped))
        return layer.weight.detach(), counts

    assert torch.equal(train([1, 1, 1])[0], train([1, 0, 0, 1, 0, 1])[0])
    assert train([1, 0, 0, 1, 0, 1])[1] == [0, 1, 2, 0, 1, 0]


SKIP_ON_ALL = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from util import misc
dist.init_process_group('gloo')
torch.manual_seed(0)
layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3), gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
scaler = misc.NativeScalerWithGradNormCount(enabled=False, device='cpu')
before = layer.module.weight.clone()
loss = layer(torch.ones(2, 4)).square().sum()
scaler(loss * float('inf') if dist.get_rank() == 1 else loss, optimizer)
sys.stdout.write(f'{{torch.equal(before, layer.module.weight)}} {{int(scaler.skipped)}}\\n')  # one write, for two processes' sake
dist.barrier()
dist.destroy_process_group()
'''


def test_one_process_s_broken_loss_is_left_out_by_all(tmp_path):
    (tmp_path / 'skip.py').write_text(SKIP_ON_ALL.format(root=str(ROOT)))
    result = run(*torchrun(2), tmp_path / 'skip.py')
    assert result.returncode == 0 and result.stdout.split() == ['True', '1', 'True', '1'], result.stderr


def test_too_many_broken_steps_stop_the_run(milan_flags, tmp_path):
    """With epoch, step, learning rate and the batch's samples written down; the last checkpoint is as it was."""
    result = pretrain(*milan_flags, '--epochs', 3, '--lr', 1e9, '--warmup_epochs', 0, '--max_skipped_steps', 2)
    assert result.returncode == 1 and 'steps in a row had gradients that are not finite' in result.stderr
    assert 'Traceback' not in result.stderr and 'Step left out' in result.stderr
    notes = [json.loads(line) for line in (tmp_path / 'out' / 'skipped_steps.txt').read_text().splitlines()]
    assert [note['in_a_row'] for note in notes] == [1, 2, 3] and notes[0]['lr'] > 1e8 and notes[0]['epoch'] == 0
    assert all(len(samples) == 4 for note in notes for samples in note['processes'][0]['samples'])


def test_a_stuck_process_ends_the_run_and_is_named(milan_flags, tmp_path):
    log = tmp_path / 'log'
    process = start(torchrun(2), *milan_flags, '--epochs', 500, '--dist_timeout', 0.1, '--print_freq', 1, '--batch_size', 2,
                    '--log_dir', '', log=log)
    wait_for('Epoch [0] [3/6]', log, process)
    ranks = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(ranks[-1], signal.SIGSTOP)
    try:
        assert end(process, log, 120) == 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert 'error: the processes of this run waited for each other in vain' in said and '--dist_timeout' in said, said
    assert 'nothing was heard of process 1' in said, said


def test_a_signal_to_a_run_that_saves_nothing(milan_flags, tmp_path):
    flags = [*milan_flags, '--epochs', 300, '--output_dir', '', '--log_dir', '']
    process = start((sys.executable,), *flags, log=tmp_path / 'log')
    wait_for('Epoch [1] [2/6]', tmp_path / 'log', process)
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path / 'log') == 75
    assert 'nothing is saved without --output_dir' in (tmp_path / 'log').read_text()
