"""Process group: setup, and the few collectives that a run needs."""

import builtins
import datetime
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError, as_user_error


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


_print = builtins.print


def setup_for_distributed(is_master: bool) -> None:
    """Silence print() on all ranks but 0. ``print(..., force=True)`` prints on any rank."""

    def print_on_master(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            _print(*args, **kwargs)

    builtins.print = print_on_master


def init_distributed_mode(
    device: torch.device,
    local_rank: int = -1,
    dist_on_itp: bool = False,
    dist_url: str = 'env://',
    dist_timeout: float = 30.0,
) -> tuple[int, int, torch.device]:
    """Join the process group of this job, if it has several processes.

    Ranks come from the environment: torchrun and torch.distributed.launch (RANK, WORLD_SIZE,
    LOCAL_RANK), Open MPI (with ``dist_on_itp``), or srun (SLURM_* plus MASTER_ADDR and
    MASTER_PORT). The backend is NCCL on CUDA and Gloo on the CPU.

    Args:
        device: the device that was asked for. On CUDA each process gets the GPU of its local
            rank.
        local_rank: --local_rank, as older launchers pass it.
        dist_on_itp: the job was started by Open MPI.
        dist_url: how the processes find each other.
        dist_timeout: minutes until a collective times out.

    Returns:
        rank, world size, and the device of this process.

    Raises:
        UserError: if the environment is incomplete, a GPU is missing, or the rendezvous fails.
    """
    context = 'the processes of this run could not connect (start them with torchrun)'
    with as_user_error(context, KeyError, ValueError, RuntimeError):
        env = os.environ
        if dist_on_itp:
            names = 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'
            ranks = [env[name] for name in names]
            dist_url = f'tcp://{env["MASTER_ADDR"]}:{env["MASTER_PORT"]}'
        elif 'RANK' in env and 'WORLD_SIZE' in env:
            ranks = [env['RANK'], env['WORLD_SIZE'], env.get('LOCAL_RANK', local_rank)]
        elif int(env.get('SLURM_NTASKS', 1)) > 1 and 'MASTER_ADDR' in env:
            # without MASTER_ADDR this is the batch script's own process, not one of srun's
            ranks = [env['SLURM_PROCID'], env['SLURM_NTASKS'], env['SLURM_LOCALID']]
        else:
            ranks = [0, 1, 0]
        rank, world_size, local_rank = map(int, ranks)
        setup_for_distributed(rank == 0)
        if world_size == 1:
            return rank, world_size, device

        backend: dict[str, Any] = {'backend': 'gloo'}
        if device.type == 'cuda':
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f'local rank {local_rank} has no GPU (found {torch.cuda.device_count()}); '
                    'start one process per GPU with --nproc_per_node'
                )
            device = torch.device('cuda', local_rank)
            torch.cuda.set_device(device)
            backend = {'backend': 'nccl', 'device_id': device}
        timeout = datetime.timedelta(minutes=dist_timeout)
        store, *_ = next(dist.rendezvous(dist_url, rank, world_size, timeout=timeout))
        if env.get('GROUP_WORLD_SIZE') == '1':
            # torchrun may hand the store of the dead processes, with their addresses, to those
            # that it restarts. With several nodes the restart counts of the agents differ;
            # docs/clusters.md explains how to get a new store there.
            store = dist.PrefixStore(f'restart {env.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(
            **backend, store=store, world_size=world_size, rank=rank, timeout=timeout
        )
        return rank, world_size, device


def shut_down() -> None:
    """Wait for all ranks, then leave the process group."""
    if is_dist_avail_and_initialized():
        dist.barrier()  # rank 0 may still write files, and a rank may be in a collective
        dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap ``model`` in DDP if there is more than one process."""
    if get_world_size() == 1:
        return model
    # Gradients live in the communication buckets: one copy less in memory.
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == 'cuda' else None,
        gradient_as_bucket_view=True,
    )


def no_sync(model: nn.Module, wanted: bool = True) -> AbstractContextManager:
    """Return a context in which DDP does not reduce gradients: accumulation before an update."""
    return model.no_sync() if wanted and hasattr(model, 'no_sync') else nullcontext()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let rank 0 finish the block before the other ranks enter it."""
    if not is_main_process():
        dist.barrier()
    try:
        yield
    finally:  # if rank 0 fails, the others continue and meet the same error
        if get_world_size() > 1 and is_main_process():
            dist.barrier()


def _collective_device() -> str:
    return 'cuda' if get_world_size() > 1 and dist.get_backend() == 'nccl' else 'cpu'


def all_reduce_mean(x: float | torch.Tensor) -> float | torch.Tensor:
    """Return the mean over ranks: a float for a number, a tensor for a tensor."""
    if not isinstance(x, torch.Tensor):
        return all_reduce_mean(torch.tensor(float(x), device=_collective_device())).item()
    if get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= get_world_size()
    return x


def all_reduce_sum(values: list[float]) -> list[float]:
    """Return the sums over ranks, in float64."""
    if get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank. Values are pickled."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def describe_missing_ranks() -> str:
    """Describe the ranks that do not respond within 5 s after a collective timed out, or ''."""
    try:
        # the store of the rendezvous; private, tried with PyTorch 2.6 to 2.15
        store = dist.distributed_c10d._get_default_store()
        store.set(f'timed out {get_rank()}', '')
        time.sleep(5)
        ranks = range(get_world_size())
        missing = [str(r) for r in ranks if not store.check([f'timed out {r}'])]
    except RuntimeError:
        return ''
    return f' (no response from rank {", ".join(missing)})' if missing else ''
