"""``step``: our training step against the textbook's, and how its time is spent."""

import contextlib
import io
import multiprocessing
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip
import main_pretrain
from engine_pretrain import train_one_epoch
from tools.benchmark import textbook
from util.amp import AMP_DTYPES
from util.cli import from_flags
from util.errors import as_user_error
from util.lr_sched import Schedule, adjust_learning_rate
from util.masking import sample_noise
from util.runtime import Runtime, setup
from util.seeding import seeded

OPTIMIZER = 'optimiser'  # codespell:ignore: a key of existing JSON files
TEXTBOOK_AMP = {'cuda': 'fp16', 'cpu': 'fp32'}
MEMORY_OF = {'cuda': 'tensors on the GPU', 'cpu': 'the process, including PyTorch itself'}


def measure(
    flags: Sequence[str], runtime: Runtime, *, rounds: int, steps: int, threads: int
) -> dict[str, Any]:
    """Measure both sides, and print the result.

    Args:
        flags: flags of main_pretrain.py, including --clip_path FILE, --device and --lr.
        runtime: their Runtime.
        rounds: measurements per side; the sides take turns.
        steps: training steps per round.
        threads: PyTorch's threads.

    Returns:
        An entry of the list ``step`` of the JSON file.
    """
    args = main_pretrain.get_args_parser().parse_args(flags)
    loss, flop = _compare_losses(flags, args.batch_size)
    ceiling = _matmul_ceiling(runtime.device, runtime.amp)
    torch.cuda.empty_cache()  # room for the processes that follow

    # Each side has a process of its own, because peak memory and settings belong to a process.
    # Ours is set up as by main_pretrain.py, the textbook's as by PyTorch.
    spawn = multiprocessing.get_context('spawn')
    context = f'--batch_size {args.batch_size} may be too large; lower it'
    with (
        as_user_error(context, torch.OutOfMemoryError, BrokenProcessPool),
        ProcessPoolExecutor(1, spawn, _end_with_parent) as ours,
        ProcessPoolExecutor(1, spawn, _end_with_parent) as book,
    ):
        ask = {
            'ours': partial(ours.submit, _answer, 'ours', tuple(flags), threads),
            'textbook': partial(book.submit, _answer, 'textbook', tuple(flags), threads),
        }
        memory = {name: ask[name](_peak_memory).result() for name in SIDES}
        turns = [
            {name: ask[name](seconds_of, steps).result() for name in SIDES} for _ in range(rounds)
        ]
        split = ask['ours'](_split_ms, steps * rounds).result()

    images = steps * args.batch_size
    rates = {name: images / median(turn[name] for turn in turns) for name in SIDES}
    result = {
        'model': args.model,
        'input_size': args.input_size,
        'batch_size': args.batch_size,
        'device': runtime.device.type,
        'precision': {'ours': runtime.amp, 'textbook': TEXTBOOK_AMP[runtime.device.type]},
        'steps_a_round': steps,
        'images_per_s': rates,
        'images_per_s_of_rounds': {k: [images / turn[k] for turn in turns] for k in SIDES},
        'ratio': rates['ours'] / rates['textbook'],
        'split_ms_a_step': split,
        'peak_memory_bytes': memory,
        'memory_ratio': memory['ours'] / memory['textbook'],
        'memory_of': MEMORY_OF[runtime.device.type],
        'flop_per_image': flop,
        'flop_per_s': flop * rates['ours'],
        'ceiling_flop_per_s': ceiling,
        'share_of_ceiling': flop * rates['ours'] / ceiling,
        'first_step_loss': loss,
    }
    total, precision = sum(split.values()), result['precision']
    split = [f'{name} {ms:.1f} ({ms / total:.0%})' for name, ms in split.items()]
    verdict = 'equal up to rounding' if loss['agree'] else 'DIFFERENT: the comparison is invalid'
    memory = {name: peak / 2**30 for name, peak in memory.items()}
    print_table(
        f'step: {args.model}, {args.input_size} pixels, batch {args.batch_size}, '
        f'{runtime.device.type}',
        ('', f'ours ({precision["ours"]})', f'textbook ({precision["textbook"]})'),
        ('images/s', rates, 2, f'{result["ratio"]:8.2f}'),
        ('peak memory, GB', memory, 2, f'{result["memory_ratio"]:8.2f}   of {result["memory_of"]}'),
        (f'first loss, {loss["precision"]}', loss, 7, f'   {verdict}'),
    )
    print(
        f'our step, ms: {", ".join(split)}\n'
        f'{flop / 1e9:.1f} GFLOP per image, {result["flop_per_s"] / 1e9:,.0f} GFLOP/s: '
        f'{result["share_of_ceiling"]:.0%} of the {ceiling / 1e9:,.0f} of a large '
        f'matrix product in {runtime.amp}'
    )
    return result


def print_table(title: str, columns: Sequence[str], *rows: Sequence[Any]) -> None:
    """Print a comparison.

    Args:
        title: the line above the table.
        columns: titles of the names, of our side and of the other side.
        rows: name, values of both sides by name (ours first), digits, and what follows them.
    """
    print(f'\n{title}\n{columns[0]:20}{columns[1]:>15}{columns[2]:>18}{"ratio":>8}')
    for name, values, digits, note in rows:
        ours, other, *_ = values.values()
        print(f'{name:20}{ours:15.{digits}f}{other:18.{digits}f}{note}')


# ---- the two sides ----

# A side is a function of the number of steps. It runs so many steps on a batch of noise, and
# returns their mean loss. The textbook's has the same weights, batch and masks as ours.


