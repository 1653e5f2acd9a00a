"""Runs that are killed at random moments, again and again, until one comes to its end: the weights are the uninterrupted run's.

A case is a run with KILLS kills. It saves after every step, so that many of them fall into the writing of a checkpoint.
"""

import os
import random
import signal
import sys
import time

import torch
from conftest import draw_photo
from test_pretrain import weights_equal

import main_pretrain
from util import misc

KILLS = 5


class Stress:
    def __init__(self, folder, seed):
        torch.set_num_threads(1)
        self.folder, self.seed = folder, seed
        for i in range(24):
            draw_photo(folder / 'data' / 'train' / 'all' / f'{i:02d}.png', i, (70, 60))
        begin = time.monotonic()
        assert self._wait(self._start(folder / 'whole')) == 0, (folder / 'whole.log').read_text()
        self.seconds = time.monotonic() - begin

    def _start(self, out, *flags):
        """A process of its own that runs main_pretrain.py: forked, to spare the imports."""
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        log = os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, 'w', buffering=1), open(2, 'w', buffering=1)
        status = 1
        try:
            misc.run(main_pretrain.main, main_pretrain.get_args_parser().parse_args([str(f) for f in (
                '--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--batch_size', 4, '--epochs', 6, '--warmup_epochs', 1,
                '--blr', 0.01, '--amp', 'fp32', '--data_path', self.folder / 'data', '--num_workers', 1, '--save_minutes', 0,
                '--save_every', 2, '--output_dir', out, '--log_dir', '', '--resume', 'auto', *flags)]))
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os._exit(status)

    def _wait(self, pid, seconds=600):
        """A process's status; None if it still runs after so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.005)
        return None

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        out = self.folder / f'run{number}'
        kills, moments = 0, []
        while kills < KILLS:
            moments.append(round(rng.uniform(0.1, 0.8) * self.seconds, 2))
            pid = self._start(out)
            status = self._wait(pid, moments[-1])
            if status is None:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
            elif status == 0:  # at its end before its kill: begin again
                for path in out.iterdir():
                    path.unlink()
            else:
                return f'WRONG: status {status}', (self.folder / f'run{number}.log').read_text()[-2000:]
        status = self._wait(self._start(out))
        what = f'killed after {moments} s'
        if status != 0:
            return f'WRONG: status {status} at the end', what + (self.folder / f'run{number}.log').read_text()[-2000:]
        names = {path.name for path in out.glob('*.pth')}
        expected = {path.name for path in (self.folder / 'whole').glob('*.pth')}
        if names != expected:
            return f'WRONG: {sorted(names ^ expected)}', what
        if not all(weights_equal(self.folder / 'whole' / name, out / name) for name in names):
            return 'WRONG: other weights', what
        if (out / 'log.txt').read_text() != (self.folder / 'whole' / 'log.txt').read_text():
            return 'WRONG: another log', what
        return f'runs of {KILLS} kills with the same weights', what

    def close(self):
        pass
