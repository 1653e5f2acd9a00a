"""Weighted k-nearest-neighbour accuracy of an encoder's features: a look at a checkpoint that trains nothing.

    python tools/knn.py --model vit_base_patch16 --finetune OUT/checkpoint-399.pth --data_path /dataset/imagenet
    torchrun --nproc_per_node=8 tools/knn.py ...

As DINO measures it (arXiv 2104.14294): of an image of val/, the k training images with the highest cosine similarity vote for
their classes, with weight exp(similarity / temperature). No image is augmented.
"""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds only its own folder

from models_vit import MODELS  # noqa: E402
from util import misc  # noqa: E402
from util.arguments import (  # noqa: E402
    Parser,
    add_data_arguments,
    add_device_arguments,
    add_encoder_arguments,
    add_process_arguments,
    bounded,
    check_checkpoint,
    check_sizes,
    setup,
)
from util.datasets import build_dataset, build_linprobe_transform, check_classes, normalise  # noqa: E402
from util.errors import UserError, as_user_error  # noqa: E402
from util.loader import build_loader  # noqa: E402
from util.probes import build_encoder  # noqa: E402

BANK, QUERIES = 1 << 14, 1 << 10  # training and validation images compared at a time: a matrix of 64 MB


# ---- features ----

def build_sets(args):
    """(training set, validation set), both without augmentation."""
    transform = build_linprobe_transform(False, args)
    val = build_dataset(False, args, transform)
    # a stream that is asked for as a training set comes shuffled and cut to equal parts for the processes
    as_val = argparse.Namespace(**{**vars(args), 'val_split': args.train_split})
    train = build_dataset(False, as_val, transform) if args.dataset else build_dataset(True, args, transform)
    check_classes(args, train, val)
    return train, val


@torch.no_grad()
def extract(model, loader, device, args, header):
    """Features and classes of all images that the processes' loaders give together, on the first process.

    Returns:
        (float32 [N, D] of length 1, int64 [N]) on the CPU, in the data set's order, whatever the number of processes; on the
        other processes nothing of use.

    Raises:
        UserError: not one of the images could be read.
    """
    features, classes, numbers = [torch.zeros(0, model.num_features)], [torch.zeros(0).long()], [torch.zeros(0).long()]
    for images, targets, samples in misc.MetricLogger().log_every(loader, args.print_freq, header):
        with misc.autocast(device, args.amp):
            x = model(normalise(images.to(device, non_blocking=True)))
        features.append(F.normalize(x.float(), dim=1).cpu())
        classes.append(targets)
        numbers.append(samples)
    parts = [torch.cat(part) for part in (features, classes, numbers)]
    if loader.shared:
        parts = [gather(part, device) for part in parts]
    features, classes, numbers = parts
    if misc.is_main_process() and len(numbers) == 0:
        raise UserError(f'{header}: no image could be read')
    order = numbers.argsort()
    return features[order], classes[order]


def gather(x, device):
    """The rows of ``x`` [n, ...] of all processes, one process after the other, on the first; n may differ among them."""
    if misc.get_world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(misc.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=device))
    counts = torch.cat(counts).tolist()
    parts = [[] for _ in counts]
    for start in range(0, max(counts), BANK):
        block = torch.zeros(min(BANK, max(counts) - start), *x.shape[1:], dtype=x.dtype, device=device)
        mine = x[start:start + len(block)]
        block[:len(mine)] = mine.to(device)
        received = [torch.empty_like(block) for _ in counts] if misc.is_main_process() else []
        dist.gather(block, received or None)
        for part, rows, count in zip(parts, received, counts):
            part.append(rows[:max(0, count - start)].cpu())
    return torch.cat([rows for part in parts for rows in part]) if misc.is_main_process() else x


# ---- neighbours ----

def nearest(queries, bank, k, device):
    """The ``k`` rows of ``bank`` [M, D] most similar to each row of ``queries`` [Q, D].

    Both are of length 1, on the CPU. The bank passes over ``device`` once, a block at a time, and the whole matrix of
    similarities never exists.

    Returns:
        similarities, highest first, and rows of the bank: both [Q, min(k, M)], on the CPU.
    """
    best = [(torch.zeros(len(q), 0, device=device), torch.zeros(len(q), 0, dtype=torch.int64, device=device))
            for q in queries.split(QUERIES)]
    queries = queries.to(device).split(QUERIES)
    for start in range(0, len(bank), BANK):
        block = bank[start:start + BANK].to(device)
        for i, q in enumerate(queries):
            values, rows = (q @ block.T).topk(min(k, len(block)))
            values, rows = torch.cat([best[i][0], values], dim=1), torch.cat([best[i][1], rows + start], dim=1)
            values, order = values.topk(min(k, values.shape[1]))
            best[i] = values, rows.gather(1, order)
    return tuple(torch.cat(part).cpu() for part in zip(*best))


