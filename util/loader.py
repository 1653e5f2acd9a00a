"""Loaders: which samples a process sees in which order, and what becomes of images that cannot be read."""

import os
import sys
from itertools import islice

import torch
from tqdm import tqdm

from util.datasets import SeededStream, build_dataset, check_classes
from util.distributed import gather, is_main_process
from util.errors import UserError
from util.interruption import ignore_signals
from util.memory import give_back_freed_memory
from util.seeding import seed_of


class EpochSampler(torch.utils.data.DistributedSampler):
    """DistributedSampler that tells the workers the epoch: it yields (epoch, i). Any number of ranks share one order.

    The first ``start`` samples are left out where an epoch goes on; they still count in the length.
    """

    start = 0

    def __iter__(self):
        return ((self.epoch, i) for i in islice(super().__iter__(), self.start, None))


class Batches:
    """Batches of a loader over a data set of util/datasets.py.

    A batch is (images [N, 3, H, W], bytes or normalised floats; classes [N]; sample numbers [N]).
    Each file that had to be passed over is named once; more than ``limit`` of them in this process end the run. In evaluation
    they are left out of the batch. When all processes are through, the first tells how many there are and lists them.

    Args:
        list_path: the file to list them in, a name and a reason a line; None: none.
        num_classes: a class outside [0, num_classes) is a UserError; None: not looked at.
        shared: every process has a share of the samples, and not all of them.
    """

    def __init__(self, loader, limit, num_classes=None, evaluation=False, shared=True, list_path=None):
        self.loader = loader
        self.shared = shared
        self.limit = limit
        self.num_classes = num_classes
        self.evaluation = evaluation
        self.list_path = list_path
        self.unreadable = {}  # reason by name
        self.told = 0
        self.passed_over = 0

    @property
    def dataset(self):
        return self.loader.dataset

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch, step=0):
        """To be called before each epoch; it then begins with batch ``step``."""
        if isinstance(self.loader.sampler, EpochSampler):
            self.loader.sampler.set_epoch(epoch)
            self.loader.sampler.start = step * self.loader.batch_size
        else:
            self.loader.dataset.set_epoch(epoch)
            self.passed_over = step  # a stream has to be read from its beginning
        # The workers' own seeds are drawn from this generator; timm's streams shuffle by them.
        self.loader.generator.manual_seed(seed_of('workers', self.loader.dataset.seed, epoch))

    def __iter__(self):
        for images, targets, samples, skipped in islice(self.loader, self.passed_over, None):
            if skipped.any():
                for i in skipped.nonzero()[:, 0].tolist():
                    self._report(samples[i].item(), skipped[i].item())
                if self.evaluation:
                    images, targets, samples = images[skipped == 0], targets[skipped == 0], samples[skipped == 0]
            if self.num_classes is not None and ((targets < 0) | (targets >= self.num_classes)).any():
                raise UserError(f'class {targets.max()} in the data: --nb_classes {self.num_classes} is too small, or an image '
                                'has no class')
            yield images, targets, samples
        self._sum_up()

    def _report(self, sample, skipped):
        dataset = self.loader.dataset
        for k in range(sample, sample + skipped):
            name = dataset.name(k % len(dataset))
            if name in self.unreadable:
                continue
            self.unreadable[name] = dataset.why(k % len(dataset))
            what = 'it is left out' if self.evaluation else 'another one takes its place'
            tqdm.write(f'Image {name} cannot be read; {what} ({len(self.unreadable)} so far): {self.unreadable[name]}',
                       file=sys.stderr)
        if len(self.unreadable) > self.limit or len(self.unreadable) == len(dataset):
            self._list(self.unreadable)
            raise UserError(f'{len(self.unreadable)} of {len(dataset)} images cannot be read, the last {name}; '
                            'repair them, or allow more with --max_bad_images')

    def _sum_up(self):
        everywhere = {name: why for part in gather(self.unreadable) for name, why in part.items()}
        if len(everywhere) > self.told and is_main_process():
            self._list(everywhere)
            where = f'; they are listed in {self.list_path}' if self.list_path else ''
            print(f'{len(everywhere)} of {len(self.dataset)} images could not be read so far{where}')
        self.told = len(everywhere)

    def _list(self, unreadable):
        """Add to the list what is not in it yet."""
        if not self.list_path or not os.path.isdir(os.path.dirname(self.list_path)):
            return
        known = set()
        if os.path.exists(self.list_path):
            with open(self.list_path, encoding='utf-8', errors='surrogateescape') as f:
                known = {line.split('\t')[0] for line in f}
        with open(self.list_path, 'a', encoding='utf-8', errors='surrogateescape') as f:
            f.writelines(f'{name}\t{why}\n' for name, why in unreadable.items() if name not in known)


def collate(samples):
    """A batch. The channels of bytes stay last in memory, as decoders write them: the device turns them round in less time."""
    if samples[0][0].dtype != torch.uint8:
        return torch.utils.data.default_collate(samples)
    images, *rest = torch.utils.data.default_collate([(image.permute(1, 2, 0), *rest) for image, *rest in samples])
    return images.permute(0, 3, 1, 2), *rest


def begin_worker(number):
    ignore_signals()
    give_back_freed_memory()


def build_loaders(args, build_transform):
    """(training, validation) Batches of a classifier's data; the former is None with args.eval.

    Args:
        build_transform: from (is_train, args) to a transform.

    Raises:
        UserError: what build_dataset, check_classes and build_loader raise.
    """
    val = build_dataset(False, args, build_transform(False, args))
    if args.eval:
        check_classes(args, val)
        return None, build_loader(args, val, is_train=False)
    train = build_dataset(True, args, build_transform(True, args))
    check_classes(args, train, val)
    return build_loader(args, train), build_loader(args, val, is_train=False)


def build_loader(args, dataset, is_train=True):
    """Batches of ``dataset``.

    For training: shuffled, this process's share, whole batches. For evaluation: in order, every sample once; with args.dist_eval
    this process's share of them, which need not be as long as the others'.

    Raises:
        UserError: a training set that gives not a single update of the weights in an epoch.
    """
    stream = isinstance(dataset, SeededStream)
    if stream:
        sampler = None
    elif is_train:
        sampler = EpochSampler(dataset, num_replicas=args.world_size, rank=args.rank, shuffle=True,
                               seed=seed_of('order', args.seed) % 2**32)  # the sampler adds the epoch to it
    else:
        sampler = range(args.rank, len(dataset), args.world_size) if args.dist_eval else range(len(dataset))
    if is_train and len(dataset if stream else sampler) // args.batch_size < args.accum_iter:
        raise UserError(
            f'{len(dataset)} images in {args.data_path} are fewer than one effective batch: --batch_size {args.batch_size} x '
            f'--accum_iter {args.accum_iter} x {args.world_size} process(es); lower --batch_size')
    # A stream's state stays in its workers: it needs at least one, and new ones every epoch, to begin every epoch alike.
    workers = max(1, args.num_workers) if stream else args.num_workers
    loader = torch.utils.data.DataLoader(
        dataset, sampler=sampler, batch_size=args.batch_size, collate_fn=collate, drop_last=is_train,
        num_workers=workers, pin_memory=args.pin_mem, persistent_workers=workers > 0 and not stream, generator=torch.Generator(),
        worker_init_fn=begin_worker)
    return Batches(loader, args.max_bad_images, getattr(args, 'nb_classes', None), evaluation=not is_train,
                   shared=is_train or args.dist_eval and not stream,
                   list_path=os.path.join(args.output_dir, 'unreadable_images.txt') if getattr(args, 'output_dir', '') else None)

