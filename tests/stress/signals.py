"""Two processes under torchrun get SIGTERM at a random moment and are resumed.

They end with the weights of an uninterrupted run.
"""

import random
import signal
import time

from tests.helpers import ROOT, start, torchrun
from tests.stress.runs import FLAGS, draw_images, same_checkpoints, step_line


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        draw_images(folder)
        process, log = self._start('whole')
        assert process.wait(900) == 0, log.read_text()

    def _start(self, name):
        log = self.folder / f'{name}.log'
        flags = '--batch_size 2 --epochs 12 --num_workers 1 --save_every 4 --print_freq 1'
        flags = [*FLAGS, *flags.split(), '--resume', 'auto', '--log_dir', '']
        flags += ['--data_path', self.folder / 'data', '--output_dir', self.folder / name]
        return start(*torchrun(2), ROOT / 'main_pretrain.py', *flags, log=log), log

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        name = f'run{number}'
        process, log = self._start(name)
        line = step_line(rng.randrange(1, 70))  # of 72
        description = f'stopped after {line}'
        while line not in log.read_text():
            if process.poll() is not None:
                outcome = f'WRONG: status {process.returncode} before the signal'
                return outcome, log.read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGTERM)
        if process.wait(300) == 0:
            return 'WRONG: status 0 after the signal', description
        if (
            'Stopped by' not in log.read_text()
            or 'Traceback (most recent call last):\n  File "main' in log.read_text()
        ):
            return 'WRONG: it did not report the signal', description + log.read_text()[-2000:]
        process, log = self._start(name)
        if process.wait(900) != 0 or 'Resumed from' not in log.read_text():
            return 'WRONG: it did not resume', description + log.read_text()[-2000:]
        if not same_checkpoints(self.folder / 'whole', self.folder / name):
            return 'WRONG: other checkpoints', description
        return 'stops with the same weights', description

    def close(self):
        pass
