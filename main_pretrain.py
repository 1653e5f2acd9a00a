"""Pretrain a ViT by masked image modelling: MILAN with --use_clip --change_decoder --attn_mask, MAE without."""

import datetime
import time

import torch
from timm.optim import param_groups_weight_decay

from engine_pretrain import train_one_epoch
from models_milan import MODELS, count_visible
from util import misc
from util.arguments import Parser, add_common_arguments, bounded, check_checkpoint, check_sizes, setup
from util.datasets import build_dataset, build_pretrain_transform
from util.distributed import distribute
from util.errors import UserError
from util.interruption import Interruption
from util.loader import build_loader
from util.logs import log_epoch, open_log
from util.seeding import seeded
from util.teacher import CLIP_PATH, build_teacher, check_teacher
from util.texts import check_texts, read_texts, text_tower
from util.visualize import fixed_images, log_panels


def get_args_parser():
    parser = Parser('main_pretrain.py', description=__doc__)
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='mae_vit_large_patch16', choices=MODELS, metavar='NAME', help=', '.join(MODELS))
    group.add_argument('--input_size', default=224, type=bounded(int, 1, 4096), metavar='PIXELS', help='pixels along a side')

    group = parser.add_argument_group('method (MILAN: all three, MAE: none)')
    group.add_argument('--use_clip', action='store_true', help="predict the teacher's features instead of pixels")
    group.add_argument('--change_decoder', action='store_true', help="the prompting decoder instead of MAE's")
    group.add_argument('--attn_mask', action='store_true', help="semantic aware masking by the teacher's attention")

    group = parser.add_argument_group('target and masking')
    group.add_argument('--mask_ratio', default=0.75, type=bounded(float, 0, 1, open_high=True), metavar='SHARE',
                       help='share of patches hidden from the encoder')
    group.add_argument('--norm_pix_loss', action='store_true',
                       help='without a teacher: normalise the pixels of each target patch')
    group.add_argument('--pixel_target', action='store_true',
                       help='predict pixels all the same: the teacher of --use_clip only chooses the visible patches')
    group.add_argument('--average_targets', default=1, type=bounded(int, 1), metavar='K',
                       help="target: mean over the teacher's last K blocks")

    group = parser.add_argument_group('teacher')
    group.add_argument('--clip_path', default=CLIP_PATH, metavar='FILE|NAME', help='the teacher: a CLIP file or a name')
    group.add_argument('--teacher', default='', metavar='NAME', help="a teacher in place of --clip_path's: CLIP's names, "
                       "or a ViT of timm's such as vit_base_patch16_siglip_224; it is shown images for the grid of --model")
    group.add_argument('--teacher_path', default='', metavar='FILE', help="weights of --teacher; default: timm's hub")
    group.add_argument('--use_clip_dino', action='store_true', help='the teacher is DINO, dino_vitbase16_pretrain.pth')
    group.add_argument('--use_clip_slip', action='store_true', help='the teacher is SLIP, slip_vit_base_16.pth.tar')
    group.add_argument('--teacher_norm', default='imagenet', choices=['imagenet', 'own'],
                       help="mean and deviation of the teacher's input: the student's, as published, or its own")

    group = parser.add_argument_group('pictures')
    group.add_argument('--vis_every', default=0, type=bounded(int, 0), metavar='N',
                       help='masks, features and predictions of a few images to TensorBoard after every N-th epoch and the '
                            'last; 0: none')
    group.add_argument('--vis_text', nargs='+', default=[], metavar='TEXT',
                       help='with --vis_every and a CLIP as the teacher: how well each text fits its tokens, and those '
                            'predicted of hidden patches')
    add_common_arguments(parser, epochs=400, warmup_epochs=40)
    return parser