def accuracies(similarities, classes, targets, ks, temperature, num_classes):
    """Top-1 and top-5 accuracy of the weighted vote, in per cent: a dict {k: (top1, top5)}.

    Args:
        similarities: [Q, K], highest first; classes: of the same neighbours [Q, K]; targets: the right classes [Q].
        ks: how many neighbours vote; all K where that is more.
    """
    results = {}
    for k in ks:
        hits = torch.zeros(2)
        for s, c, t in zip(similarities[:, :k].split(QUERIES), classes[:, :k].split(QUERIES), targets.split(QUERIES)):
            weights = ((s - s[:, :1]) / temperature).exp().double()  # relative to the nearest: no overflow at low temperatures
            votes = torch.zeros(len(t), num_classes, dtype=torch.float64).scatter_add_(1, c, weights)
            values, predicted = votes.topk(min(5, num_classes))
            right = (predicted == t[:, None]) & (values > 0)  # a class without a vote is no prediction
            hits += torch.stack([right[:, 0].sum(), right.sum()])
        results[k] = tuple((100 * hits.double() / len(targets)).tolist())
    return results


# ---- the command ----

def get_args_parser():
    parser = Parser('tools/knn.py', description="Weighted k-nearest-neighbour accuracy of an encoder's features")
    add_encoder_arguments(parser, MODELS)
    group = parser.add_argument_group('neighbours')
    group.add_argument('--k', nargs='+', default=[10, 20, 100, 200], type=bounded(int, 1), metavar='K',
                       help='training images that vote; default: 10 20 100 200')
    group.add_argument('--temperature', default=0.07, type=bounded(float, 1e-6), metavar='T',
                       help='votes weigh exp(similarity / temperature)')
    group.add_argument('--json', metavar='FILE', help='write the accuracies there too')
    group = parser.add_argument_group('running')
    group.add_argument('--batch_size', default=128, type=bounded(int, 1), metavar='N', help='images a process and step')
    add_device_arguments(group)
    group.add_argument('--print_freq', default=20, type=bounded(int, 1), metavar='N', help='steps between two log lines')
    add_data_arguments(parser.add_argument_group('data'))
    add_process_arguments(parser)
    # what util.arguments.setup reads beyond that
    parser.set_defaults(resume='', eval=True, dist_eval=True, accum_iter=1, lr=0.0, compile='off', num_workers=10)
    return parser


def main(args):
    check_sizes(args, MODELS)
    check_checkpoint(args)
    device = setup(args)
    train, val = build_sets(args)
    model = build_encoder(args).to(device)
    bank, classes = extract(model, build_loader(args, train, is_train=False), device, args, 'Training images')
    queries, targets = extract(model, build_loader(args, val, is_train=False), device, args, 'Validation images')
    if not misc.is_main_process():
        return
    ks = sorted(set(args.k))
    if ks[-1] > len(bank):
        print(f'Note: there are only {len(bank)} training images; for a larger k all of them vote')
    similarities, rows = nearest(queries, bank, ks[-1], device)
    results = accuracies(similarities, classes[rows], targets, ks, args.temperature, args.nb_classes)
    print(f'{len(bank)} training images, {len(queries)} validation images, temperature {args.temperature:g}')
    print('       k  top-1, %  top-5, %')
    for k, (top1, top5) in results.items():
        print(f'{k:8d}  {top1:8.2f}  {top5:8.2f}')
    if args.json:
        content = {'train_images': len(bank), 'images': len(queries), 'temperature': args.temperature,
                   'knn': [{'k': k, 'acc1': top1, 'acc5': top5} for k, (top1, top5) in results.items()]}
        with as_user_error(f'--json {args.json} cannot be written', OSError), open(args.json, 'w', encoding='utf-8') as f:
            f.write(json.dumps(content) + '\n')


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
