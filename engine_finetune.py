"""Training and evaluating a classifier: what fine-tuning and linear probing have in common."""

import datetime
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from util import lr_sched, misc
from util.datasets import normalise
from util.errors import UserError
from util.interruption import Interruption
from util.logs import LossLog, log_epoch, open_log
from util.probes import Sweep, save_best_head
from util.seeding import seed_step


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler, max_norm=None, mixup_fn=None,
                    log_writer=None, args=None, interruption=None):
    """Train for one pass over ``data_loader`` and return {'loss': ..., 'lr': ...}, means over steps and processes.

    Args:
        model: from images to logits [N, num_classes], or DDP around one.
        criterion: loss of logits and targets: classes [N], or what ``mixup_fn`` makes of them. Heads that learn side by side
            (util/probes.py) have a loss each.
        data_loader: gives (images [N, 3, H, W], bytes or normalised floats, classes [N], sample numbers [N]).
        max_norm: gradients are clipped to this norm; None: not.
        mixup_fn: timm.data.Mixup, or None.
        interruption: util.interruption.Interruption, or None: nothing is saved inside the epoch.

    Raises:
        UserError: too many steps in a row were left out for gradients that are not finite. The last checkpoint is still good.
    """
    model.train()
    optimizer.zero_grad()
    losses = LossLog('loss', args, epoch, data_loader, log_writer, interruption)
    for step, (samples, targets, ids) in losses:
        if step % args.accum_iter == 0:
            lr = lr_sched.adjust_learning_rate(optimizer, epoch + step / len(data_loader), args)
        update = (step + 1) % args.accum_iter == 0
        samples, targets = normalise(samples.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
        seed_step(args.seed, epoch, step, args.rank)  # mixup and stochastic depth draw from the global generators
        if mixup_fn is not None:
            samples, targets = mixup_fn(samples, targets)

        with misc.no_sync(model, not update), misc.autocast(device, args.amp):
            loss = criterion(model(samples), targets)
        loss_scaler(loss.sum() / args.accum_iter, optimizer, clip_grad=max_norm, parameters=model.parameters(),
                    update_grad=update)
        if update:
            optimizer.zero_grad()
        losses.add(step, lr, loss.median(), loss_scaler.skipped, ids)  # of one head its own, of several the middle one
    return losses.means()


@torch.no_grad()
def evaluate(data_loader, model, device, amp='fp32', print_freq=20):
    """Accuracy over all images that the processes' loaders give together, each image with equal weight.

    Args:
        data_loader: of batches (images, classes, ...), as above; all images (its ``shared`` is False) or this process's share of
            them. The shares may be of different lengths: the processes meet only at the end.

    Returns:
        {'images': how many, 'loss': mean cross-entropy, 'acc1': top-1, 'acc5': top-5 accuracy, both in per cent}. Of a model
        whose head is a Sweep, a list with such a dict for each of its heads.

    Raises:
        UserError: not one of the images could be read.
    """
    model = getattr(model, 'module', model)  # DDP's forward would wait for the other processes in every step
    if misc.get_world_size() > 1:
        for buffer in model.buffers():  # the batch norm of linear probing: its statistics are the first process's
            dist.broadcast(buffer, 0)
    model.eval()
    sweep = isinstance(getattr(model, 'head', None), Sweep)
    heads = len(model.head) if sweep else 1
    # images, loss, right at first, right among five, of each head, for a batch: nothing waits for the device until the end
    sums = [torch.zeros(4, heads, device=device)]
    for samples, targets, *_ in misc.MetricLogger().log_every(data_loader, print_freq, 'Evaluation'):
        samples, targets = normalise(samples.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
        with misc.autocast(device, amp):
            logits = model(samples)
        logits = logits.float().reshape(heads, *logits.shape[-2:])
        hits = logits.topk(min(5, logits.shape[2])).indices == targets[:, None]
        loss = torch.stack([F.cross_entropy(x, targets, reduction='sum') for x in logits])
        count = torch.full_like(loss, len(targets))
        sums.append(torch.stack([count, loss, hits[:, :, 0].sum(dim=1), hits.any(dim=2).sum(dim=1)]))
    total = torch.stack(sums).cpu().double().sum(dim=0)
    if misc.get_world_size() > 1 and getattr(data_loader, 'shared', True):
        total = total.to(device)
        dist.all_reduce(total)
    if not total[0].any():
        raise UserError('no image of the validation set could be read')
    results = [{'images': int(images), 'loss': loss / images, 'acc1': 100 * top1 / images, 'acc5': 100 * top5 / images}
               for images, loss, top1, top5 in total.T.tolist()]
    return results if sweep else results[0]


def print_accuracy(test_stats):
    print(f'Accuracy of the network on the {test_stats["images"]} test images: {test_stats["acc1"]:.2f}% '
          f'(top-5 {test_stats["acc5"]:.2f}%, loss {test_stats["loss"]:.4f})')


def fit(args, model, model_without_ddp, criterion, loader_train, loader_val, optimizer, loss_scaler, device, mixup_fn=None,
        resumed=None, sweep=None):
    """Train from args.start_epoch to args.epochs; after every epoch evaluate, log and save. Prints the best accuracy.

    Args:
        resumed: what load_model gave of the checkpoint that this run goes on from; {} or None: it begins.
        sweep: the model's head, where it is a Sweep: the best of its heads is what is reported, and saved as the best.
    """
    if args.start_epoch >= args.epochs:
        print(f'Nothing to do: all of --epochs {args.epochs} are done')
        return
    print(f'{len(loader_train.dataset)} training images, {len(loader_train)} steps an epoch; '
          f'{len(loader_val.dataset)} validation images')
    def save(epoch, **inside):
        misc.save_model(args, epoch - 1, model, model_without_ddp, optimizer, loss_scaler, max_accuracy=max_accuracy, **inside)

    interruption = Interruption(args, save, len(loader_train), resumed)
    log_writer = open_log(args, args.start_epoch + interruption.step / len(loader_train))
    n_parameters = sum(p.numel() for p in model_without_ddp.parameters() if p.requires_grad)
    max_accuracy = (resumed or {}).get('max_accuracy', -1.0)
    start = time.time()
    for epoch in range(args.start_epoch, args.epochs):
        loader_train.set_epoch(epoch, interruption.start_of(epoch)[0])
        train_stats = train_one_epoch(
            model, criterion, loader_train, optimizer, device, epoch, loss_scaler, max_norm=getattr(args, 'clip_grad', None),
            mixup_fn=mixup_fn, log_writer=log_writer, args=args, interruption=interruption)
        test_stats = evaluate(loader_val, model_without_ddp, device, args.amp, args.print_freq)
        if sweep is not None:
            test_stats = sweep.compare(test_stats, optimizer)
        is_best = test_stats['acc1'] > max_accuracy
        max_accuracy = max(max_accuracy, test_stats['acc1'])
        print(f'Epoch [{epoch}] top-1 {test_stats["acc1"]:.2f} %, top-5 {test_stats["acc5"]:.2f} %, '
              f'loss {test_stats["loss"]:.4f}; best top-1 {max_accuracy:.2f} %')
        if log_writer is not None:
            for name in ('acc1', 'acc5', 'loss'):
                log_writer.add_scalar(f'perf/test_{name}', test_stats[name], epoch)
        log_epoch(args, log_writer, {
            **{f'train_{k}': v for k, v in train_stats.items()}, **{f'test_{k}': test_stats[k] for k in ('loss', 'acc1', 'acc5')},
            'epoch': epoch, 'n_parameters': n_parameters, **{k: test_stats[k] for k in ('blr', 'heads') if k in test_stats}})
        if sweep is not None and is_best:
            save_best_head(args, epoch, model_without_ddp, optimizer, loss_scaler, test_stats, max_accuracy)
        misc.save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler, is_best and sweep is None,
                        max_accuracy=max_accuracy)
        interruption.after_epoch(epoch)
    print(f'Training time {datetime.timedelta(seconds=int(time.time() - start))}')
