"""Learning rate: scaled by the batch size, linear warm-up, then a half cosine."""

import math
from dataclasses import dataclass

import torch


def absolute_lr(blr: float, effective_batch: int) -> float:
    """Scale the base learning rate, which is for 256 images, to the effective batch."""
    return blr * effective_batch / 256


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the epoch.

    Attributes:
        lr: peak learning rate, after the warm-up.
        min_lr: learning rate at the end.
        warmup_epochs, epochs: length of the warm-up and of the run.
        effective_batch: batch_size * accum_iter * world_size, for groups with a ``blr``.
    """

    lr: float
    min_lr: float
    warmup_epochs: int
    epochs: int
    effective_batch: int = 256


def adjust_learning_rate(
    optimizer: torch.optim.Optimizer, epoch: float, schedule: Schedule
) -> float:
    """Set and return the learning rate at a fractional epoch.

    Args:
        optimizer: a parameter group with a ``blr`` has that base learning rate instead of the
            schedule's peak. The ``lr_scale`` of a group multiplies its learning rate.
        schedule: a Schedule, or any object with its attributes.
    """
    for group in optimizer.param_groups:
        peak = schedule.lr
        if 'blr' in group:
            peak = absolute_lr(group['blr'], schedule.effective_batch)
        group['lr'] = _scheduled(peak, epoch, schedule) * group.get('lr_scale', 1.0)
    return _scheduled(schedule.lr, epoch, schedule)


def _scheduled(peak, epoch, schedule):
    if epoch < schedule.warmup_epochs:
        return peak * epoch / schedule.warmup_epochs
    progress = (epoch - schedule.warmup_epochs) / (schedule.epochs - schedule.warmup_epochs)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_lr + (peak - schedule.min_lr) * cosine
