"""Fine-tune a pretrained encoder as a classifier.

The recipe is MAE's: layer-wise learning-rate decay, RandAugment, mixup, stochastic depth.
"""

import argparse
import datetime
import time
from collections.abc import Callable
from functools import partial

import timm.loss
import torch
from timm.data import Mixup

from engine_finetune import evaluate, log_classifier_epoch, print_accuracy, train_one_epoch
from models_vit import MODELS
from util.amp import NativeScalerWithGradNormCount
from util.arguments import (
    add_classifier_arguments,
    add_common_arguments,
    check_start,
    grid_size_of,
)
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import load_pretrained
from util.cli import Parser, add_flags, bounded, from_flags, run
from util.data.loader import build_loaders
from util.datasets import DataConfig, build_transform
from util.distributed import distribute
from util.errors import as_user_error, refuse
from util.logs import open_log
from util.lr_decay import param_groups_lrd
from util.lr_sched import Schedule
from util.preemption import Preemption
from util.runtime import setup
from util.seeding import seeded

FINETUNING = {
    '--global_pool_wcls': dict(
        action='store_true', help='classify the mean of all tokens, including the class token'
    ),
    '--drop_path': dict(
        default=0.1,
        type=bounded(float, 0, 1, open_high=True),
        metavar='RATE',
        help='stochastic depth rate of the last block; it grows linearly from 0 at the first',
    ),
    '--layer_decay': dict(
        default=0.75,
        type=bounded(float, 0),
        metavar='FACTOR',
        help='the learning rate shrinks by this factor from each layer to the one below',
    ),
    '--clip_grad': dict(
        default=None,
        type=bounded(float, 0),
        metavar='NORM',
        help='clip gradients to this norm; default: do not clip',
    ),
}
AUGMENTATION = {
    '--color_jitter': dict(
        default=None,
        type=bounded(float, 0),
        metavar='FACTOR',
        help="jitter of brightness, contrast and saturation; only with --aa ''; default: none",
    ),
    '--aa': dict(
        default='rand-m9-mstd0.5-inc1',
        metavar='POLICY',
        help="timm's augmentation policy; '' for none",
    ),
    '--smoothing': dict(
        default=0.1, type=bounded(float, 0, 1), metavar='EPS', help='label smoothing'
    ),
    '--reprob': dict(
        default=0.25, type=bounded(float, 0, 1), metavar='P', help='probability of random erasing'
    ),
    '--remode': dict(
        default='pixel', choices=['const', 'rand', 'pixel'], help='fill of erased boxes'
    ),
    '--recount': dict(default=1, type=bounded(int, 1), metavar='N', help='number of erased boxes'),
    '--resplit': dict(action='store_true', help='accepted for published commands; has no effect'),
    '--mixup': dict(
        default=0.0, type=bounded(float, 0), metavar='ALPHA', help='mixup strength; 0: none'
    ),
    '--cutmix': dict(
        default=0.0, type=bounded(float, 0), metavar='ALPHA', help='cutmix strength; 0: none'
    ),
    '--cutmix_minmax': dict(
        default=None,
        type=bounded(float, 0, 1),
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='side of cutmix boxes relative to the image; enables cutmix; default: from --cutmix',
    ),
    '--mixup_prob': dict(
        default=1.0,
        type=bounded(float, 0, 1),
        metavar='P',
        help='probability of mixup or cutmix per batch',
    ),
    '--mixup_switch_prob': dict(
        default=0.5,
        type=bounded(float, 0, 1),
        metavar='P',
        help='probability of cutmix if both are enabled',
    ),
    '--mixup_mode': dict(
        default='batch',
        choices=['batch', 'pair', 'elem'],
        help='draw the strength per batch, pair or element',
    ),
}


def get_args_parser() -> Parser:
    parser = Parser('main_finetune.py', description=__doc__)
    add_classifier_arguments(parser, MODELS)
    add_flags(parser.add_argument_group('fine-tuning'), FINETUNING)
    add_flags(parser.add_argument_group('augmentation'), AUGMENTATION)
    add_common_arguments(parser, epochs=50, min_lr=1e-6, warmup_epochs=5)
    return parser


def check(args: argparse.Namespace) -> None:
    """Validate flag combinations before anything is loaded."""
    check_start(args.resume, args.finetune, args.eval)
    grid_size_of(args.model, MODELS[args.model], args.input_size)
    low, high = args.cutmix_minmax or (0, 1)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    refuse(
        (
            args.global_pool and args.global_pool_wcls,
            '--global_pool and --global_pool_wcls are two ways of pooling; give only one',
        ),
        (
            int(args.input_size * low) >= int(args.input_size * high),
            f'--cutmix_minmax {low} {high}: MAX must exceed MIN by at least one pixel',
        ),
        (
            mixes and args.batch_size % 2,
            f'--batch_size {args.batch_size}: mixup and cutmix pair the images of a batch; use '
            'an even number',
        ),
    )


