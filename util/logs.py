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

from util.distributed import all_reduce_mean, gather, get_world_size, is_main_process
from util.errors import UserError, as_user_error
from util.provenance import describe_start


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
        return self.total / self.count if self.count else math.nan

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

    def log_every(self, iterable, print_freq, header='', items_per_step=None, steps_after=0, first=0):
        """Yield from ``iterable``, whose length is known, and report after every ``print_freq``-th step and the last.

        Args:
            items_per_step: images in a step, all processes together; None: no rate is shown.
            steps_after: steps of the run that follow this loop, for the remaining time.
            first: steps that were done before and are not in ``iterable``, though in its length.
        """
        total = len(iterable)
        draw = is_main_process() and _has_room(sys.stdout)
        start = end = time.perf_counter()
        waited, steps = 0.0, 0  # since the last report
        with tqdm(total=total, initial=first, desc=header, disable=not draw, dynamic_ncols=True, file=sys.stdout,
                  bar_format='{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}') as bar:
            for step, batch in enumerate(iterable, first + 1):
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


REMEDY = 'the last checkpoint is good: resume from it with a lower --blr, or with --amp fp32'


class LossLog:
    """One epoch's steps and their losses, which stay on the device until a report is due: no step waits for one.

    Iterating gives (step, batch) and prints log lines. After each update ``interruption`` may save and end the run.

    Args:
        tag: the loss's name in TensorBoard.
        args: print_freq, batch_size, world_size, epochs, accum_iter, max_skipped_steps, output_dir.
        data_loader: begins with the batch of the step that ``interruption`` says.
        log_writer: SummaryWriter or None.
        interruption: util.interruption.Interruption or None.
    """

    def __init__(self, tag, args, epoch, data_loader, log_writer, interruption=None):
        self.tag, self.args, self.epoch, self.data_loader, self.log_writer = tag, args, epoch, data_loader, log_writer
        self.interruption = interruption
        self.first, sums = interruption.start_of(epoch) if interruption else (0, {})
        self.metrics = MetricLogger()
        self.metrics.add_meter('loss', SmoothedValue())
        self.metrics.add_meter('lr', SmoothedValue(window_size=1, fmt='{value:.2e}'))
        if is_main_process():  # they are those of all processes
            for name, (count, total) in sums.items():
                self.metrics.meters[name].count, self.metrics.meters[name].total = count, total
        self.unread = []

    def __iter__(self):
        args, steps = self.args, len(self.data_loader)
        batches = self.metrics.log_every(
            self.data_loader, args.print_freq, f'Epoch [{self.epoch}]', items_per_step=args.batch_size * args.world_size,
            steps_after=(args.epochs - self.epoch - 1) * steps, first=self.first)
        for step, batch in enumerate(batches, self.first):
            yield step, batch
            if self.interruption and (step + 1) % args.accum_iter == 0 and step + 1 < steps:
                self.interruption.after_step(self.epoch, step + 1, self.sums)

    def add(self, step, lr, loss, skipped, samples):
        """Keep what a step gave; read, check and log all that is kept where metrics.due says so.

        Args:
            skipped: the loss scaler's count of steps left out in a row.
            samples: [N] int64, the numbers of the images.

        Raises:
            UserError: too many steps in a row were left out. The last checkpoint is still good.
        """
        self.unread.append((step, lr, loss.detach(), skipped, samples))
        if self.metrics.due:
            self._read()

    def _read(self):
        if not self.unread:
            return
        losses, skipped = (torch.stack([kept[k] for kept in self.unread]).float() for k in (2, 3))
        own, mean, skipped = torch.stack([losses, all_reduce_mean(losses), skipped]).tolist()
        for i, (step, lr, *_) in enumerate(self.unread):
            update = (step + 1) % self.args.accum_iter == 0
            if update and skipped[i]:
                self._tell_of_skipped(i, int(skipped[i]), own)
            if not math.isfinite(mean[i]):
                continue
            self.metrics.update(loss=own[i], lr=lr)
            if self.log_writer is not None and update:
                # thousandths of an epoch on the x axis: curves of different batch sizes lie over each other
                epoch_1000x = int((self.epoch + step / len(self.data_loader)) * 1000)
                self.log_writer.add_scalar(self.tag, mean[i], epoch_1000x)
                self.log_writer.add_scalar('lr', lr, epoch_1000x)
        self.unread.clear()

    def _tell_of_skipped(self, i, in_a_row, losses):
        """Print and write down the step of self.unread[i], which all processes left out, and what its batch was."""
        step, lr = self.unread[i][:2]
        parts = [k for k in range(i + 1) if step - self.unread[k][0] < self.args.accum_iter]  # of one update
        mine = {'losses': [str(losses[k]) for k in parts], 'samples': [self.unread[k][4].tolist() for k in parts]}
        batches = gather(mine)
        what = f'epoch {self.epoch}, step {step}, learning rate {lr:.2e}'
        if is_main_process():
            tqdm.write(f'Step left out, its gradients are not finite: {what} ({in_a_row} in a row)', file=sys.stderr)
            if self.args.output_dir:
                note = {'epoch': self.epoch, 'step': step, 'lr': lr, 'in_a_row': in_a_row, 'processes': batches}
                append_line(os.path.join(self.args.output_dir, 'skipped_steps.txt'), json.dumps(note))
        if in_a_row > self.args.max_skipped_steps:
            raise UserError(f'{in_a_row} steps in a row had gradients that are not finite, the last in {what}; {REMEDY}')

    def sums(self):
        """{'loss': (count, total), 'lr': ...} of the steps so far on all processes; to be called by all of them."""
        self._read()
        self.metrics.synchronize_between_processes()
        sums = {name: (meter.count, meter.total) for name, meter in self.metrics.meters.items()}
        if not is_main_process():  # its part is with the first process now
            for meter in self.metrics.meters.values():
                meter.count, meter.total = 0, 0.0
        return sums

    def means(self):
        """{'loss': ..., 'lr': ...}: means over the epoch's steps and all processes, printed too.

        Raises UserError if there was not one good step.
        """
        self.metrics.synchronize_between_processes()
        if not self.metrics.loss.count:
            raise UserError(f'not one step of epoch {self.epoch} had gradients that are finite; {REMEDY}')
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


