"""One epoch of a classifier, and its evaluation: what fine-tuning and probing share.

A step is one batch. After every ``accum_iter`` steps comes an update of the weights.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from util.amp import NativeScalerWithGradNormCount, autocast, check_skipped
from util.checkpoints.checkpointer import Start
from util.datasets import normalize
from util.distributed import get_rank, get_world_size, no_sync
from util.errors import UserError
from util.logs import EpochLog, MetricLogger, log_epoch
from util.lr_sched import Schedule, adjust_learning_rate
from util.preemption import Preemption
from util.seeding import seed_step


def train_one_epoch(
    model: torch.nn.Module,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler: NativeScalerWithGradNormCount,
    max_norm: float | None = None,
    mixup_fn: Callable | None = None,
    log_writer: SummaryWriter | None = None,
    args: argparse.Namespace | None = None,
    *,
    schedule: Schedule,
    amp: str = 'fp32',
    start: Start = Start(),
    preemption: Preemption | None = None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: maps images to logits [N, num_classes], or DDP around it.
        criterion: loss of logits and targets. It is a scalar, or has one loss per head of the
            model.
        data_loader: yields images [N, 3, H, W] (uint8, or normalized float32), labels [N] and
            sample indices [N]; it starts at the first iteration that ``start`` leaves to do.
        max_norm: clip gradients to this norm. None: do not clip.
        mixup_fn: timm.data.Mixup, or None.
        args: required. Read here are accum_iter, batch_size, epochs, max_skipped_steps, output_dir,
            print_freq, seed.
        schedule: learning rate by epoch.
        amp: precision of the forward pass, a key of util.amp.AMP_DTYPES.
        start: where the run begins.
        preemption: saves within the epoch, and ends the run on a signal. None: neither.

    Returns:
        {'loss': ..., 'lr': ...}: means over iterations and ranks.

    Raises:
        UserError: if too many steps in a row had NaN or Inf gradients.
        Preempted: if the run was asked to end.
    """
    model.train()
    optimizer.zero_grad()
    limits = epoch, args.max_skipped_steps, args.accum_iter, args.output_dir
    log = EpochLog(
        'loss',
        epoch,
        args.epochs,
        len(data_loader),
        log_writer,
        args.print_freq,
        args.accum_iter,
        images_per_step=args.batch_size * get_world_size(),
        **start.within(epoch),
    )
    for step, (images, targets, ids) in enumerate(log.every(data_loader), log.start_step):
        # ---- learning rate
        if step % args.accum_iter == 0:
            lr = adjust_learning_rate(optimizer, epoch + step / len(data_loader), schedule)
        update = (step + 1) % args.accum_iter == 0

        # ---- forward: mixup and stochastic depth draw from the global generators
        images = normalize(images.to(device, non_blocking=True))
        targets = targets.to(device, non_blocking=True)
        seed_step(args.seed, epoch, step, get_rank())
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        with no_sync(model, not update), autocast(device, amp):
            loss = criterion(model(images), targets)

        # ---- backward and step
        loss_scaler(
            loss.sum() / args.accum_iter,
            optimizer,
            clip_grad=max_norm,
            parameters=model.parameters(),
            update_grad=update,
        )
        if update:
            optimizer.zero_grad()

        # ---- log: values stay on the device until a line is due; then check for skipped steps
        # of a sweep of probing heads, the curve shows the median
        check_skipped(log.update(step, lr, loss.median(), loss_scaler.skipped, ids), *limits)

        # ---- preemption and timed checkpoints
        if update and preemption is not None and preemption.is_due(step + 1, log):
            check_skipped(log.flush(), *limits)
            preemption.save(step + 1, log)  # raises Preempted if asked to stop
    return log.means()


