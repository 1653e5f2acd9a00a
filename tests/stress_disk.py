"""Writing a checkpoint fails at a byte: the earlier one stays as it was, the error is one line, nothing else is left.

A case is a byte, from the first to the last of a small checkpoint; the limit is the operating system's on the size of files.
"""

import argparse
import resource
import signal

import torch

from util import misc
from util.checkpoint import load
from util.errors import UserError


class Stress:
    def __init__(self, folder, seed):
        torch.manual_seed(seed)
        self.before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.folder = folder
        self.args = argparse.Namespace(output_dir=str(folder), save_every=1, epochs=100)
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.scaler = misc.NativeScalerWithGradNormCount(enabled=False, device='cpu')
        self._train_and_save(0)
        self.good = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(self.good) == {'checkpoint-0.pth', 'checkpoint-last.pth'}
        self.size = len(self.good['checkpoint-0.pth'])

    def _train_and_save(self, epoch):
        self.scaler(self.model(torch.ones(1, 2)).square().sum(), self.optimizer)
        misc.save_model(self.args, epoch, self.model, self.model, self.optimizer, self.scaler)

    def case(self, number):
        limit = number % self.size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.limits[1]))
        try:
            self._train_and_save(1)
            return 'WRONG: no error', f'byte {limit}'
        except UserError as e:
            if '\n' in str(e) or 'could not be written' not in str(e):
                return f'WRONG: {e}', f'byte {limit}'
        except Exception as e:
            return f'WRONG: {type(e).__name__}', f'byte {limit}: {e}'
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        if {path.name: path.read_bytes() for path in self.folder.iterdir()} != self.good:
            return 'WRONG: the earlier files are not as they were', f'byte {limit}'
        load(self.folder / 'checkpoint-last.pth')
        return 'failed writes with the earlier checkpoint whole', f'byte {limit}'

    def close(self):
        signal.signal(signal.SIGXFSZ, self.before)
