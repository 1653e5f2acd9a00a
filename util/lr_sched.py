import math


def absolute_lr(args, blr):
    """lr = blr * effective batch / 256. Reads args.batch_size, accum_iter, world_size."""
    return blr * (args.batch_size * args.accum_iter * args.world_size) / 256


def adjust_learning_rate(optimizer, epoch, args):
    """Set and return the learning rate at a fractional ``epoch``: linear warm-up from 0, then half a cosine to args.min_lr.

    Reads args.lr, min_lr, warmup_epochs, epochs. A parameter group's own ``blr`` takes the place of args.lr for it; its own
    ``lr_scale`` multiplies the rate.
    """
    for group in optimizer.param_groups:
        peak = absolute_lr(args, group['blr']) if 'blr' in group else args.lr
        group['lr'] = scheduled(peak, epoch, args) * group.get('lr_scale', 1.0)
    return scheduled(args.lr, epoch, args)


def scheduled(peak, epoch, args):
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.min_lr + (peak - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
