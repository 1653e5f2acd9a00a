"""Runs that are killed at random moments and resumed end with the weights of an uninterrupted run.

A case is a run with KILLS kills. It saves after every step, so that many kills fall into the
writing of a checkpoint.
"""

import os
import random
import signal
import sys
import time

import torch

import main_pretrain
from tests.helpers import run_main
from tests.stress.runs import FLAGS, draw_images, same_checkpoints

KILLS = 5


class Stress:
    def __init__(self, folder, seed):
        torch.set_num_threads(1)
        self.folder, self.seed = folder, seed
        draw_images(folder)
        begin = time.monotonic()
        assert self._wait(self._start('whole')) == 0, self._log('whole')
        self.seconds = time.monotonic() - begin

    def _log(self, name):
        return (self.folder / f'{name}.log').read_text()[-2000:]

    def _start(self, name):
        """Fork a process that runs main_pretrain.py, which saves the imports; return its ID."""
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        log = os.open(self.folder / f'{name}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, 'w', buffering=1), open(2, 'w', buffering=1)
        flags = '--batch_size 4 --epochs 6 --num_workers 1 --save_minutes 0 --save_every 2'
        flags = [*FLAGS, *flags.split(), '--resume', 'auto', '--log_dir', '']
        flags += ['--data_path', str(self.folder / 'data'), '--output_dir', str(self.folder / name)]
        status = 1
        try:
            run_main(main_pretrain.main, main_pretrain.get_args_parser().parse_args(flags))
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os._exit(status)

    def _wait(self, pid, seconds=600):
        """Return a process's status, or None if it is still running after ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.005)
        return None

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        name = f'run{number}'
        whole, out = self.folder / 'whole', self.folder / name
        kills, moments = 0, []
        while kills < KILLS:
            moments.append(round(rng.uniform(0.1, 0.8) * self.seconds, 2))
            pid = self._start(name)
            status = self._wait(pid, moments[-1])
            if status is None:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
            elif status == 0:  # it finished before its kill: start over
                for path in out.iterdir():
                    path.unlink()
            else:
                return f'WRONG: status {status}', self._log(name)
        status = self._wait(self._start(name))
        description = f'killed after {moments} s'
        if status != 0:
            return f'WRONG: status {status} at the end', description + self._log(name)
        if not same_checkpoints(whole, out):
            return 'WRONG: other checkpoints', description
        if (out / 'log.txt').read_text() != (whole / 'log.txt').read_text():
            return 'WRONG: another log', description
        return f'runs of {KILLS} kills with the same weights', description

    def close(self):
        pass
