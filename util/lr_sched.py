import math


def adjust_learning_rate(optimizer, epoch, args):
    """Set and return the learning rate at a fractional ``epoch``: linear warm-up from 0, then half a cosine to args.min_lr.

    Reads args.lr, min_lr, warmup_epochs, epochs. A parameter group's own ``lr_scale`` multiplies the rate.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
    return lr