# What main_pretrain.py trains, by the epoch of engine_pretrain.py. lap(name), if given, is called
# at the end of every part of a step, see _split_ms.
def _build_ours(flags):
    args = main_pretrain.get_args_parser().parse_args(flags)
    spec = main_pretrain.check(args)
    runtime = setup(args)
    teacher, model, optimizer, scaler = main_pretrain.build_training(args, runtime, spec)
    schedule = from_flags(Schedule, args, **vars(runtime))
    batch = _noise_batch(args.batch_size, args.input_size, runtime.device)

    def _run(steps, lap=None):
        modules = model, teacher
        if lap:
            modules = _timed(model, 'forward', lap), _timed(teacher, 'teacher', lap)
            optimizer.register_step_pre_hook(lambda *_: lap('backward'))
            optimizer.register_step_post_hook(lambda *_: lap(OPTIMIZER))
        return train_one_epoch(
            modules[0],
            [batch] * steps,
            optimizer,
            runtime.device,
            0,
            scaler,
            args=args,
            schedule=schedule,
            teacher=modules[1],
            amp=runtime.amp,
        )['loss']

    return _run


def _build_textbook(flags, amp=''):
    args = main_pretrain.get_args_parser().parse_args(flags)
    device = torch.device(args.device)
    amp = amp or TEXTBOOK_AMP[device.type]
    visual = clip.load(args.clip_path, 'cpu')[0].visual.to(device)
    options = dict(use_clip=True, change_decoder=True, target_dim=visual.output_dim)
    with seeded('weights', args.seed):
        model = main_pretrain.MODELS[args.model](img_size=args.input_size, **options).to(device)
    optimizer = textbook.build_optimizer(model, args.lr, args.weight_decay)
    training = model, visual, optimizer, torch.amp.GradScaler(device.type, enabled=amp == 'fp16')
    schedule = from_flags(Schedule, args)
    images, _, ids = _noise_batch(args.batch_size, args.input_size, device)

    def _step(progress):
        adjust_learning_rate(optimizer, progress, schedule)
        noise = sample_noise(args.seed, 0, ids, model.patch_embed.num_patches)
        return textbook.train_step(*training, images, noise, AMP_DTYPES[amp], args.mask_ratio)

    return lambda steps: mean(_step(i / steps) for i in range(steps))


SIDES = {'ours': _build_ours, 'textbook': _build_textbook}


# A batch as the loader's: images [N, 3, H, W], labels [N], sample indices [N].
def _noise_batch(n, size, device):
    images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(n, device=device)
    return images.to(device), ids, ids


# ---- measurements ----


# The entry first_step_loss; and the floating-point operations of our step per image, in matrix
# products and convolutions, where a multiplication and an addition are two operations.
# Always in fp32: with less precision the importance is rounded, so that other patches may be
# drawn. With at most 32 images and not compiled, because nothing is timed here.
def _compare_losses(flags, batch_size):
    n = min(batch_size, 32)
    flags = [*flags, '--amp', 'fp32', '--compile', 'off', '--batch_size', str(n)]
    with contextlib.redirect_stdout(io.StringIO()):
        ours, book = _build_ours(flags), _build_textbook(flags, 'fp32')
        # PyTorch counts attention by its two products only if it computes them separately.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            a = ours(1)
        b = book(1)
    loss = {'ours': a, 'textbook': b, 'precision': 'fp32', 'agree': abs(a - b) <= 1e-5 * b}
    return loss, counter.get_total_flops() / n


# Operations per second of the best of 20 products of large square matrices.
def _matmul_ceiling(device, amp):
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=AMP_DTYPES[amp] or torch.float32)
    return 2 * n**3 / min(seconds_of(torch.matmul, a, b) for _ in range(20))


# The time in seconds when the GPU has done its work, if one is in use.
def _now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable, *args: Any) -> float:
    """Return how long a call takes, in seconds."""
    begin = _now()
    function(*args)
    return _now() - begin


# Milliseconds per step of teacher, forward, backward, optimizer and the rest. The device is
# synchronized after each, which a real run does not do: their sum is longer than a step.
# The optimizer keeps the hooks, so nothing can be timed afterwards.
def _split_ms(run, steps):
    seconds = dict.fromkeys(('teacher', 'forward', 'backward', OPTIMIZER, 'other'), 0.0)
    last = _now()

    def _lap(name):
        nonlocal last
        last, begin = _now(), last
        seconds[name] += last - begin

    run(steps, _lap)
    return {name: 1000 * total / steps for name, total in seconds.items()}


# ``module`` as a function that calls lap('other') before and lap(name) after each call. Like DDP's
# wrapper, it has the module as an attribute. Hooks would be compiled with the module.
def _timed(module, name, lap):
    def _call(*args, **kwargs):
        lap('other')
        result = module(*args, **kwargs)
        lap(name)
        return result

    _call.module, _call.train = module, module.train
    return _call


# This process's peak memory in bytes: tensors on CUDA, everything on a CPU.
def _peak_memory(run):
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == 'darwin':
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux ru_maxrss is inherited from the parent process.
    peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
    return int(peak[1]) * 1024


# ---- the process of a side ----


# Return function(side, *values). The first call builds the side and runs two steps.
def _answer(name, flags, threads, function, *values):
    torch.set_num_threads(threads)
    with contextlib.redirect_stdout(io.StringIO()):
        return function(_warmed_up(name, flags), *values)


@cache
def _warmed_up(name, flags):
    run = SIDES[name](flags)
    run(2)
    return run


# End this process when its parent ends, even if the parent is killed.
def _end_with_parent():
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()