def check(args):
    """Combinations of flags that cannot work; a flag that names a teacher turns args.use_clip on."""
    check_teacher(args)
    if args.attn_mask and not args.use_clip:
        raise UserError('--attn_mask needs the teacher that --use_clip brings; give both or neither')
    if args.pixel_target and not args.attn_mask:
        raise UserError('--pixel_target leaves the teacher nothing to do without --attn_mask; for pixels and uniform masking '
                        'leave out --use_clip')
    if args.vis_every and not args.log_dir:
        raise UserError('--vis_every draws into TensorBoard: give --log_dir, the folder of its events')
    if args.vis_text:
        check_vis_text(args)
    patches = check_sizes(args, MODELS)
    visible = count_visible(patches, args.mask_ratio)
    if visible == 0 or (visible == patches and not predicts_features(args)):
        raise UserError(f'--mask_ratio {args.mask_ratio} leaves {visible} of {patches} patches visible; '
                        'there is nothing to learn from')
    check_checkpoint(args)


def check_vis_text(args):
    if not args.vis_every:
        raise UserError('--vis_text is drawn when --vis_every draws: give --vis_every N too, 1 for every epoch')
    if not predicts_features(args):
        raise UserError('--vis_text compares texts with predicted features, and this run predicts pixels: give --use_clip, '
                        'and no --pixel_target')
    check_texts('--vis_text', args.vis_text, text_tower(args))


def predicts_features(args):
    return args.use_clip and not args.pixel_target


def build_model(args, target_dim):
    """The model of the flags, as large as the images and as wide as the teacher's features."""
    return MODELS[args.model](
        img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, use_clip=predicts_features(args), attn_mask=args.attn_mask,
        change_decoder=args.change_decoder, target_dim=target_dim)


def build_training(args, device):
    """(teacher or None, model, model without DDP, optimiser, loss scaler) of a run."""
    # teacher and model
    patch_size = MODELS[args.model].keywords['patch_size']
    teacher = build_teacher(args, args.input_size // patch_size, device) if args.use_clip else None
    with seeded('weights', args.seed):
        model_without_ddp = build_model(args, teacher.dim if teacher else None).to(device)
    if args.compile:
        model_without_ddp.compile()
    model = distribute(args, model_without_ddp, device)

    # optimiser
    param_groups = param_groups_weight_decay(model_without_ddp, args.weight_decay)
    optimizer = torch.optim.AdamW(param_groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    loss_scaler = misc.NativeScalerWithGradNormCount(enabled=args.amp == 'fp16', device=device)
    return teacher, model, model_without_ddp, optimizer, loss_scaler


def main(args):
    check(args)
    device = setup(args)
    # Before anything large is listed or built: a text that is too long is told of at once.
    vis_texts = read_texts('--vis_text', args.vis_text, text_tower(args)) if args.vis_text else None

    # data
    data_loader = build_loader(args, build_dataset(True, args, build_pretrain_transform(args)))
    print(f'{len(data_loader.dataset)} images in {args.data_path}, {len(data_loader)} steps an epoch')

    # model and optimiser
    teacher, model, model_without_ddp, optimizer, loss_scaler = build_training(args, device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters())
    print(f'{args.model}, {parameters / 1e6:.1f} M parameters')
    resumed = misc.load_model(args, model_without_ddp, optimizer, loss_scaler)
    if args.start_epoch >= args.epochs:
        print(f'Nothing to do: all of --epochs {args.epochs} are done')
        return

    # loop
    def save(epoch, **inside):
        misc.save_model(args, epoch - 1, model, model_without_ddp, optimizer, loss_scaler, **inside)

    interruption = Interruption(args, save, len(data_loader), resumed)
    log_writer = open_log(args, args.start_epoch + interruption.step / len(data_loader))
    vis_images = fixed_images(args, data_loader.dataset) if args.vis_every else None
    start = time.time()
    for epoch in range(args.start_epoch, args.epochs):
        data_loader.set_epoch(epoch, interruption.start_of(epoch)[0])
        train_stats = train_one_epoch(
            model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=log_writer, args=args, teacher=teacher,
            interruption=interruption)
        log_epoch(args, log_writer, {**{f'train_{k}': v for k, v in train_stats.items()}, 'epoch': epoch})
        misc.save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler)
        log_panels(args, log_writer, epoch, model_without_ddp, teacher, vis_images, vis_texts)
        interruption.after_epoch(epoch)
    print(f'Training time {datetime.timedelta(seconds=int(time.time() - start))}')


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
