"""Logging: console lines or a progress bar, TensorBoard curves, log.txt."""

import contextlib
import datetime
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.distributed import all_reduce_mean, all_reduce_sum, is_main_process
from util.errors import UserError, as_user_error
from util.files import append_line, atomic_write_text
from util.run_info import describe_start


class SmoothedValue:
    """Series of numbers. median, avg and max are those of a window, global_avg is that of all."""

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.deque = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or '{median:.4f} ({global_avg:.4f})'

    def update(self, value: float, n: int = 1) -> None:
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self) -> None:
        """Sum ``total`` and ``count`` over ranks. The window stays that of this rank."""
        count, self.total = all_reduce_sum([self.count, self.total])
        self.count = int(count)

    @property
    def median(self) -> float:
        return torch.tensor(list(self.deque)).median().item()

    @property
    def avg(self) -> float:
        return sum(self.deque) / max(len(self.deque), 1)

    @property
    def global_avg(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        return max(self.deque)

    @property
    def value(self) -> float:
        return self.deque[-1]

    def __str__(self) -> str:
        if not self.deque:
            return 'n/a'
        names = 'median', 'avg', 'global_avg', 'max', 'value'
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Named meters, and the lines or the progress bar that show them."""

    def __init__(self, delimiter: str = '  ') -> None:
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.due = False  # inside log_every: whether a line follows this step

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(float(value))

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get('meters', ()):
            return self.meters[name]
        raise AttributeError(f'MetricLogger has no meter {name}')

    def __str__(self) -> str:
        return self.delimiter.join(f'{name}: {meter}' for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(
        self,
        iterable: Iterable,
        print_freq: int,
        header: str = '',
        items_per_step: int | None = None,
        steps_after: int = 0,
        start_step: int = 0,
    ) -> Iterator:
        """Yield from ``iterable`` and print a line every ``print_freq`` steps and at the end.

        Args:
            iterable: has a length, which includes the first ``start_step`` steps.
            print_freq: steps between two lines.
            header: the beginning of every line.
            items_per_step: images per step on all ranks, for the rate. None: no rate.
            steps_after: steps of the run after this loop, for the remaining time.
            start_step: steps that an earlier run has done; ``iterable`` starts after them.
        """
        total = len(iterable)
        draw = False
        with contextlib.suppress(OSError, ValueError):  # stdout may only claim to be a terminal
            if is_main_process() and sys.stdout.isatty():  # narrow ones would cut the bar off
                draw = os.get_terminal_size(sys.stdout.fileno()).columns >= 130
        start = end = time.perf_counter()
        waited, steps = 0.0, 0  # since the last line
        bar_format = '{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}'
        with tqdm(
            total=total,
            initial=start_step,
            desc=header,
            disable=not draw,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar_format,
        ) as bar:
            for step, batch in enumerate(iterable, start_step + 1):
                waited += time.perf_counter() - end
                self.due = step % print_freq == 0 or step == total
                yield batch
                end = time.perf_counter()
                steps += 1
                bar.update()
                if not self.due:
                    continue
                seconds = (end - start) / steps
                left = int(seconds * (total - step + steps_after))
                parts = [str(self)] if self.meters else []
                if items_per_step:
                    parts.append(f'images/s: {items_per_step / seconds:.1f}')
                parts.append(f'eta: {datetime.timedelta(seconds=left)}')
                parts.append(f'data: {waited / (end - start):.0%}')
                parts.append(f'mem: {peak_memory()}')
                bar.set_postfix_str(self.delimiter.join(parts))
                if not draw:
                    counter = f'[{step:{len(str(total))}d}/{total}]'
                    print(f'{header} {counter}', *parts, sep=self.delimiter, flush=True)
                start, waited, steps = end, 0.0, 0


@dataclass
class Record:
    """Results of one iteration, on the host."""

    step: int
    lr: float
    loss: float  # of this rank
    mean_loss: float  # over ranks
    skipped: int  # steps skipped in a row, this one included
    sample_ids: torch.Tensor


class EpochLog:
    """Log of one training epoch: console lines, TensorBoard curves, means.

    Losses stay on the device until a line is due, so that no step waits for the device.

    Args:
        tag: name of the loss in TensorBoard.
        epoch, epochs: this epoch, and the number of epochs of the run.
        steps: iterations per epoch.
        log_writer: SummaryWriter, or None.
        print_freq: iterations between two lines, rounded up to whole updates.
        accum_iter: iterations per update. Curves have one point per update.
        images_per_step: images per iteration on all ranks.
        start_step: iterations of this epoch that an earlier run has done.
        sums: the result of ``sums`` after these.
    """

    def __init__(
        self,
        tag: str,
        epoch: int,
        epochs: int,
        steps: int,
        log_writer: SummaryWriter | None = None,
        print_freq: int = 20,
        accum_iter: int = 1,
        images_per_step: int | None = None,
        start_step: int = 0,
        sums: dict[str, tuple[int, float]] | None = None,
    ) -> None:
        self.tag, self.epoch, self.epochs, self.steps = tag, epoch, epochs, steps
        self.log_writer, self.accum_iter = log_writer, accum_iter
        # A line follows a whole update, so that a skipped update is reported with all its batches.
        self.print_freq = math.ceil(print_freq / accum_iter) * accum_iter
        self.images_per_step, self.start_step = images_per_step, start_step
        self.metrics = MetricLogger()
        self.metrics.add_meter('loss', SmoothedValue())
        self.metrics.add_meter('lr', SmoothedValue(window_size=1, fmt='{value:.2e}'))
        if is_main_process():  # the sums are those of all ranks
            for name, (count, total) in (sums or {}).items():
                self.metrics.meters[name].count, self.metrics.meters[name].total = count, total
        self.buffer = []

    def every(self, data_loader: Iterable) -> Iterator:
        return self.metrics.log_every(
            data_loader,
            self.print_freq,
            f'Epoch [{self.epoch}]',
            items_per_step=self.images_per_step,
            steps_after=(self.epochs - self.epoch - 1) * self.steps,
            start_step=self.start_step,
        )

    def update(
        self,
        step: int,
        lr: float,
        loss: torch.Tensor,
        skipped: torch.Tensor,
        sample_ids: torch.Tensor,
    ) -> list[Record]:
        """Add an iteration.

        Args:
            step: its index in the epoch.
            lr: learning rate.
            loss: scalar on the device, of this rank.
            skipped: NativeScalerWithGradNormCount.skipped.
            sample_ids: [N] int64, indices of the images.

        Returns:
            The records since the last line if a line is due, else an empty list.
        """
        self.buffer.append((step, lr, loss.detach(), skipped, sample_ids))
        return self.flush() if self.metrics.due else []

    def flush(self) -> list[Record]:
        """Read the buffer from the device, the only wait for it; log it and return it."""
        if not self.buffer:
            return []
        steps, lrs, losses, skipped, ids = zip(*self.buffer)
        self.buffer = []
        losses, skipped = torch.stack(losses).float(), torch.stack(skipped).float()
        values = torch.stack([losses, all_reduce_mean(losses), skipped]).tolist()
        records = [
            Record(step, lr, own, mean, int(in_a_row), samples)
            for step, lr, own, mean, in_a_row, samples in zip(steps, lrs, *values, ids)
        ]
        for r in records:
            if not math.isfinite(r.mean_loss):
                continue
            self.metrics.update(loss=r.loss, lr=r.lr)
            if self.log_writer is not None and (r.step + 1) % self.accum_iter == 0:
                # The x axis is in 1/1000 of an epoch: curves of different batch sizes align.
                epoch_1000x = int((self.epoch + r.step / self.steps) * 1000)
                self.log_writer.add_scalar(self.tag, r.mean_loss, epoch_1000x)
                self.log_writer.add_scalar('lr', r.lr, epoch_1000x)
        return records

    def sums(self) -> dict[str, tuple[int, float]]:
        """Return {'loss': (count, total), 'lr': ...} over all ranks. All ranks must call it."""
        self.flush()
        self.metrics.synchronize_between_processes()
        sums = {name: (meter.count, meter.total) for name, meter in self.metrics.meters.items()}
        if not is_main_process():  # counted on rank 0 from here on
            for meter in self.metrics.meters.values():
                meter.count, meter.total = 0, 0.0
        return sums

    def means(self) -> dict[str, float]:
        """Print and return {'loss': ..., 'lr': ...}: means over steps and ranks.

        Raises:
            UserError: if no loss was finite.
        """
        self.flush()
        self.metrics.synchronize_between_processes()
        if not self.metrics.loss.count:
            raise UserError(
                f'all steps of epoch {self.epoch} had NaN or Inf losses; resume from the last '
                'checkpoint with a lower --blr, or with --amp fp32'
            )
        print(f'Epoch [{self.epoch}] mean  {self.metrics}')
        return {name: meter.global_avg for name, meter in self.metrics.meters.items()}


def peak_memory() -> str:
    """Return the peak memory as text: of the GPU on CUDA, otherwise of this process."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f'{peak / 2**30:.1f} GB'


# ---- files ----


def open_log(
    output_dir: str, log_dir: str, flags: dict[str, Any], resumed_at: float | None = None
) -> SummaryWriter | None:
    """Create the output folders, note this start in starts.txt, open TensorBoard's events.

    Args:
        output_dir: folder of checkpoints, log.txt and starts.txt, or ''.
        log_dir: folder of TensorBoard's events, or ''.
        flags: all flags with their resolved values.
        resumed_at: fractional epoch at which a resumed run begins. What an earlier run wrote
            about later epochs is dropped from log.txt and hidden in TensorBoard. None: a new
            run.

    Returns:
        The SummaryWriter. None on all ranks but 0, and without ``log_dir``.

    Raises:
        UserError: if a folder cannot be written to.
    """
    if not is_main_process():
        return None
    for flag, folder in (('--output_dir', output_dir), ('--log_dir', log_dir)):
        if folder:
            check_writable(flag, folder)
    if output_dir:
        start = json.dumps(describe_start(flags), default=str)
        append_line(os.path.join(output_dir, 'starts.txt'), start)
        if resumed_at is not None:
            _drop_epochs_from(os.path.join(output_dir, 'log.txt'), int(resumed_at))
    if not log_dir:
        return None
    purge_step = None if resumed_at is None else int(resumed_at * 1000)
    return SummaryWriter(log_dir=log_dir, purge_step=purge_step)


def check_writable(flag: str, folder: str) -> None:
    """Create a folder if necessary. Raises UserError if it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f'{flag} {folder} cannot be written to: {e.strerror}') from e


# Keep the lines of log.txt about earlier epochs. A kill may have truncated the last one.
def _drop_epochs_from(path, epoch):
    if not os.path.exists(path):
        return
    with as_user_error(f'{path} could not be read', OSError, ValueError, KeyError, TypeError):
        with open(path, encoding='utf-8') as f:
            kept = [line for line in f if line.endswith('\n') and json.loads(line)['epoch'] < epoch]
    atomic_write_text(path, ''.join(kept))


def log_epoch(log_writer: SummaryWriter | None, output_dir: str, stats: dict[str, Any]) -> None:
    """Append a line to log.txt and write the curves to disk, on rank 0."""
    if not is_main_process():
        return
    if log_writer is not None:
        log_writer.flush()
    if output_dir:
        append_line(os.path.join(output_dir, 'log.txt'), json.dumps(stats))
