"""Pretrain a ViT by masked image modeling: MILAN, or MAE.

MILAN is --use_clip --change_decoder --attn_mask. Without these flags the script trains MAE.
"""

import argparse
import datetime
import time

import torch
from timm.optim import param_groups_weight_decay

from engine_pretrain import train_one_epoch
from models_milan import MODELS, MaskedAutoencoderViT
from models_teacher import CLIP_PATH, Teacher, TeacherSpec, build_teacher, check_texts, read_texts
from util.amp import NativeScalerWithGradNormCount
from util.arguments import INPUT_SIZE, add_common_arguments, check_checkpoint, grid_size_of
from util.checkpoints.checkpointer import Checkpointer
from util.cli import Parser, add_flags, bounded, from_flags, run
from util.data.loader import build_loader
from util.datasets import DataConfig, build_dataset, build_pretrain_transform, build_transform
from util.distributed import distribute
from util.errors import refuse
from util.logs import log_epoch, open_log
from util.lr_sched import Schedule
from util.masking import count_visible
from util.panels import fixed_images, log_panels
from util.preemption import Preemption
from util.runtime import Runtime, setup
from util.seeding import seeded

MODEL = {
    '--model': dict(
        default='mae_vit_large_patch16', choices=MODELS, metavar='NAME', help=', '.join(MODELS)
    ),
}
METHOD = {
    '--use_clip': dict(action='store_true', help="predict the teacher's features, not pixels"),
    '--change_decoder': dict(action='store_true', help="prompting decoder instead of MAE's"),
    '--attn_mask': dict(
        action='store_true',
        help="semantic aware masking: sample visible patches by the teacher's attention",
    ),
}
TARGET = {
    '--mask_ratio': dict(
        default=0.75,
        type=bounded(float, 0, 1, open_high=True),
        metavar='RATIO',
        help='fraction of patches hidden from the encoder',
    ),
    '--norm_pix_loss': dict(
        action='store_true',
        help='normalize the pixels of each target patch; only for the pixel target',
    ),
    '--pixel_target': dict(
        action='store_true',
        help='predict pixels; use the teacher only to choose which patches stay visible',
    ),
    '--average_targets': dict(
        default=1,
        type=bounded(int, 1),
        metavar='K',
        help="average the outputs of the teacher's last K blocks",
    ),
}
TEACHER = {
    '--clip_path': dict(
        default=CLIP_PATH, metavar='FILE|NAME', help='CLIP teacher: a file, or a name to download'
    ),
    '--teacher': dict(
        default='',
        metavar='NAME',
        help='teacher instead of --clip_path: a CLIP name or any timm ViT, such as '
        'vit_base_patch16_siglip_224; its input is resized to the patch grid of --model',
    ),
    '--teacher_path': dict(
        default='', metavar='FILE', help="weights of --teacher; default: from timm's hub"
    ),
    '--use_clip_dino': dict(
        action='store_true', help='DINO as the teacher, from dino_vitbase16_pretrain.pth'
    ),
    '--use_clip_slip': dict(
        action='store_true', help='SLIP as the teacher, from slip_vit_base_16.pth.tar'
    ),
    '--teacher_norm': dict(
        default='imagenet',
        choices=['imagenet', 'own'],
        help="normalization of the teacher's input: ImageNet statistics (as published), or the "
        "teacher's own",
    ),
}
VISUALIZATION = {
    '--vis_every': dict(
        default=0,
        type=bounded(int, 0),
        metavar='N',
        help='log masks, features and predictions of a few images to TensorBoard after every '
        'N-th epoch and the last; 0: never',
    ),
    '--vis_text': dict(
        nargs='+',
        default=[],
        metavar='TEXT',
        help='with --vis_every and a CLIP teacher: log how well each text fits the teacher tokens '
        'and the predictions for hidden patches',
    ),
}


def get_args_parser() -> Parser:
    parser = Parser('main_pretrain.py', description=__doc__)
    add_flags(parser.add_argument_group('model'), MODEL, INPUT_SIZE)
    add_flags(parser.add_argument_group('method (MILAN: all three, MAE: none)'), METHOD)
    add_flags(parser.add_argument_group('target and masking'), TARGET)
    add_flags(parser.add_argument_group('teacher'), TEACHER)
    add_flags(parser.add_argument_group('visualization'), VISUALIZATION)
    add_common_arguments(parser, epochs=400, warmup_epochs=40)
    return parser


def check(args: argparse.Namespace) -> TeacherSpec | None:
    """Validate flag combinations before anything is loaded. Return the teacher, or None."""
    spec = TeacherSpec.from_args(args)
    predicts_features = spec is not None and not args.pixel_target
    patches = grid_size_of(args.model, MODELS[args.model], args.input_size) ** 2
    visible = count_visible(patches, args.mask_ratio)
    refuse(
        (
            args.attn_mask and spec is None,
            '--attn_mask needs a teacher; add --use_clip, or drop both flags',
        ),
        (
            args.pixel_target and not args.attn_mask,
            '--pixel_target without --attn_mask leaves the teacher unused; drop --use_clip to '
            'train MAE',
        ),
        (args.vis_every and not args.log_dir, '--vis_every logs to TensorBoard; set --log_dir'),
        (
            args.vis_text and not args.vis_every,
            '--vis_text needs --vis_every N; N is 1 for every epoch',
        ),
        (
            args.vis_text and not predicts_features,
            '--vis_text compares texts with predicted features, but this run predicts pixels; '
            'add --use_clip, and drop --pixel_target',
        ),
        (
            visible == 0 or (visible == patches and not predicts_features),
            f'--mask_ratio {args.mask_ratio} leaves {visible} of {patches} patches visible; '
            'there is nothing to learn',
        ),
    )
    if args.vis_text:
        check_texts('--vis_text', args.vis_text, spec.text_tower)
    check_checkpoint('--resume', args.resume)
    return spec


