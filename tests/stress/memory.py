"""The memory of a run's processes, training and loading, stays within 2 % from step 200 to 2,000.

A case is a run. The figure is the anonymous resident memory of each process. (Private memory would
grow without any allocation: a loader worker and its parent share pages until one writes to them.)
"""

import re
import time
from pathlib import Path

from tests.helpers import ROOT, start, torchrun
from tests.stress.runs import FLAGS, draw_images

STEPS, FLAT_FROM, WITHIN = 2000, 200, 0.02


def memory(pid):
    """Return the anonymous resident memory of a process in bytes, 0 if it has ended."""
    try:
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
        return 1024 * int(re.search(r'Anonymous:\s+(\d+) kB', text)[1])
    except (OSError, TypeError):
        return 0


def descendants(pid):
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []
    children = list(map(int, children))
    return children + [grandchild for child in children for grandchild in descendants(child)]


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        draw_images(folder, 400, 'jpg')

    def case(self, number):
        processes = 1 + number % 2
        log, out = self.folder / f'{number}.log', self.folder / f'out{number}'
        flags = f'--batch_size {4 // processes} --epochs {STEPS // 100} --num_workers 1'
        flags += f' --seed {self.seed} --print_freq 50'
        flags = [*FLAGS, *flags.split(), '--data_path', self.folder / 'data']
        flags += ['--output_dir', out, '--log_dir', out]
        run = start(*torchrun(processes), ROOT / 'main_pretrain.py', *flags, log=log)
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
        sizes = ', '.join(f'{first[pid] / 2**20:.0f} MB {growth[pid]:+.1%}' for pid in first)
        if len(growth) != 2 * processes or max(growth.values()) > WITHIN:
            return 'WRONG: not flat', sizes
        return f'runs of {processes} process(es) with flat memory ({sizes})', sizes

    def close(self):
        pass
