"""Fine-tune a pretrained encoder as a classifier: layer-wise learning-rate decay, RandAugment, mixup, stochastic depth."""

import timm.loss
import torch
from timm.data import Mixup

from engine_finetune import evaluate, fit, print_accuracy
from models_vit import MODELS
from util import misc
from util.arguments import Parser, add_classifier_arguments, add_common_arguments, bounded, check_classifier, setup
from util.checkpoint import load_pretrained
from util.datasets import build_transform
from util.distributed import distribute
from util.errors import UserError, as_user_error
from util.loader import build_loaders
from util.lr_decay import param_groups_lrd
from util.seeding import seeded


def get_args_parser():
    parser = Parser('main_finetune.py', description=__doc__)
    add_classifier_arguments(parser, MODELS)
    group = parser.add_argument_group('fine-tuning')
    group.add_argument('--global_pool_wcls', action='store_true', help='classify the mean of all tokens, class token included')
    group.add_argument('--drop_path', default=0.1, type=bounded(float, 0, 1, open_high=True), metavar='RATE',
                       help='stochastic depth at the last block; it grows from 0 at the first')
    group.add_argument('--layer_decay', default=0.75, type=bounded(float, 0), metavar='FACTOR',
                       help='factor of the learning rate a layer down')
    group.add_argument('--clip_grad', default=None, type=bounded(float, 0), metavar='NORM',
                       help='largest norm of the gradients; default: they are not clipped')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--color_jitter', default=None, type=bounded(float, 0), metavar='FACTOR',
                       help="of brightness, contrast and saturation; only with --aa ''; default: none")
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', metavar='NAME', help="timm's policy; '' for none")
    group.add_argument('--smoothing', default=0.1, type=bounded(float, 0, 1), metavar='SHARE', help='label smoothing')
    group.add_argument('--reprob', default=0.25, type=bounded(float, 0, 1), metavar='P', help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='what erased pixels become')
    group.add_argument('--recount', default=1, type=bounded(int, 1), metavar='N', help='boxes erased')
    group.add_argument('--resplit', action='store_true', help='taken for the sake of published commands; it changes nothing')
    group.add_argument('--mixup', default=0.0, type=bounded(float, 0), metavar='ALPHA', help='strength; 0: none')
    group.add_argument('--cutmix', default=0.0, type=bounded(float, 0), metavar='ALPHA', help='strength; 0: none')
    group.add_argument('--cutmix_minmax', default=None, type=bounded(float, 0, 1), nargs=2, metavar=('MIN', 'MAX'),
                       help='side of the cut boxes as a share of the image; turns cutmix on; default: drawn by --cutmix')
    group.add_argument('--mixup_prob', default=1.0, type=bounded(float, 0, 1), metavar='P',
                       help='probability of either, for a batch')
    group.add_argument('--mixup_switch_prob', default=0.5, type=bounded(float, 0, 1), metavar='P',
                       help='probability of cutmix where both are on')
    group.add_argument('--mixup_mode', default='batch', choices=['batch', 'pair', 'elem'],
                       help='what shares one draw of their strength')
    add_common_arguments(parser, epochs=50, min_lr=1e-6, warmup_epochs=5)
    return parser


def check(args):
    """Combinations of flags that cannot work."""
    check_classifier(args, MODELS)
    if args.global_pool and args.global_pool_wcls:
        raise UserError('--global_pool and --global_pool_wcls are two ways of pooling; give one of them')
    if mixes(args) and args.batch_size % 2:
        raise UserError(f'--batch_size {args.batch_size}: mixup and cutmix pair the images of a batch; give an even number')
    if args.cutmix_minmax and int(args.input_size * args.cutmix_minmax[0]) >= int(args.input_size * args.cutmix_minmax[1]):
        raise UserError('--cutmix_minmax MIN MAX: MAX has to be larger than MIN, by a pixel at least')


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_criterion(args):
    """(loss, mixup or None): mixup's targets are smoothed distributions over the classes already."""
    if mixes(args):
        mixup_fn = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                         label_smoothing=args.smoothing, num_classes=args.nb_classes)
        return timm.loss.SoftTargetCrossEntropy(), mixup_fn
    return torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing), None


def main(args):
    check(args)
    device = setup(args)

    # data
    loader_train, loader_val = build_loaders(args, build_transform)

    # model
    with seeded('weights', args.seed), as_user_error(f'--model {args.model} --input_size {args.input_size}', ValueError):
        model_without_ddp = MODELS[args.model](
            img_size=args.input_size, num_classes=args.nb_classes, drop_path_rate=args.drop_path,
            global_pool=args.global_pool, global_pool_wcls=args.global_pool_wcls)
    if args.finetune and not args.resume:  # a run that goes on has all its weights in that file
        load_pretrained(args, model_without_ddp)
    model_without_ddp.to(device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters())
    print(f'{args.model}, {parameters / 1e6:.1f} M parameters, {args.nb_classes} classes')

    # optimiser
    param_groups = param_groups_lrd(model_without_ddp, args.weight_decay, model_without_ddp.no_weight_decay(), args.layer_decay)
    optimizer = torch.optim.AdamW(param_groups, lr=args.lr, fused=True)
    loss_scaler = misc.NativeScalerWithGradNormCount(enabled=args.amp == 'fp16', device=device)
    resumed = misc.load_model(args, model_without_ddp, optimizer, loss_scaler)

    # loop
    if args.eval:
        return print_accuracy(evaluate(loader_val, model_without_ddp, device, args.amp, args.print_freq))
    criterion, mixup_fn = build_criterion(args)
    if args.compile:
        model_without_ddp.compile()
    model = distribute(args, model_without_ddp, device)
    fit(args, model, model_without_ddp, criterion, loader_train, loader_val, optimizer, loss_scaler, device, mixup_fn,
        resumed=resumed)


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