def open_log(args, epoch=0.0):
    """Create the output folders and note this start; the SummaryWriter of this run.

    It is None on all processes but the first and without args.log_dir. A resumed run that begins at ``epoch``, a float, goes on
    from there: what an earlier one wrote of later epochs is dropped from log.txt and hidden in TensorBoard.

    Raises UserError if something cannot be written.
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
    if args.output_dir:
        append_line(os.path.join(args.output_dir, 'starts.txt'), json.dumps(describe_start(args), default=str))
    if args.output_dir and args.resume:
        _forget_from(os.path.join(args.output_dir, 'log.txt'), int(epoch))
    purge = int(epoch * 1000) if args.resume else None
    return SummaryWriter(log_dir=args.log_dir, purge_step=purge) if args.log_dir else None


def write_whole(path, text):
    """The file has ``text`` or, if this is interrupted, what it had before."""
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.tmp', path)


def _forget_from(path, epoch):
    """Keep only the lines of log.txt about earlier epochs; the last may have been cut off when the run ended."""
    if not os.path.exists(path):
        return
    with as_user_error(f'{path} could not be read or written', OSError, ValueError, KeyError, TypeError):
        with open(path, encoding='utf-8') as f:
            kept = [line for line in f if line.endswith('\n') and json.loads(line)['epoch'] < epoch]
        write_whole(path, ''.join(kept))


def log_epoch(args, log_writer, stats):
    """A line of log.txt, by the first process; and the curves to disk."""
    if not is_main_process():
        return
    if log_writer is not None:
        log_writer.flush()
    if args.output_dir:
        append_line(os.path.join(args.output_dir, 'log.txt'), json.dumps(stats))


def append_line(path, line):
    with as_user_error(f'{path} could not be written', OSError), open(path, 'a', encoding='utf-8') as f:
        f.write(line + '\n')