def build_training(
    args: argparse.Namespace, runtime: Runtime, spec: TeacherSpec | None
) -> tuple[
    Teacher | None,
    MaskedAutoencoderViT,
    torch.optim.Optimizer,
    NativeScalerWithGradNormCount,
]:
    """Build what a run trains. Returns teacher or None, model, optimizer and loss scaler."""
    # ---- teacher
    teacher = None
    if spec is not None:
        teacher = build_teacher(
            spec,
            grid_size=grid_size_of(args.model, MODELS[args.model], args.input_size),
            input_size=args.input_size,
            model_name=args.model,
            device=runtime.device,
            amp=runtime.amp,
            compile=runtime.compile,
        )

    # ---- model
    with seeded('weights', args.seed):
        model = MODELS[args.model](
            img_size=args.input_size,
            norm_pix_loss=args.norm_pix_loss,
            use_clip=spec is not None and not args.pixel_target,  # here: predicts features
            attn_mask=args.attn_mask,
            change_decoder=args.change_decoder,
            target_dim=teacher.dim if teacher else None,
        )
    model.to(runtime.device)
    if runtime.compile:
        model.compile()

    # ---- optimizer
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=runtime.lr, betas=(0.9, 0.95), fused=True)
    loss_scaler = NativeScalerWithGradNormCount(
        enabled=runtime.amp == 'fp16', device=runtime.device
    )
    return teacher, model, optimizer, loss_scaler


def main(args: argparse.Namespace) -> None:
    spec = check(args)
    runtime = setup(args)
    # before anything large is loaded, so that a text that is too long fails at once
    texts = read_texts('--vis_text', args.vis_text, spec.text_tower) if args.vis_text else None

    # ---- data
    data = from_flags(DataConfig, args, **vars(runtime))
    dataset = build_dataset(True, data, build_pretrain_transform(args.input_size))
    data_loader = build_loader(
        dataset, data, accum_iter=args.accum_iter, output_dir=args.output_dir
    )
    steps = len(data_loader)
    print(f'{len(dataset)} images in {args.data_path}, {steps} steps per epoch')

    # ---- model and optimizer
    teacher, model_without_ddp, optimizer, loss_scaler = build_training(args, runtime, spec)
    parameters = sum(p.numel() for p in model_without_ddp.parameters())
    print(f'{args.model}, {parameters / 1e6:.1f} M parameters')
    model = distribute(model_without_ddp, runtime.device)
    schedule = from_flags(Schedule, args, **vars(runtime))

    # ---- resume
    checkpointer = Checkpointer(
        model_without_ddp,
        optimizer,
        loss_scaler,
        args.output_dir,
        flags={**runtime.flags, 'use_clip': spec is not None},  # every teacher flag implies it
        epochs=args.epochs,
        save_every=args.save_every,
        images_per_step=args.batch_size * runtime.world_size,
    )
    start = checkpointer.resume(
        runtime.resume,
        start_epoch=args.start_epoch,
        steps_per_epoch=steps,
        accum_iter=args.accum_iter,
    )
    if start.epoch >= args.epochs:
        print(f'Nothing to do: all of --epochs {args.epochs} are done')
        return

    # ---- training loop
    preemption = Preemption(checkpointer, args.save_minutes)
    log_writer = open_log(
        args.output_dir, args.log_dir, checkpointer.flags, start.resumed_at(steps)
    )
    images = None
    if args.vis_every:
        images = fixed_images(data, build_transform(False, args.input_size), dataset).to(
            runtime.device
        )
    begin = time.time()
    for epoch in range(start.epoch, args.epochs):
        data_loader.set_epoch(epoch, start.step_of(epoch))
        train_stats = train_one_epoch(
            model,
            data_loader,
            optimizer,
            runtime.device,
            epoch,
            loss_scaler,
            log_writer,
            args,
            schedule=schedule,
            teacher=teacher,
            amp=runtime.amp,
            start=start,
            preemption=preemption,
        )
        stats = {f'train_{name}': value for name, value in train_stats.items()}
        log_epoch(log_writer, args.output_dir, {**stats, 'epoch': epoch})
        checkpointer.save(epoch)
        is_due = args.vis_every and (epoch % args.vis_every == 0 or epoch + 1 == args.epochs)
        if is_due and log_writer is not None:
            log_panels(
                log_writer,
                (epoch + 1) * 1000 - 1,  # the x axis is in 1/1000 of an epoch: its last point
                model_without_ddp,
                teacher,
                images,
                mask_ratio=args.mask_ratio,
                seed=args.seed,
                texts=texts,
                text_names=args.vis_text,
            )
        preemption.after_epoch(epoch)
    print(f'Training time {datetime.timedelta(seconds=int(time.time() - begin))}')


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
