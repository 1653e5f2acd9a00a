"""One epoch of masked image pretraining.

A step is one batch. After every ``accum_iter`` steps comes an update of the weights.
"""

import argparse
from collections.abc import Iterable

import torch
from torch.utils.tensorboard import SummaryWriter

from util.amp import NativeScalerWithGradNormCount, autocast, check_skipped
from util.checkpoints.checkpointer import Start
from util.datasets import normalize
from util.distributed import get_world_size, no_sync
from util.logs import EpochLog
from util.lr_sched import Schedule, adjust_learning_rate
from util.masking import patch_order, sample_noise
from util.preemption import Preemption


def train_one_epoch(
    model: torch.nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler: NativeScalerWithGradNormCount,
    log_writer: SummaryWriter | None = None,
    args: argparse.Namespace | None = None,
    *,
    schedule: Schedule,
    teacher: torch.nn.Module | None = None,
    amp: str = 'fp32',
    start: Start = Start(),
    preemption: Preemption | None = None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: MaskedAutoencoderViT, or DDP around it.
        data_loader: yields images [N, 3, H, W] (uint8, or normalized float32), labels [N] and
            sample indices [N]; it starts at the first iteration that ``start`` leaves to do.
        args: required. Read here are accum_iter, attn_mask, batch_size, epochs, mask_ratio,
            max_skipped_steps, output_dir, print_freq, seed.
        schedule: learning rate by epoch.
        teacher: maps images to tokens [N, L+1, D_t] and importance [N, L]. None: predict pixels.
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
    num_patches = getattr(model, 'module', model).patch_embed.num_patches
    log = EpochLog(
        'train_loss',
        epoch,
        args.epochs,
        len(data_loader),
        log_writer,
        args.print_freq,
        args.accum_iter,
        images_per_step=args.batch_size * get_world_size(),
        **start.within(epoch),
    )
    for step, (images, _, ids) in enumerate(log.every(data_loader), log.start_step):
        # ---- learning rate
        if step % args.accum_iter == 0:
            lr = adjust_learning_rate(optimizer, epoch + step / len(data_loader), schedule)
        update = (step + 1) % args.accum_iter == 0

        # ---- forward: the teacher sees the whole image and decides which patches stay visible
        images = normalize(images.to(device, non_blocking=True))
        noise = sample_noise(args.seed, epoch, ids.to(device, non_blocking=True), num_patches)
        tokens, importance = teacher(images) if teacher is not None else (None, None)
        order = patch_order(noise, importance if args.attn_mask else None)
        with no_sync(model, not update), autocast(device, amp):
            loss, _, _ = model(
                images, args.mask_ratio, (tokens, importance), order, return_pred=False
            )

        # ---- backward and step
        loss_scaler(loss / args.accum_iter, optimizer, update_grad=update)
        if update:
            optimizer.zero_grad()

        # ---- log: values stay on the device until a line is due; then check for skipped steps
        check_skipped(log.update(step, lr, loss, loss_scaler.skipped, ids), *limits)

        # ---- preemption and timed checkpoints
        if update and preemption is not None and preemption.is_due(step + 1, log):
            check_skipped(log.flush(), *limits)
            preemption.save(step + 1, log)  # raises Preempted if asked to stop
    return log.means()
