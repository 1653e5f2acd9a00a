"""Two processes under torchrun that are told to stop at a random moment, and go on: the weights are the uninterrupted run's."""

import os
import random
import signal
import subprocess
import time

from conftest import ROOT, draw_photo, torchrun
from test_pretrain import weights_equal


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        for i in range(24):
            draw_photo(folder / 'data' / 'train' / 'all' / f'{i:02d}.png', i, (70, 60))
        process, log = self._start('whole')
        assert process.wait(900) == 0, log.read_text()

    def _start(self, name):
        command = [*torchrun(2), ROOT / 'main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--input_size', 32,
                   '--batch_size', 2, '--epochs', 12, '--warmup_epochs', 1, '--blr', 0.01, '--amp', 'fp32', '--num_workers', 1,
                   '--data_path', self.folder / 'data', '--save_every', 4, '--output_dir', self.folder / name, '--log_dir', '',
                   '--print_freq', 1, '--resume', 'auto']
        log = self.folder / f'{name}.log'
        with open(log, 'a') as f:
            return subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                    env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True), log

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        name = f'run{number}'
        out = self.folder / name
        process, log = self._start(name)
        step = rng.randrange(1, 70)  # of 72
        line = f'Epoch [{(step - 1) // 6}] [{(step - 1) % 6 + 1}/6]'
        what = f'stopped after {line}'
        while line not in log.read_text():
            if process.poll() is not None:
                return f'WRONG: status {process.returncode} before the signal', log.read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGTERM)
        if process.wait(300) == 0:
            return 'WRONG: status 0 after the signal', what
        if 'Stopped by' not in log.read_text() or 'Traceback (most recent call last):\n  File "main' in log.read_text():
            return 'WRONG: it did not say that it was stopped', what + log.read_text()[-2000:]
        process, log = self._start(name)
        if process.wait(900) != 0 or 'Resumed from' not in log.read_text():
            return 'WRONG: it did not go on', what + log.read_text()[-2000:]
        for path in (self.folder / 'whole').glob('*.pth'):
            if not weights_equal(path, out / path.name):
                return 'WRONG: other weights', what
        return 'stops with the same weights', what

    def close(self):
        pass
