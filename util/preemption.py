"""Checkpoints within an epoch: by the clock, or on SIGTERM and SIGUSR1, which also end the run.

The scripts create a Preemption after they have resumed; before that a signal ends them at once.
The engines ask it after every update. On a signal all ranks save checkpoint-last.pth together
and raise Preempted, which util.cli.run turns into exit status 75.
"""

import signal
import time

from util.checkpoints.checkpointer import Checkpointer
from util.distributed import all_reduce_sum, get_world_size
from util.logs import EpochLog
from util.signals import SIGNALS

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(Exception):
    """The run was asked to end."""


class Preemption:
    """Watch for signals and the clock between steps. All ranks save and end together.

    With one process a signal takes effect after the current update. Several processes have to
    agree, which they do whenever a log line is due.

    Args:
        checkpointer: saves the run.
        save_minutes: minutes between two checkpoints within an epoch. None: none.
    """

    def __init__(self, checkpointer: Checkpointer, save_minutes: float | None = None) -> None:
        self.checkpointer, self.save_minutes = checkpointer, save_minutes
        self.last_save = time.monotonic()
        self.signal, self.stops = None, 0.0
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.signal = self.signal or number

    def is_due(self, step: int, log: EpochLog) -> bool:
        """Return whether to save now. All ranks call this after every update, and agree.

        Args:
            step: the number of iterations of the epoch that are done.
            log: the epoch's log.
        """
        if step >= log.steps:
            return False  # the epoch is complete: the script saves it and calls after_epoch
        if get_world_size() > 1 and not log.metrics.due:
            return False
        timed = self.save_minutes is not None and (
            time.monotonic() - self.last_save > 60 * self.save_minutes
        )
        saves, self.stops = all_reduce_sum([float(timed), float(self.signal is not None)])
        return saves + self.stops > 0  # on any rank

    def save(self, step: int, log: EpochLog) -> None:
        """Save within the epoch, after ``is_due``. All ranks call this.

        Raises:
            Preempted: if any rank has received a signal.
        """
        self.checkpointer.save(log.epoch, step=step, sums=log.sums())
        self.last_save = time.monotonic()
        if self.stops:
            self._stop(f'epoch {log.epoch}, step {step}')

    def after_epoch(self, epoch: int) -> None:
        """Raise Preempted if any rank has received a signal. Call after the epoch is saved.

        A signal in the last epoch does not count: the run is complete.
        """
        self.last_save = time.monotonic()
        stops = all_reduce_sum([float(self.signal is not None)])[0]  # on any rank
        if stops and epoch + 1 < self.checkpointer.epochs:
            self._stop(f'epoch {epoch}')

    def _stop(self, where):
        name = signal.Signals(self.signal).name if self.signal else 'a signal to another process'
        hint = 'nothing was saved: --output_dir is empty'
        if self.checkpointer.output_dir:
            hint = 'resume with --resume auto'
        raise Preempted(f'Stopped by {name} after {where}; {hint}')
