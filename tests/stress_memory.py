"""The memory of a run's processes, training and loading, over 2,000 steps: flat within 2 % after the first 200.

A case is a run; what is looked at is the resident memory of each process that no file stands behind. (Private memory would grow
without anything being allocated: a loader worker and its parent share pages until one of them writes into one.)
"""

import os
import re
import subprocess
import time
from pathlib import Path

from conftest import ROOT, draw_photo, torchrun

STEPS, FLAT_FROM, WITHIN = 2000, 200, 0.02


def memory(pid):
    """Bytes of memory that a process has allocated and uses; 0 when it has gone."""
    try:
        return 1024 * int(re.search(r'Anonymous:\s+(\d+) kB', Path(f'/proc/{pid}/smaps_rollup').read_text())[1])
    except (OSError, TypeError):
        return 0


def descendants(pid):
    try:
        children = [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        for i in range(400):
            draw_photo(folder / 'data' / 'train' / 'all' / f'{i:03d}.jpg', i, (70 + i % 30, 60 + i % 20))

    def case(self, number):
        processes = 1 + number % 2
        log = self.folder / f'{number}.log'
        command = [*torchrun(processes), ROOT / 'main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--input_size', 32,
                   '--batch_size', 4 // processes, '--epochs', STEPS // 100, '--warmup_epochs', 1, '--amp', 'fp32',
                   '--seed', self.seed, '--data_path', self.folder / 'data', '--num_workers', 1,
                   '--output_dir', self.folder / f'out{number}', '--log_dir', self.folder / f'out{number}', '--print_freq', 50]
        with open(log, 'w') as f:
            run = subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True)
        first, last = {}, {}
        while run.poll() is None:
            lines = re.findall(r'Epoch \[(\d+)\] \[ *(\d+)/100\]', log.read_text())
            done = [100 * int(epoch) + int(step) for epoch, step in lines]
            if done and FLAT_FROM <= done[-1] < STEPS:
                for pid in descendants(run.pid):
                    if used := memory(pid):
                        first.setdefault(pid, used)
                        last[pid] = max(used, last.get(pid, 0)) if done[-1] > STEPS - 200 else used
            time.sleep(0.2)
        if run.returncode != 0:
            return f'WRONG: status {run.returncode}', log.read_text()[-2000:]
        growth = {pid: last[pid] / first[pid] - 1 for pid in first}
        what = ', '.join(f'{first[pid] / 2**20:.0f} MB {growth[pid]:+.1%}' for pid in first)
        if len(growth) != 2 * processes or max(growth.values()) > WITHIN:
            return 'WRONG: not flat', what
        return f'runs of {processes} process(es) with flat memory ({what})', what

    def close(self):
        pass
