"""One epoch of masked image pretraining."""

import math

import torch

from models_milan import patch_order
from util import lr_sched, misc
from util.errors import UserError
from util.seeding import sample_noise


def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=None, args=None, teacher=None):
    """Train for one pass over ``data_loader`` and return {'loss': ..., 'lr': ...}, means over steps and processes.

    Args:
        model: MaskedAutoencoderViT, or DDP around one.
        data_loader: gives (images [N, 3, H, W], classes [N], sample numbers [N]).
        teacher: module from images to (tokens [N, L+1, D_t], importance [N, L]), or None for the pixel target.

    Raises:
        UserError: the loss is no longer finite. Nothing is saved then, so the last checkpoint is still good.
    """
    model.train()
    optimizer.zero_grad()
    metrics = misc.MetricLogger()
    metrics.add_meter('loss', misc.SmoothedValue())
    metrics.add_meter('lr', misc.SmoothedValue(window_size=1, fmt='{value:.2e}'))
    num_patches = getattr(model, 'module', model).patch_embed.num_patches
    unread = []  # (step, lr, loss) since the last report: a loss stays on the device until then, and no step waits for it

    batches = metrics.log_every(
        data_loader, args.print_freq, f'Epoch [{epoch}]', items_per_step=args.batch_size * args.world_size,
        steps_after=(args.epochs - epoch - 1) * len(data_loader))
    for step, (samples, _, ids) in enumerate(batches):
        if step % args.accum_iter == 0:
            lr = lr_sched.adjust_learning_rate(optimizer, epoch + step / len(data_loader), args)
        update = (step + 1) % args.accum_iter == 0
        samples = samples.to(device, non_blocking=True)
        noise = sample_noise(args.seed, epoch, ids.to(device, non_blocking=True), num_patches)

        with misc.no_sync(model, not update), misc.autocast(device, args.amp):
            clip_teacher = teacher(samples) if teacher is not None else None
            ids_shuffle = patch_order(noise, clip_teacher[1] if args.attn_mask else None)
            loss, _, _ = model(samples, args.mask_ratio, clip_teacher, ids_shuffle)
        loss_scaler(loss / args.accum_iter, optimizer, parameters=model.parameters(), update_grad=update)
        if update:
            optimizer.zero_grad()

        unread.append((step, lr, loss.detach()))
        if metrics.due:
            report(unread, epoch, len(data_loader), metrics, log_writer, args)
            unread.clear()

    metrics.synchronize_between_processes()
    print(f'Epoch [{epoch}] mean  {metrics}')
    return {name: meter.global_avg for name, meter in metrics.meters.items()}


def report(unread, epoch, steps, metrics, log_writer, args):
    """Read the losses of the last steps, all at once; check and log them."""
    losses = torch.stack([loss for _, _, loss in unread]).float()
    for (step, lr, _), loss, mean_loss in zip(unread, losses.tolist(), misc.all_reduce_mean(losses).tolist()):
        if not math.isfinite(mean_loss):
            raise UserError(f'the loss is {mean_loss} in epoch {epoch}, step {step}, at learning rate {lr:.2e}; resume from the '
                            'last checkpoint with a lower --blr, or with --amp fp32')
        metrics.update(loss=loss, lr=lr)
        if log_writer is not None and (step + 1) % args.accum_iter == 0:
            # thousandths of an epoch on the x axis: curves of different batch sizes lie over each other
            epoch_1000x = int((epoch + step / steps) * 1000)
            log_writer.add_scalar('train_loss', mean_loss, epoch_1000x)
            log_writer.add_scalar('lr', lr, epoch_1000x)
