r"""Weighted k-nearest-neighbor accuracy of an encoder: evaluates a checkpoint without training.

    python -m tools.knn --model vit_base_patch16 --finetune OUT/checkpoint-399.pth \
        --data_path /dataset/imagenet
    torchrun --nproc_per_node=8 -m tools.knn ...

As in DINO (arXiv 2104.14294): for each image of val/, the k training images with the highest
cosine similarity vote for their classes with weight exp(similarity / temperature). Images
are not augmented.
"""

import argparse
import json

import torch

from models_probe import build_encoder
from models_vit import MODELS
from util.amp import autocast
from util.arguments import (
    DATA,
    DEVICE,
    PRINT_FREQ,
    PROCESSES,
    add_encoder_arguments,
    check_checkpoint,
)
from util.cli import Parser, add_flags, bounded, from_flags, run
from util.data.loader import build_loader
from util.datasets import (
    DataConfig,
    build_dataset,
    build_linprobe_transform,
    check_classes,
    normalize,
)
from util.errors import as_user_error, refuse
from util.logs import MetricLogger
from util.runtime import start_runtime

QUERIES = 256  # images compared with all training images at a time: 1.3 GB for ImageNet


# Compute the features of all images on all ranks: [N, D] of length 1 (float32) and labels [N] on
# the CPU. On rank 0 they are in the order of the data set, for any number of ranks. On other
# ranks they are those of the rank's share.
@torch.no_grad()
def _extract(model, loader, runtime, print_freq, header):
    # starts with an empty batch, because there may be no images for this process
    batches = [(torch.zeros(0, model.num_features), *torch.zeros(2, 0, dtype=torch.int64))]
    for images, labels, ids in MetricLogger().log_every(loader, print_freq, header):
        with autocast(runtime.device, runtime.amp):
            features = model(normalize(images.to(runtime.device, non_blocking=True)))
        batches.append((features.cpu(), labels, ids))
    shares = [batches] * (runtime.world_size if loader.shared and runtime.rank == 0 else 1)
    if loader.shared and runtime.world_size > 1:
        torch.distributed.gather_object(batches, shares if runtime.rank == 0 else None)
    features, labels, ids = map(torch.cat, zip(*sum(shares, [])))
    return torch.nn.functional.normalize(features[ids.argsort()].float()), labels[ids.argsort()]


def accuracies(
    queries: torch.Tensor,
    targets: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    *,
    ks: list[int],
    temperature: float,
    num_classes: int,
) -> dict[int, tuple[float, float]]:
    """Compute the accuracy of the weighted vote.

    Args:
        queries: features of the validation images [Q, D], of length 1.
        targets: their labels [Q], on the CPU.
        bank: features of the training images [M, D], of length 1. Similarities are computed on
            its device.
        labels: their labels [M], on the CPU.
        ks: numbers of neighbors that vote. If k exceeds M, all training images vote.

    Returns:
        {k: (top-1, top-5)} in percent.
    """
    hits = torch.zeros(len(ks), 2, dtype=torch.float64)
    for q, target in zip(queries.split(QUERIES), targets.split(QUERIES)):
        similarities, rows = (q.to(bank.device) @ bank.T).topk(min(max(ks), len(bank)))
        # relative to the nearest, so that exp() does not overflow at low temperatures
        weights = ((similarities.double() - similarities[:, :1]) / temperature).exp().cpu()
        for i, k in enumerate(ks):
            votes = torch.zeros(len(q), num_classes, dtype=torch.float64).scatter_add(
                1, labels[rows[:, :k].cpu()], weights[:, :k]
            )
            values, predicted = votes.topk(min(5, num_classes))
            correct = (predicted == target[:, None]) & (values > 0)  # not without a vote
            hits[i] += torch.stack([correct[:, 0].sum(), correct.sum()])
    return dict(zip(ks, map(tuple, (100 * hits / len(targets)).tolist())))


FLAGS = {
    '--k': {
        'nargs': '+',
        'default': [10, 20, 100, 200],
        'type': bounded(int, 1),
        'metavar': 'K',
        'help': 'training images that vote; default: 10 20 100 200',
    },
    '--temperature': {
        'default': 0.07,
        'type': bounded(float, 1e-6),
        'metavar': 'T',
        'help': 'a vote counts exp(similarity / temperature)',
    },
    '--json': {'metavar': 'FILE', 'help': 'also write the accuracies to this file'},
    '--batch_size': {
        'default': 128,
        'type': bounded(int, 1),
        'metavar': 'N',
        'help': 'images per process and step',
    },
}


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.knn', description=__doc__)
    add_encoder_arguments(parser, MODELS)
    add_flags(parser.add_argument_group('neighbors'), FLAGS, DEVICE, PRINT_FREQ)
    add_flags(parser.add_argument_group('data'), DATA)
    add_flags(parser.add_argument_group('processes (set by the launchers)'), PROCESSES)
    parser.set_defaults(num_workers=10)
    return parser


def main(args: argparse.Namespace) -> None:
    check_checkpoint('--finetune', args.finetune)
    runtime = start_runtime(
        device=args.device,
        amp=args.amp,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_mem=args.pin_mem,
        local_rank=args.local_rank,
        dist_on_itp=args.dist_on_itp,
        dist_url=args.dist_url,
        dist_timeout=args.dist_timeout,
    )
    if not args.finetune:
        print('No --finetune: the encoder has random weights')
    model = build_encoder(
        args.model,
        input_size=args.input_size,
        global_pool=args.global_pool,
        finetune=args.finetune,
        seed=args.seed,
    ).to(runtime.device)
    data = from_flags(DataConfig, args, **vars(runtime))
    sets = [
        build_dataset(is_train, config, build_linprobe_transform(False, args.input_size))
        for is_train, config in (
            # Streams are opened for evaluation: for training they would be shuffled, and cut to
            # equal parts per process.
            (
                not data.dataset,
                from_flags(DataConfig, args, **vars(runtime), val_split=args.train_split),
            ),
            (False, data),
        )
    ]
    check_classes(data.data_path, args.nb_classes, *sets)
    (bank, labels), (queries, targets) = (
        _extract(
            model,
            build_loader(
                dataset, data, is_train=False, num_classes=args.nb_classes, dist_eval=True
            ),
            runtime,
            args.print_freq,
            header,
        )
        for dataset, header in zip(sets, ('Training images', 'Validation images'))
    )
    if runtime.rank > 0:
        return
    refuse(
        (not len(bank), 'Training images: no image could be read'),
        (not len(queries), 'Validation images: no image could be read'),
    )
    if max(args.k) > len(bank):
        print(f'Note: there are only {len(bank)} training images; all of them vote for larger k')
    results = accuracies(
        queries,
        targets,
        bank.to(runtime.device),
        labels,
        ks=sorted(set(args.k)),
        temperature=args.temperature,
        num_classes=args.nb_classes,
    )
    rows = [{'k': k, 'acc1': top1, 'acc5': top5} for k, (top1, top5) in results.items()]
    print(
        f'{len(bank)} training images, {len(queries)} validation images, '
        f'temperature {args.temperature:g}',
        '       k  top-1, %  top-5, %',
        *('{k:8d}  {acc1:8.2f}  {acc5:8.2f}'.format(**row) for row in rows),
        sep='\n',
    )
    if args.json:
        with (
            as_user_error(f'--json {args.json} cannot be written', OSError),
            open(args.json, 'w', encoding='utf-8') as f,
        ):
            print(
                json.dumps(
                    {
                        'train_images': len(bank),
                        'images': len(queries),
                        'temperature': args.temperature,
                        'knn': rows,
                    }
                ),
                file=f,
            )


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
