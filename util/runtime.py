"""Runtime of a script: device, processes, precision, learning rate."""

import argparse
import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import timm.layers
import torch

from util.amp import resolve_amp
from util.distributed import init_distributed_mode
from util.errors import UserError
from util.lr_sched import absolute_lr
from util.memory import keep_freed_memory
from util.resume import find_resume
from util.run_info import available_cores


@dataclass(frozen=True)
class Runtime:
    """What a script has resolved from its flags and the machine.

    Attributes:
        device: of this process.
        amp: 'fp32', 'bf16' or 'fp16'.
        compile: whether to use torch.compile.
        rank, world_size: of this process, and the number of processes.
        num_workers: data-loader workers per process.
        pin_mem: whether the loader uses page-locked memory.
        effective_batch: images per update on all ranks. This and the following are set only
            in training scripts.
        lr: peak learning rate.
        resume: the checkpoint to continue from, or ''.
        flags: all flags with these values, as stored in checkpoints and starts.txt.
    """

    device: torch.device
    amp: str
    compile: bool
    rank: int
    world_size: int
    num_workers: int
    pin_mem: bool
    effective_batch: int = 1
    lr: float = 0.0
    resume: str = ''
    flags: dict[str, Any] | None = None


def setup(args: argparse.Namespace, *, blr: float | None = None, training: bool = True) -> Runtime:
    """Set up a training script, and print the summary.

    Args:
        args: the flags of util.arguments.add_common_arguments.
        blr: base learning rate instead of args.blr, for scripts with several.
        training: print the effective batch and the learning rate.

    Raises:
        UserError: if the device is missing, the processes cannot connect, or --resume auto has
            no folder to look in.
    """
    run = start_runtime(
        device=args.device,
        amp=args.amp,
        compile=args.compile,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_mem=args.pin_mem,
        local_rank=args.local_rank,
        dist_on_itp=args.dist_on_itp,
        dist_url=args.dist_url,
        dist_timeout=args.dist_timeout,
    )
    batch = args.batch_size * args.accum_iter * run.world_size
    blr = args.blr if blr is None else blr
    lr = absolute_lr(blr, batch) if args.lr is None else args.lr
    resolved = {
        'effective_batch': batch,
        'lr': lr,
        'resume': find_resume(args.resume, args.output_dir),
    }
    if training:
        describe_batch(args.batch_size, args.accum_iter, run.world_size, lr)
        if args.warmup_epochs >= args.epochs:
            print(
                f'Note: --warmup_epochs {args.warmup_epochs} is not shorter than the run; the '
                f'learning rate stays below {lr:.3g}'
            )
    flags = {**vars(args), **vars(run), **resolved, 'device': str(run.device)}
    del flags['flags']
    return replace(run, **resolved, flags=flags)


def describe_batch(batch_size: int, accum_iter: int, world_size: int, lr: float) -> None:
    """Print the effective batch and the learning rate."""
    batch = batch_size * accum_iter * world_size
    print(
        f'effective batch {batch} = {batch_size} x accum_iter {accum_iter} x {world_size}, '
        f'lr {lr:.3g} (blr {lr * 256 / batch:.3g})'
    )


def start_runtime(
    *,
    device: str | None = None,
    amp: str = 'auto',
    compile: str = 'off',
    seed: int = 0,
    num_workers: int = 0,
    pin_mem: bool = True,
    local_rank: int = -1,
    dist_on_itp: bool = False,
    dist_url: str = 'env://',
    dist_timeout: float = 30.0,
) -> Runtime:
    """Choose the device, join the other processes, resolve the precision.

    The arguments are the flags of the same names. Tools call this; scripts call ``setup``.

    Raises:
        UserError: if the device is missing or the processes cannot connect.
    """
    rank, world_size, device = init_distributed_mode(
        choose_device(device), local_rank, dist_on_itp, dist_url, dist_timeout
    )
    torch.manual_seed(seed)  # our draws do not use it (util/seeding.py), but a fork's may
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu':
        keep_freed_memory()
    amp = resolve_amp(amp, device)
    # In bf16 on a CPU, the backward pass of PyTorch's fused attention is slower than the plain
    # formula.
    timm.layers.set_fused_attn(device.type != 'cpu' or amp == 'fp32')
    run = Runtime(
        device=device,
        amp=amp,
        compile=resolve_compile(compile, device),
        rank=rank,
        world_size=world_size,
        num_workers=min(num_workers, available_cores()),
        pin_mem=pin_mem and device.type == 'cuda',
    )
    print(
        f'{world_size} process(es) on {device.type}, {run.amp}{", compiled" * run.compile}, '
        f'{run.num_workers} loader workers each'
    )
    return run


def choose_device(device: str | None) -> torch.device:
    """Resolve --device. None: CUDA if PyTorch finds a GPU, otherwise the CPU.

    Raises:
        UserError: if it is not a CUDA device or the CPU, or there is no GPU.
    """
    has_cuda = torch.cuda.is_available()
    if device is None:
        if not has_cuda and int(os.environ.get('RANK', 0)) == 0:
            print('No CUDA GPU found: running on the CPU', file=sys.stderr)
        return torch.device('cuda' if has_cuda else 'cpu')
    if not re.fullmatch(r'(cpu|cuda)(:\d+)?', device):
        raise UserError(f'--device {device}: use cuda or cpu')
    if device.startswith('cuda') and not has_cuda:
        raise UserError(f'--device {device}: PyTorch finds no CUDA GPU here; use --device cpu')
    return torch.device(device)


def resolve_compile(choice: str, device: str | torch.device) -> bool:
    """Resolve --compile. auto: on a GPU, with a fallback to eager; off on a CPU.

    On a CPU compilation gives no speedup.
    """
    if choice == 'auto' and torch.device(device).type == 'cuda':
        # The switch for the fallback has no public name. Tried with PyTorch 2.6 to 2.15.
        torch._dynamo.config.suppress_errors = True
        return True
    return choice == 'on'