def build_criterion(
    mixup: float,
    cutmix: float,
    cutmix_minmax: list[float] | None,
    smoothing: float,
    num_classes: int,
    **options: float | str,
) -> tuple[torch.nn.Module, Callable | None]:
    """Return the loss and timm's Mixup, or None without mixup.

    The targets of Mixup are smoothed distributions over the classes.

    Args:
        options: further arguments of timm.data.Mixup.
    """
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax is not None):
        return torch.nn.CrossEntropyLoss(label_smoothing=smoothing), None
    mixup_fn = Mixup(
        mixup,
        cutmix,
        cutmix_minmax,
        label_smoothing=smoothing,
        num_classes=num_classes,
        **options,
    )
    return timm.loss.SoftTargetCrossEntropy(), mixup_fn


def main(args: argparse.Namespace) -> None:
    check(args)
    runtime = setup(args, training=not args.eval)
    check_start(runtime.resume, args.finetune, args.eval)  # --resume auto may have found nothing
    if not (runtime.resume or args.finetune):
        print('No --finetune: the encoder starts from random weights')

    # ---- data
    data = from_flags(DataConfig, args, **vars(runtime))
    transform = partial(
        build_transform,
        input_size=args.input_size,
        color_jitter=args.color_jitter,
        aa=args.aa,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
    )
    loader_train, loader_val = build_loaders(
        data,
        transform,
        num_classes=args.nb_classes,
        accum_iter=args.accum_iter,
        dist_eval=args.dist_eval,
        eval_only=args.eval,
        output_dir=args.output_dir,
    )

    # ---- model
    context = f'--model {args.model} --input_size {args.input_size}'
    with seeded('weights', args.seed), as_user_error(context, ValueError):
        model_without_ddp = MODELS[args.model](
            img_size=args.input_size,
            num_classes=args.nb_classes,
            drop_path_rate=args.drop_path,
            global_pool=args.global_pool,
            global_pool_wcls=args.global_pool_wcls,
        )
    if args.finetune and not runtime.resume:  # a resumed run has all weights in its checkpoint
        load_pretrained(
            model_without_ddp,
            args.finetune,
            model_name=args.model,
            eval_classes=args.nb_classes if args.eval else None,
        )
    model_without_ddp.to(runtime.device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters())
    print(f'{args.model}, {parameters / 1e6:.1f} M parameters, {args.nb_classes} classes')

    # ---- optimizer
    groups = param_groups_lrd(
        model_without_ddp,
        args.weight_decay,
        model_without_ddp.no_weight_decay(),
        args.layer_decay,
    )
    optimizer = torch.optim.AdamW(groups, lr=runtime.lr, fused=True)
    loss_scaler = NativeScalerWithGradNormCount(
        enabled=runtime.amp == 'fp16', device=runtime.device
    )
    schedule = from_flags(Schedule, args, **vars(runtime))

    checkpointer = Checkpointer(
        model_without_ddp,
        optimizer,
        loss_scaler,
        args.output_dir,
        flags=runtime.flags,
        epochs=args.epochs,
        save_every=args.save_every,
        images_per_step=args.batch_size * runtime.world_size,
    )

    # ---- evaluate, or resume
    if args.eval:
        checkpointer.resume(runtime.resume, weights_only=True)
        test_stats = evaluate(
            loader_val, model_without_ddp, runtime.device, runtime.amp, args.print_freq
        )
        print_accuracy(test_stats)
        return
    steps = len(loader_train)
    start = checkpointer.resume(
        runtime.resume,
        start_epoch=args.start_epoch,
        steps_per_epoch=steps,
        accum_iter=args.accum_iter,
    )
    if start.epoch >= args.epochs:
        print(f'Nothing to do: all of --epochs {args.epochs} are done')
        return
    if runtime.compile:
        model_without_ddp.compile()
    model = distribute(model_without_ddp, runtime.device)

    # ---- training loop
    print(
        f'{len(loader_train.dataset)} training images, {steps} steps per epoch; '
        f'{len(loader_val.dataset)} validation images'
    )
    criterion, mixup_fn = build_criterion(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.smoothing,
        args.nb_classes,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )
    preemption = Preemption(checkpointer, args.save_minutes)
    log_writer = open_log(
        args.output_dir, args.log_dir, checkpointer.flags, start.resumed_at(steps)
    )
    max_accuracy = checkpointer.extra['max_accuracy'] = start.max_accuracy
    begin = time.time()
    for epoch in range(start.epoch, args.epochs):
        loader_train.set_epoch(epoch, start.step_of(epoch))
        train_stats = train_one_epoch(
            model,
            criterion,
            loader_train,
            optimizer,
            runtime.device,
            epoch,
            loss_scaler,
            args.clip_grad,
            mixup_fn,
            log_writer,
            args,
            schedule=schedule,
            amp=runtime.amp,
            start=start,
            preemption=preemption,
        )
        test_stats = evaluate(
            loader_val, model_without_ddp, runtime.device, runtime.amp, args.print_freq
        )
        is_best = test_stats['acc1'] > max_accuracy
        max_accuracy = max(max_accuracy, test_stats['acc1'])
        log_classifier_epoch(
            log_writer,
            args.output_dir,
            epoch,
            train_stats,
            test_stats,
            max_accuracy,
            n_parameters=parameters,
        )
        checkpointer.extra['max_accuracy'] = max_accuracy
        checkpointer.save(epoch, best=is_best)
        preemption.after_epoch(epoch)
    print(f'Training time {datetime.timedelta(seconds=int(time.time() - begin))}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
