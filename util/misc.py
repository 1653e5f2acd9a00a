"""What every script needs: processes, meters, loss scaling, errors for users. Names are those of MAE's util/misc.py."""

import builtins
import datetime
import os
import sys
import time
from collections import defaultdict, deque
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tqdm import tqdm

from util.checkpoint import load_model, save_model, save_on_master  # noqa: F401  (published under misc)
from util.errors import UserError

# ---- processes ----

def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def get_world_size():
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank():
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process():
    return get_rank() == 0


def setup_for_distributed(is_master):
    """Silence print on all processes but the first; print(..., force=True) speaks on any."""
    builtin_print = builtins.print

    def print_on_master(*args, force=False, **kwargs):
        if is_master or force:
            builtin_print(*args, **kwargs)

    builtins.print = print_on_master


def init_distributed_mode(args):
    """Join the processes of this job, if it has several.

    Reads what torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK or --local_rank), Open MPI (--dist_on_itp) or
    srun (SLURM_*) leave in the environment, and sets args.rank, args.world_size, args.local_rank, args.distributed. NCCL on
    CUDA, Gloo on the CPU.
    """
    env = os.environ
    if args.dist_on_itp:
        ranks = [env['OMPI_COMM_WORLD_RANK'], env['OMPI_COMM_WORLD_SIZE'], env['OMPI_COMM_WORLD_LOCAL_RANK']]
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    elif 'RANK' in env and 'WORLD_SIZE' in env:
        ranks = [env['RANK'], env['WORLD_SIZE'], env.get('LOCAL_RANK', args.local_rank)]
    elif int(env.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in env:
        ranks = [env['SLURM_PROCID'], env['SLURM_NTASKS'], env['SLURM_LOCALID']]
    else:
        ranks = [0, 1, 0]
    args.rank, args.world_size, args.local_rank = map(int, ranks)
    args.distributed = args.world_size > 1
    setup_for_distributed(args.rank == 0)
    if not args.distributed:
        return

    if args.device.startswith('cuda'):
        if args.local_rank >= torch.cuda.device_count():
            raise UserError(f'process {args.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; '
                            'start as many processes as there are GPUs (--nproc_per_node)')
        args.device = f'cuda:{args.local_rank}'
        torch.cuda.set_device(args.local_rank)
        dist.init_process_group('nccl', init_method=args.dist_url, world_size=args.world_size, rank=args.rank,
                                device_id=torch.device(args.device))
    else:
        dist.init_process_group('gloo', init_method=args.dist_url, world_size=args.world_size, rank=args.rank)


def all_reduce_mean(x):
    """Mean over the processes: a number gives a number, a tensor gives a tensor."""
    if not isinstance(x, torch.Tensor):
        device = 'cuda' if is_dist_avail_and_initialized() and dist.get_backend() == 'nccl' else 'cpu'
        return all_reduce_mean(torch.tensor(float(x), device=device)).item()
    if get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= get_world_size()
    return x


def no_sync(model, wanted=True):
    """Context in which a DDP model, if it is one, leaves its gradients unreduced: for all but the last of accumulated steps."""
    return model.no_sync() if wanted and hasattr(model, 'no_sync') else nullcontext()


# ---- precision ----

AMP_DTYPES = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def resolve_amp(amp, device):
    """--amp auto as one of fp32, bf16, fp16: bf16 on a GPU that has it, fp16 on an older one, fp32 on the CPU."""
    if amp != 'auto':
        return amp
    if torch.device(device).type != 'cuda':
        return 'fp32'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def autocast(device, amp):
    """The autocast context of a resolved precision; ``fp32`` is none at all."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)


class NativeScalerWithGradNormCount:
    """Backward pass and optimiser step, with loss scaling where the precision is fp16 and without elsewhere."""

    state_dict_key = 'amp_scaler'

    def __init__(self, enabled=True, device='cuda'):
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=enabled)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        """Backward; with ``update_grad`` also clip to ``clip_grad`` and step, and return the gradients' norm before clipping."""
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self._scaler.unscale_(optimizer)
        if clip_grad is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        else:
            norm = get_grad_norm_(parameters)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict):
        if self._scaler.is_enabled() and state_dict:  # a run in bf16 or fp32 leaves an empty state
            self._scaler.load_state_dict(state_dict)


def get_grad_norm_(parameters, norm_type=2.0):
    """Norm of all gradients together: a scalar tensor."""
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)


# ---- meters ----

class SmoothedValue:
    """A series of numbers: the last ones in a window, and the mean of all."""

    def __init__(self, window_size=20, fmt='{median:.4f} ({global_avg:.4f})'):
        self.deque = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

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
        on_terminal = is_main_process() and sys.stdout.isatty()
        bar = tqdm(total=total, desc=header, disable=not on_terminal, dynamic_ncols=True, file=sys.stdout,
                   bar_format='{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}')
        start = end = time.time()
        waited, steps = 0.0, 0  # since the last report
        for step, batch in enumerate(iterable, 1):
            waited += time.time() - end
            self.due = step % print_freq == 0 or step == total
            yield batch
            end = time.time()
            steps += 1
            bar.update()
            if self.due:
                seconds = (end - start) / steps
                left = datetime.timedelta(seconds=int(seconds * (total - step + steps_after)))
                rate = [f'images/s: {items_per_step / seconds:.1f}'] if items_per_step else []
                shown = self.delimiter.join(
                    [str(self), *rate, f'eta: {left}', f'data: {waited / (end - start):.0%}', f'mem: {peak_memory()}'])
                bar.set_postfix_str(shown)
                if not on_terminal:
                    print(f'{header} [{step:{len(str(total))}d}/{total}]', shown, sep=self.delimiter, flush=True)
                start, waited, steps = end, 0.0, 0
        bar.close()


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


# ---- scripts ----

def run(main, args):
    """``main(args)`` of a script; a UserError ends it with its one line on stderr and status 1."""
    try:
        main(args)
    except UserError as e:
        # Local rank 0 has the first word: what is wrong for all processes is then said once, since the launcher ends the others.
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.write(f'error: {e}\n')
        sys.stderr.flush()
        if is_dist_avail_and_initialized():
            os._exit(1)  # an orderly shutdown would wait for processes that may be stuck in a collective
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()
