"""Linear probing: a linear classifier on the frozen features of a pretrained encoder."""

import torch.nn as nn

from engine_finetune import evaluate, fit, print_accuracy
from models_vit import MODELS
from util import misc
from util.arguments import Parser, add_classifier_arguments, check_classifier, setup
from util.checkpoint import load_pretrained
from util.datasets import build_linprobe_transform
from util.distributed import distribute
from util.errors import UserError, as_user_error
from util.lars import LARS
from util.loader import build_loaders
from util.seeding import seeded


def get_args_parser():
    parser = Parser('main_linprobe.py', description=__doc__)
    add_classifier_arguments(
        parser, MODELS, batch_size=512, epochs=90, weight_decay=0.0, blr=0.1, warmup_epochs=10, num_workers=10)
    return parser


def main(args):
    check_classifier(args)
    if args.batch_size < 2:
        raise UserError(f'--batch_size {args.batch_size}: the batch norm before the classifier needs at least 2 images a process')
    device = setup(args)

    # data
    loader_train, loader_val = build_loaders(args, build_linprobe_transform)

    # model
    with seeded('weights', args.seed), as_user_error(f'--model {args.model} --input_size {args.input_size}', ValueError):
        model_without_ddp = MODELS[args.model](
            img_size=args.input_size, num_classes=args.nb_classes, global_pool=args.global_pool)
        nn.init.trunc_normal_(model_without_ddp.head.weight, std=0.01)
    # features of unlike scales learn at one rate only when each is normalised; without affine, the classifier stays linear
    norm = nn.BatchNorm1d(model_without_ddp.head.in_features, affine=False, eps=1e-6)
    model_without_ddp.head = nn.Sequential(norm, model_without_ddp.head)
    if args.finetune and not args.resume:  # a run that goes on has all its weights in that file
        load_pretrained(args, model_without_ddp, whole_encoder=True)
    model_without_ddp.freeze_encoder().to(device)
    parameters = sum(p.numel() for p in model_without_ddp.parameters() if p.requires_grad)
    print(f'{args.model}, frozen, and a head of {parameters / 1e6:.2f} M parameters for {args.nb_classes} classes')

    # optimiser
    optimizer = LARS(model_without_ddp.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    loss_scaler = misc.NativeScalerWithGradNormCount(enabled=args.amp == 'fp16', device=device)
    resumed = misc.load_model(args, model_without_ddp, optimizer, loss_scaler)

    # loop
    if args.eval:
        return print_accuracy(evaluate(loader_val, model_without_ddp, device, args.amp, args.print_freq))
    if args.compile:
        model_without_ddp.compile()
    model = distribute(args, model_without_ddp, device)
    fit(args, model, model_without_ddp, nn.CrossEntropyLoss(), loader_train, loader_val, optimizer, loss_scaler, device,
        resumed=resumed)


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
