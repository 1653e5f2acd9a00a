"""Linear and attentive probing: train a small classifier on frozen features.

With several --blr, one head per learning rate is trained in the same pass over the data.
"""

import argparse
import datetime
import os
import time
from functools import partial

import torch.nn as nn

from engine_finetune import evaluate, log_classifier_epoch, print_accuracy, train_one_epoch
from models_probe import PROBES, Sweep, best_head_checkpoint, build_optimizer, sweep_loss
from models_vit import MODELS
from util.amp import NativeScalerWithGradNormCount
from util.arguments import (
    add_classifier_arguments,
    add_common_arguments,
    check_start,
    grid_size_of,
)
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import load_pretrained, save_on_master
from util.cli import Parser, add_flags, bounded, from_flags, run
from util.data.loader import build_loaders
from util.datasets import DataConfig, build_linprobe_transform
from util.distributed import distribute
from util.errors import as_user_error, refuse
from util.logs import open_log
from util.lr_sched import Schedule
from util.preemption import Preemption
from util.runtime import setup
from util.seeding import seeded

DEFAULT_BLR = [0.1]  # as published, of the linear probe

PROBING = {
    '--probe': dict(
        default='linear',
        choices=PROBES,
        help='linear: batch norm and a linear classifier, trained by LARS; attentive: a query '
        'that attends to the patch tokens, then the classifier, trained by AdamW',
    ),
    '--blr': dict(
        default=DEFAULT_BLR,
        nargs='+',
        type=bounded(float, 0, 1e9),
        metavar='LR',
        help='base learning rates: lr = blr * effective batch / 256; each trains a head of its '
        'own, all in one pass over the data; default: 0.1, or 5e-4 for the attentive probe',
    ),
}


def get_args_parser() -> Parser:
    parser = Parser('main_linprobe.py', description=__doc__, conflict_handler='resolve')
    add_classifier_arguments(parser, MODELS)
    add_common_arguments(
        parser, batch_size=512, epochs=90, weight_decay=0.0, warmup_epochs=10, num_workers=10
    )
    add_flags(parser.add_argument_group('probing'), PROBING)
    return parser


def base_rates(probe: str, blr: list[float]) -> list[float]:
    """Return the base learning rates in order, each once.

    Args:
        probe: key of PROBES.
        blr: the flag.
    """
    if blr is DEFAULT_BLR and probe == 'attentive':  # this very list, if the flag is not given
        blr = [5e-4]
    return sorted(set(blr))


def check(args: argparse.Namespace) -> None:
    """Validate flag combinations before anything is loaded."""
    check_start(args.resume, args.finetune, args.eval)
    grid_size_of(args.model, MODELS[args.model], args.input_size)
    refuse(
        (
            args.batch_size < 2 and args.probe == 'linear',
            f'--batch_size {args.batch_size}: the batch norm before the classifier needs at '
            'least 2 images per process',
        ),
        (
            args.global_pool and args.probe == 'attentive',
            '--global_pool with --probe attentive: this probe pools by attention; drop '
            '--global_pool',
        ),
        (
            len(base_rates(args.probe, args.blr)) > 1 and args.lr is not None,
            '--lr with several --blr: the rates follow from --blr; drop --lr',
        ),
    )


def main(args: argparse.Namespace) -> None:
    check(args)
    rates = base_rates(args.probe, args.blr)
    runtime = setup(args, blr=rates[-1], training=not args.eval)
    check_start(runtime.resume, args.finetune, args.eval)  # --resume auto may have found nothing
    if not (runtime.resume or args.finetune):
        print('No --finetune: the encoder starts from random weights')

    # ---- data
    data = from_flags(DataConfig, args, **vars(runtime))
    loader_train, loader_val = build_loaders(
        data,
        partial(build_linprobe_transform, input_size=args.input_size),
        num_classes=args.nb_classes,
        accum_iter=args.accum_iter,
        dist_eval=args.dist_eval,
        eval_only=args.eval,
        output_dir=args.output_dir,
    )

    # ---- model: a frozen encoder, and one head per learning rate
    context = f'--model {args.model} --input_size {args.input_size}'
    with seeded('weights', args.seed), as_user_error(context, ValueError):
        model_without_ddp = MODELS[args.model](
            img_size=args.input_size,
            num_classes=args.nb_classes,
            global_pool=args.global_pool,
        )
        model_without_ddp.head = PROBES[args.probe](model_without_ddp)
    sweep = Sweep(model_without_ddp.head, rates) if len(rates) > 1 else None
    if sweep:
        model_without_ddp.head = sweep
    if args.finetune and not runtime.resume:  # a resumed run has all weights in its checkpoint
        load_pretrained(
            model_without_ddp,
            args.finetune,
            model_name=args.model,
            whole_encoder=True,
            eval_classes=args.nb_classes if args.eval else None,
        )
    model_without_ddp.freeze_encoder(head_takes_tokens=args.probe == 'attentive').to(runtime.device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters() if p.requires_grad)
    print(
        f'{args.model}, frozen, {len(rates)} head(s) of {parameters / len(rates) / 1e6:.2f} M '
        f'parameters, {args.nb_classes} classes'
    )

    # ---- optimizer
    optimizer = build_optimizer(model_without_ddp.head, args.probe, runtime.lr, args.weight_decay)
    # A sweep zeroes NaN gradients. Loss scaling would never see an overflow, and its scale would
    # grow forever.
    scales = runtime.amp == 'fp16' and sweep is None
    loss_scaler = NativeScalerWithGradNormCount(enabled=scales, device=runtime.device)
    schedule = from_flags(Schedule, args, **vars(runtime))

    checkpointer = Checkpointer(
        model_without_ddp,
        optimizer,
        loss_scaler,
        args.output_dir,
        flags={**runtime.flags, 'blr': rates},
        epochs=args.epochs,
        save_every=args.save_every,
        images_per_step=args.batch_size * runtime.world_size,
    )
    heads = len(rates) if sweep else None

    # ---- evaluate, or resume
    if args.eval:
        checkpointer.resume(runtime.resume, weights_only=True)
        test_stats = evaluate(
            loader_val, model_without_ddp, runtime.device, runtime.amp, args.print_freq, heads
        )
        print_accuracy(sweep.compare(test_stats) if sweep else test_stats)
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
            sweep_loss if sweep else nn.CrossEntropyLoss(),
            loader_train,
            optimizer,
            runtime.device,
            epoch,
            loss_scaler,
            log_writer=log_writer,
            args=args,
            schedule=schedule,
            amp=runtime.amp,
            start=start,
            preemption=preemption,
        )
        test_stats = evaluate(
            loader_val, model_without_ddp, runtime.device, runtime.amp, args.print_freq, heads
        )
        if sweep:
            test_stats = sweep.compare(test_stats, optimizer)
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
            **({name: test_stats[name] for name in ('blr', 'heads')} if sweep else {}),
        )
        checkpointer.extra['max_accuracy'] = max_accuracy
        if sweep and is_best and args.output_dir:  # checkpoint-best.pth has only the best head
            checkpoint = best_head_checkpoint(
                checkpointer, epoch, test_stats['blr'], args.probe, runtime.effective_batch
            )
            save_on_master(checkpoint, os.path.join(args.output_dir, 'checkpoint-best.pth'))
        checkpointer.save(epoch, best=is_best and not sweep)
        preemption.after_epoch(epoch)
    print(f'Training time {datetime.timedelta(seconds=int(time.time() - begin))}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
