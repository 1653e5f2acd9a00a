"""What a run says of itself: log lines or a progress bar, TensorBoard's curves, log.txt."""

import datetime
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict, deque

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.distributed import all_reduce_mean, get_world_size, is_main_process
from util.errors import UserError, as_user_error


class SmoothedValue:
    """A series of numbers: the last ones in a window, and the mean of all."""

    def __init__(self, window_size=20, fmt=None):
        self.deque = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or '{median:.4f} ({global_avg:.4f})'

    def update(self, value, n=1):
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self):
        """Make total and count, and with them global_avg, those of all processes; the window stays this process's."""
        if get_world_size() > 1:
            device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
            both = torch.tensor([self.count, self.total], dtype=torch.float64, device=device)
            dist.all_reduce(both)
            self.count, self.total = int(both[0].item()), both[1].item()

    @property
    def median(self):
        return torch.tensor(list(self.deque)).median().item()

    @property
    def avg(self):
        return sum(self.deque) / max(len(self.deque), 1)

    @property
    def global_avg(self):
        return self.total / max(self.count, 1)

    @property
    def max(self):
        return max(self.deque)

    @property
    def value(self):
        return self.deque[-1]

    def __str__(self):
        if not self.deque:
            return 'n/a'
        return self.fmt.format(median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value)


class MetricLogger:
    """Named meters and the lines, or on a terminal the bar, that show them."""

    def __init__(self, delimiter='  '):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.due = False  # inside log_every's loop: whether a line follows this step

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def update(self, **values):
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(float(value))

    def __getattr__(self, name):
        if name in self.__dict__.get('meters', ()):
            return self.meters[name]
        raise AttributeError(f'MetricLogger has no meter {name}')

    def __str__(self):
        return self.delimiter.join(f'{name}: {meter}' for name, meter in self.meters.items())

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header='', items_per_step=None, steps_after=0):
        """Yield from ``iterable``, whose length is known, and report after every ``print_freq``-th step and the last.

        Args:
            items_per_step: images in a step, all processes together; None: no rate is shown.
            steps_after: steps of the run that follow this loop, for the remaining time.
        """
        total = len(iterable)
        draw = is_main_process() and _has_room(sys.stdout)
        start = end = time.perf_counter()
        waited, steps = 0.0, 0  # since the last report
        with tqdm(total=total, desc=header, disable=not draw, dynamic_ncols=True, file=sys.stdout,
                  bar_format='{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}') as bar:
            for step, batch in enumerate(iterable, 1):
                waited += time.perf_counter() - end
                self.due = step % print_freq == 0 or step == total
                yield batch
                end = time.perf_counter()
                steps += 1
                bar.update()
                if self.due:
                    seconds = (end - start) / steps
                    left = datetime.timedelta(seconds=int(seconds * (total - step + steps_after)))
                    rate = [f'images/s: {items_per_step / seconds:.1f}'] if items_per_step else []
                    meters = [str(self)] if self.meters else []
                    shown = self.delimiter.join(
                        [*meters, *rate, f'eta: {left}', f'data: {waited / (end - start):.0%}', f'mem: {peak_memory()}'])
                    bar.set_postfix_str(shown)
                    if not draw:
                        print(f'{header} [{step:{len(str(total))}d}/{total}]', shown, sep=self.delimiter, flush=True)
                    start, waited, steps = end, 0.0, 0


def _has_room(stream):
    """Whether this is a terminal on which the bar's text is not cut off."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns >= 130
    except (OSError, ValueError):
        return False


class LossLog:
    """One epoch's steps and their losses, which stay on the device until a report is due: no step waits for one.

    Iterating gives the loader's batches and prints log lines.

    Args:
        tag: the loss's name in TensorBoard.
        args: print_freq, batch_size, world_size, epochs, accum_iter.
        log_writer: SummaryWriter or None.
    """

    def __init__(self, tag, args, epoch, data_loader, log_writer):
        self.tag, self.args, self.epoch, self.data_loader, self.log_writer = tag, args, epoch, data_loader, log_writer
        self.metrics = MetricLogger()
        self.metrics.add_meter('loss', SmoothedValue())
        self.metrics.add_meter('lr', SmoothedValue(window_size=1, fmt='{value:.2e}'))
        self.unread = []

    def __iter__(self):
        args, steps = self.args, len(self.data_loader)
        return self.metrics.log_every(
            self.data_loader, args.print_freq, f'Epoch [{self.epoch}]', items_per_step=args.batch_size * args.world_size,
            steps_after=(args.epochs - self.epoch - 1) * steps)

    def add(self, step, lr, loss):
        """Keep the loss of a step; read, check and log all that are kept where metrics.due says so.

        Raises:
            UserError: a loss is not finite. Nothing is saved then, so the last checkpoint is still good.
        """
        self.unread.append((step, lr, loss.detach()))
        if not self.metrics.due:
            return
        losses = torch.stack([loss for _, _, loss in self.unread]).float()
        for (step, lr, _), loss, mean_loss in zip(self.unread, losses.tolist(), all_reduce_mean(losses).tolist()):
            if not math.isfinite(mean_loss):
                raise UserError(f'the loss is {mean_loss} in epoch {self.epoch}, step {step}, at learning rate {lr:.2e}; resume '
                                'from the last checkpoint with a lower --blr, or with --amp fp32')
            self.metrics.update(loss=loss, lr=lr)
            if self.log_writer is not None and (step + 1) % self.args.accum_iter == 0:
                # thousandths of an epoch on the x axis: curves of different batch sizes lie over each other
                epoch_1000x = int((self.epoch + step / len(self.data_loader)) * 1000)
                self.log_writer.add_scalar(self.tag, mean_loss, epoch_1000x)
                self.log_writer.add_scalar('lr', lr, epoch_1000x)
        self.unread.clear()

    def means(self):
        """{'loss': ..., 'lr': ...}: means over the epoch's steps and all processes, printed too."""
        self.metrics.synchronize_between_processes()
        print(f'Epoch [{self.epoch}] mean  {self.metrics}')
        return {name: meter.global_avg for name, meter in self.metrics.meters.items()}


def peak_memory():
    """Most memory used so far as text: of the GPU on CUDA, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GB'
    try:
        import resource  # not on Windows
    except ImportError:
        return 'n/a'
    unit = 1 if sys.platform == 'darwin' else 1024
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GB'


def open_log(args):
    """Create the output folders; the SummaryWriter of this run, None on all processes but the first and without args.log_dir.

    Raises UserError if they cannot be written to.
    """
    if not is_main_process():
        return None
    for flag in ('output_dir', 'log_dir'):
        folder = getattr(args, flag)
        try:
            if folder:
                os.makedirs(folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as e:
            raise UserError(f'--{flag} {folder} cannot be written to: {e.strerror}') from e
    return SummaryWriter(log_dir=args.log_dir) if args.log_dir else None


def log_epoch(args, log_writer, stats):
    """A line of log.txt, by the first process; and the curves to disk."""
    if not is_main_process():
        return
    if log_writer is not None:
        log_writer.flush()
    if args.output_dir:
        path = os.path.join(args.output_dir, 'log.txt')
        with as_user_error(f'{path} could not be written', OSError), open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(stats) + '\n')