@torch.no_grad()
def evaluate(
    data_loader: Iterable,
    model: torch.nn.Module,
    device: torch.device,
    amp: str = 'fp32',
    print_freq: int = 20,
    heads: int | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Compute the accuracy over the images of all ranks. Every image counts once.

    Args:
        data_loader: yields images, labels, ... as above: all images, if its ``shared`` is False,
            or this rank's share. Shares may differ in length: the ranks meet only at the end.
        model: maps images to logits [N, C], or [heads, N, C].
        heads: number of heads. None: one, without a dimension for it.

    Returns:
        {'images': count, 'loss': mean cross-entropy, 'acc1': top-1, 'acc5': top-5 accuracy in
        percent}. With ``heads``, a list of these, one per head.

    Raises:
        UserError: if no image could be read.
    """
    model = getattr(model, 'module', model)  # DDP's forward would synchronize every step
    if get_world_size() > 1:
        for buffer in model.buffers():  # batch-norm statistics differ between ranks: take rank 0's
            dist.broadcast(buffer, 0)
    model.eval()
    # images, loss, top-1 and top-5 hits per batch and head; read from the device at the end
    sums = [torch.zeros(4, heads or 1, device=device)]
    for images, targets, *_ in MetricLogger().log_every(data_loader, print_freq, 'Evaluation'):
        images = normalize(images.to(device, non_blocking=True))
        targets = targets.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float().reshape(heads or 1, *logits.shape[-2:])
        hits = logits.topk(min(5, logits.shape[2])).indices == targets[:, None]
        loss = torch.stack([F.cross_entropy(x, targets, reduction='sum') for x in logits])
        count = torch.full_like(loss, len(targets))
        top1, top5 = hits[:, :, 0].sum(dim=1), hits.any(dim=2).sum(dim=1)
        sums.append(torch.stack([count, loss, top1, top5]))
    total = torch.stack(sums).cpu().double().sum(dim=0)
    if get_world_size() > 1 and getattr(data_loader, 'shared', True):
        total = total.to(device)
        dist.all_reduce(total)
    if not total[0].any():
        raise UserError('no image of the validation set could be read')
    results = [
        {
            'images': int(images),
            'loss': loss / images,
            'acc1': 100 * top1 / images,
            'acc5': 100 * top5 / images,
        }
        for images, loss, top1, top5 in total.T.tolist()
    ]
    return results[0] if heads is None else results


def print_accuracy(test_stats: dict[str, Any]) -> None:
    """Print the result of ``evaluate``."""
    print(
        f'Accuracy of the network on the {test_stats["images"]} test images: '
        f'{test_stats["acc1"]:.2f}% (top-5 {test_stats["acc5"]:.2f}%, '
        f'loss {test_stats["loss"]:.4f})'
    )


def log_classifier_epoch(
    log_writer: SummaryWriter | None,
    output_dir: str,
    epoch: int,
    train_stats: dict[str, float],
    test_stats: dict[str, Any],
    max_accuracy: float,
    **more: Any,
) -> None:
    """Print and log an epoch: a line of log.txt, and perf/test_* in TensorBoard.

    Args:
        train_stats: of ``train_one_epoch``.
        test_stats: of ``evaluate``.
        max_accuracy: best top-1 accuracy so far, in percent.
        more: further entries of log.txt.
    """
    tested = {name: test_stats[name] for name in ('loss', 'acc1', 'acc5')}
    print(
        f'Epoch [{epoch}] top-1 {tested["acc1"]:.2f} %, top-5 {tested["acc5"]:.2f} %, '
        f'loss {tested["loss"]:.4f}; best top-1 {max_accuracy:.2f} %'
    )
    if log_writer is not None:
        for name in ('acc1', 'acc5', 'loss'):
            log_writer.add_scalar(f'perf/test_{name}', tested[name], epoch)
    stats = {f'train_{name}': value for name, value in train_stats.items()}
    stats |= {f'test_{name}': value for name, value in tested.items()}
    log_epoch(log_writer, output_dir, {**stats, 'epoch': epoch, **more})
