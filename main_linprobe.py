"""Linear and attentive probing: a small classifier on frozen features, or one for each of several learning rates."""

import torch.nn as nn

from engine_finetune import evaluate, fit, print_accuracy
from models_vit import MODELS
from util import misc
from util.arguments import Parser, add_classifier_arguments, add_common_arguments, bounded, check_classifier, setup
from util.checkpoint import load_pretrained
from util.datasets import build_linprobe_transform
from util.distributed import distribute
from util.errors import UserError, as_user_error
from util.loader import build_loaders
from util.probes import PROBES, Sweep, build_optimizer, sweep_loss
from util.seeding import seeded


def get_args_parser():
    parser = Parser('main_linprobe.py', description=__doc__, conflict_handler='resolve')
    add_classifier_arguments(parser, MODELS)
    add_common_arguments(parser, batch_size=512, epochs=90, weight_decay=0.0, blr=0.1, warmup_epochs=10, num_workers=10)
    group = parser.add_argument_group('probing')
    group.add_argument('--probe', default='linear', choices=PROBES,
                       help='linear: batch norm and a linear classifier, trained by LARS; attentive: a query that attends to '
                            'the patch tokens before it, trained by AdamW')
    group.add_argument('--blr', nargs='+', type=bounded(float, 0, 1e9), metavar='LR',
                       help='base learning rate: lr = blr * effective batch / 256; of several each trains a head of its own, '
                            'all in one pass over the data; default: %(default)s, or 5e-4 for the attentive probe')
    return parser


def check(args):
    """Combinations of flags that cannot work; args.blr becomes a list of the rates in order, each once."""
    check_classifier(args, MODELS)
    attentive = args.probe == 'attentive'
    if args.batch_size < 2 and not attentive:
        raise UserError(f'--batch_size {args.batch_size}: the batch norm before the classifier needs at least 2 images a process')
    if args.global_pool and attentive:
        raise UserError('--global_pool with --probe attentive: this probe pools by attention; leave --global_pool out')
    if isinstance(args.blr, float):  # the default: what is given is a list
        args.blr = [5e-4 if attentive else args.blr]
    args.blr = sorted(set(args.blr))
    if len(args.blr) > 1 and args.lr is not None:
        raise UserError('--lr with several --blr: the rates follow from --blr, leave --lr out')


def main(args):
    check(args)
    rates = args.blr
    args.blr = rates[-1]
    device = setup(args)

    # data
    loader_train, loader_val = build_loaders(args, build_linprobe_transform)

    # model
    with seeded('weights', args.seed), as_user_error(f'--model {args.model} --input_size {args.input_size}', ValueError):
        model_without_ddp = MODELS[args.model](
            img_size=args.input_size, num_classes=args.nb_classes, global_pool=args.global_pool)
        model_without_ddp.head = PROBES[args.probe](model_without_ddp)
    sweep = None
    if len(rates) > 1:
        args.blr = rates
        model_without_ddp.head = sweep = Sweep(model_without_ddp.head, rates)
    if args.finetune and not args.resume:  # a run that goes on has all its weights in that file
        load_pretrained(args, model_without_ddp, whole_encoder=True)
    model_without_ddp.freeze_encoder(head_pools=args.probe == 'attentive').to(device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters() if p.requires_grad)
    heads = f'{len(rates)} heads' if sweep else 'a head'
    print(f'{args.model}, frozen, and {heads} of {parameters / len(rates) / 1e6:.2f} M parameters '
          f'for {args.nb_classes} classes')

    # optimiser
    optimizer = build_optimizer(args, model_without_ddp.head)
    # A Sweep clears gradients that are not finite, by which loss scaling would have to know that its scale is too large.
    loss_scaler = misc.NativeScalerWithGradNormCount(enabled=args.amp == 'fp16' and sweep is None, device=device)
    resumed = misc.load_model(args, model_without_ddp, optimizer, loss_scaler)

    # loop
    if args.eval:
        test_stats = evaluate(loader_val, model_without_ddp, device, args.amp, args.print_freq)
        return print_accuracy(sweep.compare(test_stats) if sweep else test_stats)
    if args.compile:
        model_without_ddp.compile()
    model = distribute(args, model_without_ddp, device)
    fit(args, model, model_without_ddp, sweep_loss if sweep else nn.CrossEntropyLoss(), loader_train, loader_val, optimizer,
        loss_scaler, device, resumed=resumed, sweep=sweep)


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
