"""The processes of a run: how they find each other, and what they say together."""

import builtins
import datetime
import os
import time
import uuid
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError, as_user_error


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def get_world_size():
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank():
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process():
    return get_rank() == 0


_builtin_print = builtins.print


def setup_for_distributed(is_master):
    """Silence print on all processes but the first; print(..., force=True) speaks on any."""
    def print_on_master(*args, force=False, **kwargs):
        if is_master or force:
            _builtin_print(*args, **kwargs)

    builtins.print = print_on_master


def init_distributed_mode(args):
    """Join the processes of this job, if it has several.

    Reads what torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK or --local_rank), Open MPI (--dist_on_itp) or
    srun (SLURM_*; beside them MASTER_ADDR and MASTER_PORT) leave in the environment, and sets args.rank, args.world_size,
    args.local_rank, args.gpu, args.distributed. NCCL on CUDA, Gloo on the CPU.

    Raises:
        UserError: something is missing in the environment, or the processes do not find each other.
    """
    where = 'the processes of this run did not find each other (start them with torchrun)'
    with as_user_error(where, KeyError, ValueError, RuntimeError):
        _join(args)


def _join(args):
    env = os.environ
    if args.dist_on_itp:
        ranks = [env['OMPI_COMM_WORLD_RANK'], env['OMPI_COMM_WORLD_SIZE'], env['OMPI_COMM_WORLD_LOCAL_RANK']]
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    elif 'RANK' in env and 'WORLD_SIZE' in env:
        ranks = [env['RANK'], env['WORLD_SIZE'], env.get('LOCAL_RANK', args.local_rank)]
    elif int(env.get('SLURM_NTASKS', 1)) > 1 and 'MASTER_ADDR' in env:  # without that it is an sbatch script's own process
        ranks = [env['SLURM_PROCID'], env['SLURM_NTASKS'], env['SLURM_LOCALID']]
    else:
        ranks = [0, 1, 0]
    args.rank, args.world_size, args.local_rank = map(int, ranks)
    args.gpu = args.local_rank
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
        backend = {'backend': 'nccl', 'device_id': torch.device(args.device)}
    else:
        backend = {'backend': 'gloo'}
    timeout = datetime.timedelta(minutes=args.dist_timeout)
    if int(env.get('TORCHELASTIC_MAX_RESTARTS', 0)) > 0:
        meeting = {'store': _store_of_this_start(args, timeout)}
    else:
        meeting = {'init_method': args.dist_url}
    dist.init_process_group(**backend, **meeting, world_size=args.world_size, rank=args.rank, timeout=timeout)


def _store_of_this_start(args, timeout):
    """The launcher's store under a prefix that only the processes of this start know.

    torchrun hands the same store to a group that it restarts, with the addresses in it of those who are dead. Each process
    therefore asks the first one, with a word that nobody used before, and takes the prefix from the answer to that word.
    """
    store, rank, world_size = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=timeout))
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def read(key):
        return store.get(key).decode() if store.check([key]) else ''

    if rank > 0:
        store.set(f'ask {rank}', word)
    waiting = set(range(1, world_size)) if rank == 0 else {rank}
    prefix = word
    while waiting:
        for other in list(waiting):
            if rank > 0 and read(f'answer {rank}').startswith(word):
                prefix = read(f'answer {rank}').removeprefix(word)
                store.set(f'seen {rank}', prefix)
                waiting.remove(rank)
            elif rank == 0:
                store.set(f'answer {other}', read(f'ask {other}') + word)
                waiting -= {other} if read(f'seen {other}') == word else set()
        if time.monotonic() > deadline:
            raise RuntimeError(f'no word from process {min(waiting) if rank == 0 else 0}')
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def distribute(args, model, device):
    """``model`` itself with one process; with many, DDP around it."""
    if not args.distributed:
        return model
    # Gradients live in the buckets that are reduced: one copy of them less in memory.
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True)


@contextmanager
def main_process_first():
    """Inside, the first process is done before the others begin."""
    if is_dist_avail_and_initialized() and not is_main_process():
        dist.barrier()
    try:
        yield
    finally:  # the others wait, and meet the same error themselves
        if is_dist_avail_and_initialized() and is_main_process():
            dist.barrier()


def missing_processes():
    """After a collective has timed out: which processes do not say so within a few seconds, in words; '' if that is unknown."""
    try:
        store = dist.distributed_c10d._get_default_store()  # where they found each other
        store.set(f'timed out {get_rank()}', '')
        time.sleep(5)
        missing = [rank for rank in range(get_world_size()) if not store.check([f'timed out {rank}'])]
    except RuntimeError:
        return ''
    return f'; nothing was heard of process {", ".join(map(str, missing))}' if missing else ''


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


def gather(value):
    """[value of the first process, of the second, ...] on all of them; a value is anything that can be pickled."""
    values = [None] * get_world_size()
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def no_sync(model, wanted=True):
    """Context in which a DDP model, if it is one, leaves its gradients unreduced: for all but the last of accumulated steps."""
    return model.no_sync() if wanted and hasattr(model, 'no_sync') else nullcontext()
