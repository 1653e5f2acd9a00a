"""One epoch of masked image pretraining."""

from models_milan import patch_order
from util import lr_sched, misc
from util.datasets import normalise
from util.logs import LossLog
from util.seeding import sample_noise


def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=None, args=None, teacher=None,
                    interruption=None):
    """Train for one pass over ``data_loader`` and return {'loss': ..., 'lr': ...}, means over steps and processes.

    Args:
        model: MaskedAutoencoderViT, or DDP around one.
        data_loader: gives (images [N, 3, H, W], bytes or normalised floats, classes [N], sample numbers [N]).
        interruption: util.interruption.Interruption, or None: nothing is saved inside the epoch.
        teacher: module from images to (tokens [N, L+1, D_t], importance [N, L]), or None for the pixel target.

    Raises:
        UserError: too many steps in a row were left out for gradients that are not finite. The last checkpoint is still good.
    """
    model.train()
    optimizer.zero_grad()
    num_patches = getattr(model, 'module', model).patch_embed.num_patches
    losses = LossLog('train_loss', args, epoch, data_loader, log_writer, interruption)
    for step, (samples, _, ids) in losses:
        if step % args.accum_iter == 0:
            lr = lr_sched.adjust_learning_rate(optimizer, epoch + step / len(data_loader), args)
        update = (step + 1) % args.accum_iter == 0
        samples = normalise(samples.to(device, non_blocking=True))
        noise = sample_noise(args.seed, epoch, ids.to(device, non_blocking=True), num_patches)

        clip_teacher = teacher(samples) if teacher is not None else None
        ids_shuffle = patch_order(noise, clip_teacher[1] if args.attn_mask else None)
        with misc.no_sync(model, not update), misc.autocast(device, args.amp):
            loss, _, _ = model(samples, args.mask_ratio, clip_teacher, ids_shuffle, loss_only=True)
        loss_scaler(loss / args.accum_iter, optimizer, update_grad=update)
        if update:
            optimizer.zero_grad()
        losses.add(step, lr, loss, loss_scaler.skipped, ids)
    return losses.means()
