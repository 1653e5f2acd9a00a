"""Saving inside an epoch: by the clock, or because the cluster wants the machine back, which also ends the run."""

import datetime
import signal
import threading
import time

import torch
import torch.distributed as dist

from util.distributed import get_rank, get_world_size

STATUS = 75  # EX_TEMPFAIL of sysexits.h: come again
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]


class Interrupted(Exception):
    """The run was asked to end and has saved where it was, if it saves at all; scripts then end with STATUS."""


class Interruption:
    """Watches for SIGTERM, SIGUSR1 and the clock between steps, and saves on all processes together.

    Args:
        args: save_minutes, output_dir, dist_timeout, batch_size, world_size.
        save: called by all processes as save(epoch, step=..., sums=..., step_images=...): ``step`` steps of ``epoch`` are done,
            of ``step_images`` images each, and ``sums`` are its log's so far.
        steps: of an epoch.
        resumed: the checkpoint that this run goes on from, with those three in it if it was saved inside an epoch.
    """

    def __init__(self, args, save, steps, resumed=None):
        resumed = resumed or {}
        self.step_images = args.batch_size * args.world_size
        self.epoch = args.start_epoch
        step = int(resumed.get('step', 0)) * int(resumed.get('step_images', self.step_images)) // self.step_images
        self.step = step - step % args.accum_iter  # where other numbers of processes or images had come to
        self.sums = resumed.get('sums', {})
        if self.step >= steps:  # the data are others: the epoch begins anew
            self.step, self.sums = 0, {}
        self.save, self.minutes, self.saves = save, args.save_minutes, bool(args.output_dir)
        self.saved = time.monotonic()
        self.signal = self.pending = self.group = None
        if get_world_size() > 1:
            self.group = dist.new_group(backend='gloo', timeout=datetime.timedelta(minutes=args.dist_timeout))
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = self.signal or number

    def start_of(self, epoch):
        """(steps of this epoch that are done already, the log's sums over them)."""
        return (self.step, self.sums) if epoch == self.epoch else (0, {})

    def after_step(self, epoch, step, sums):
        """To be called by all processes after each update: ``step`` steps are done, and sums() gives their log's sums.

        Raises:
            Interrupted: after saving, if any process has been sent a signal.
        """
        due, stop = self._agree()
        if due or stop:
            self.save(epoch, step=step, sums=sums(), step_images=self.step_images)
            self.saved = time.monotonic()
        if stop:
            self._end(f'epoch {epoch}, step {step}')

    def after_epoch(self, epoch):
        """To be called by all processes when the epoch is saved; raises Interrupted as after_step does."""
        self.saved = time.monotonic()
        self._agree()
        if self._agree()[1]:  # the second time it is what was said the first time, just now
            self._end(f'epoch {epoch}')

    def _agree(self):
        """[save, stop] as bools, the same on all processes: as of the step before, so that nobody waits for the others here."""
        clock = self.minutes is not None and get_rank() == 0 and time.monotonic() - self.saved > 60 * self.minutes
        mine = torch.tensor([bool(clock), self.signal is not None], dtype=torch.int32)
        if not self.group:
            return mine.bool().tolist()
        before, self.pending = self.pending, (dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.group, async_op=True), mine)
        if before is None:
            return [False, False]
        before[0].wait()
        return before[1].bool().tolist()

    def _end(self, where):
        if self.group:
            self.pending[0].wait()
            dist.barrier(self.group)  # a process that ends makes the launcher end the others, and the first may still write
        name = signal.Signals(self.signal).name if self.signal else 'a signal to another process'
        what = 'go on with --resume auto' if self.saves else 'nothing is saved without --output_dir'
        raise Interrupted(f'Stopped by {name} after {where}; {what}')


def ignore_signals():
    """For loader workers, which get the signals too where a cluster sends them to all processes of a job."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restore_signals():
    if threading.current_thread() is not threading.main_thread():  # Python would not have let it set them
        return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
