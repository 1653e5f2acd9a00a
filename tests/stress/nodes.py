"""Two torchrun agents act as two nodes. One is killed with all its processes and comes back.

The run ends with the weights of an uninterrupted run. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is
needed: without it the agents of PyTorch 2.15 time out while waiting for a node that comes back.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time

from tests.helpers import ROOT, start
from tests.stress.runs import FLAGS, draw_images, same_checkpoints, step_line


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        draw_images(folder)
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        nodes = [self._node('whole', k) for k in range(2)]
        assert [node.wait(900) for node in nodes] == [0, 0], self._logs('whole')

    def _logs(self, name):
        return ''.join((self.folder / f'{name}-{k}.log').read_text() for k in range(2))

    def _node(self, name, node):
        # Node 0 hosts the rendezvous, and is not the one that is killed.
        launcher = '--nnodes=2 --nproc_per_node=1 --max-restarts=3 --rdzv_backend=c10d'
        launcher += f' --rdzv_endpoint=127.0.0.1:{self.port} --rdzv_id={name}'
        launcher += f' --local_addr=127.0.0.1 --rdzv_conf=is_host={int(node == 0)}'
        flags = '--batch_size 2 --epochs 20 --num_workers 0 --save_every 4 --print_freq 1'
        flags = [*FLAGS, *flags.split(), '--log_dir', '']
        flags += ['--data_path', self.folder / 'data', '--output_dir', self.folder / name]
        command = [sys.executable, '-m', 'torch.distributed.run', *launcher.split()]
        return start(
            *command,
            ROOT / 'main_pretrain.py',
            *flags,
            log=self.folder / f'{name}-{node}.log',
            env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
        )

    def case(self, number):
        rng = random.Random(f'{self.seed} {number}')
        name = f'run{number}'
        nodes = [self._node(name, k) for k in range(2)]
        line = step_line(rng.randrange(7, 100))  # of 120
        description = f'killed after {line}'
        while line not in self._logs(name):
            if any(node.poll() is not None for node in nodes):
                self._kill(nodes)
                return 'WRONG: it ended before the kill', self._logs(name)[-3000:]
            time.sleep(0.01)
        self._kill(nodes[1:])
        nodes[1].wait()
        time.sleep(rng.uniform(0, 5))
        nodes[1] = self._node(name, 1)
        try:
            statuses = [node.wait(300) for node in nodes]
        except subprocess.TimeoutExpired:
            self._kill(nodes)
            return 'WRONG: still running', description + self._logs(name)[-3000:]
        if statuses != [0, 0] or 'Resumed from' not in self._logs(name):
            return f'WRONG: statuses {statuses}', description + self._logs(name)[-3000:]
        if not same_checkpoints(self.folder / 'whole', self.folder / name):
            return 'WRONG: other checkpoints', description
        return 'nodes killed and back with the same weights', description

    def _kill(self, nodes):
        for node in nodes:
            if node.poll() is None:
                children = open(f'/proc/{node.pid}/task/{node.pid}/children').read().split()
                for pid in (node.pid, *map(int, children)):
                    os.kill(pid, signal.SIGKILL)

    def close(self):
        pass
