"""Two torchrun agents as two nodes; one is killed with all its processes and comes back: the run ends with the same weights.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is needed: else the agents of PyTorch 2.15 wait in vain for a node that comes back.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time

from conftest import ROOT, draw_photo
from test_pretrain import weights_equal


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        for i in range(24):
            draw_photo(folder / 'data' / 'train' / 'all' / f'{i:02d}.png', i, (70, 60))
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        nodes = [self._node('whole', k) for k in range(2)]
        assert [node.wait(900) for node in nodes] == [0, 0], self._log('whole', 0).read_text()

    def _log(self, name, node):
        return self.folder / f'{name}-{node}.log'

    def _node(self, name, node):
        # The first node keeps the list of those who meet, and is not the one to go.
        command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3',
                   '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{self.port}', f'--rdzv_id={name}', '--local_addr=127.0.0.1',
                   f'--rdzv_conf=is_host={int(node == 0)}',
                   ROOT / 'main_pretrain.py', '--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--batch_size', 2,
                   '--epochs', 20, '--warmup_epochs', 1, '--blr', 0.01, '--amp', 'fp32', '--data_path', self.folder / 'data',
                   '--num_workers', 0, '--save_every', 4, '--output_dir', self.folder / name, '--log_dir', '', '--print_freq', 1]
        with open(self._log(name, node), 'a') as f:
            return subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                    env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
                                    start_new_session=True)

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        name = f'run{number}'
        nodes = [self._node(name, k) for k in range(2)]
        step = rng.randrange(7, 100)  # of 120
        line = f'Epoch [{(step - 1) // 6}] [{(step - 1) % 6 + 1}/6]'
        what = f'killed after {line}'

        def said():
            return ''.join(self._log(name, k).read_text() for k in range(2))

        while line not in said():
            if any(node.poll() is not None for node in nodes):
                self._kill(nodes)
                return 'WRONG: it ended before the kill', said()[-3000:]
            time.sleep(0.01)
        children = open(f'/proc/{nodes[1].pid}/task/{nodes[1].pid}/children').read().split()
        for pid in (nodes[1].pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        nodes[1].wait()
        time.sleep(rng.uniform(0, 5))
        nodes[1] = self._node(name, 1)
        try:
            statuses = [node.wait(300) for node in nodes]
        except subprocess.TimeoutExpired:
            self._kill(nodes)
            return 'WRONG: no end', what + said()[-3000:]
        if statuses != [0, 0] or 'Resumed from' not in said():
            self._kill(nodes)
            return f'WRONG: statuses {statuses}', what + said()[-3000:]
        for path in (self.folder / 'whole').glob('*.pth'):
            if not weights_equal(path, self.folder / name / path.name):
                return 'WRONG: other weights', what
        return 'nodes killed and back with the same weights', what

    def _kill(self, nodes):
        for node in nodes:
            if node.poll() is None:
                children = open(f'/proc/{node.pid}/task/{node.pid}/children').read().split()
                for pid in (node.pid, *map(int, children)):
                    os.kill(pid, signal.SIGKILL)

    def close(self):
        pass
