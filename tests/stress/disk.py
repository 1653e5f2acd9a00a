"""Stress kind "disk": writing a checkpoint fails at a certain byte, as on a full disk.

The earlier checkpoint stays as it was, the error is one line, and no other file is left. A case
is a byte, from the first to the last of a small checkpoint. The operating system's limit on the
size of files makes the write fail.
"""

import resource
import signal

import torch

from util.amp import NativeScalerWithGradNormCount
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import load
from util.errors import UserError


class Stress:
    """Cases of this kind; see KINDS in __main__.py."""

    def __init__(self, folder, seed):
        torch.manual_seed(seed)
        self.before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.folder = folder
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.scaler = NativeScalerWithGradNormCount(enabled=False, device='cpu')
        self.checkpointer = Checkpointer(
            self.model,
            self.optimizer,
            self.scaler,
            str(folder),
            flags={'output_dir': str(folder)},
            epochs=100,
            save_every=1,
        )
        self._train_and_save(0)
        self.good = self._files()
        assert set(self.good) == {'checkpoint-0.pth', 'checkpoint-last.pth'}
        self.size = len(self.good['checkpoint-0.pth'])

    def _train_and_save(self, epoch):
        self.scaler(self.model(torch.ones(1, 2)).square().sum(), self.optimizer)
        self.checkpointer.save(epoch)

    def _files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def case(self, number):
        limit = number % self.size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.limits[1]))
        try:
            self._train_and_save(1)
            return 'WRONG: no error', f'byte {limit}'
        except UserError as e:
            if not str(e).isprintable() or 'checkpoint-last.pth' not in str(e):
                return f'WRONG: {e}', f'byte {limit}'
        except Exception as e:
            return f'WRONG: {type(e).__name__}', f'byte {limit}: {e}'
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        if self._files() != self.good:
            return 'WRONG: the earlier files are not as they were', f'byte {limit}'
        load(self.folder / 'checkpoint-last.pth')
        return 'failed writes with the earlier checkpoint intact', f'byte {limit}'

    def close(self):
        signal.signal(signal.SIGXFSZ, self.before)
