"""Data loaders: sampling order, sharding, and handling of unreadable images.

New data sources need no change in this file: write a class like image_folder.ImageFolder, and open
it in util.datasets.build_dataset.
"""

import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
from tqdm import tqdm

from util.datasets import (
    DataConfig,
    SeededDataset,
    SeededStream,
    Transform,
    build_dataset,
    check_classes,
)
from util.distributed import gather, is_main_process
from util.errors import UserError
from util.memory import release_freed_memory
from util.seeding import seed_of
from util.signals import ignore_signals


class EpochSampler(torch.utils.data.DistributedSampler):
    """DistributedSampler that yields (epoch, i), so that the workers know the epoch.

    The order is the same for any number of ranks. The first ``start`` samples are skipped when
    an epoch is resumed; the length still counts them.
    """

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, i) for i in islice(super().__iter__(), self.start, None))


class Batches:
    """Batches of a data set of util/datasets.py.

    A batch is (images [N, 3, H, W], uint8 or normalized float; labels [N]; sample indices [N]).

    Each unreadable file is reported once. If there are more than ``limit`` of them in this
    process, the run stops. Evaluation drops them from the batch. At the end of the epoch, rank
    0 prints the total and writes the list.

    Args:
        loader: the DataLoader; its items are those of SeededDataset.
        num_classes: a label outside [0, num_classes) is a UserError; None: do not check.
        shared: whether each process has a share of the samples instead of all of them.
        list_path: file to list the unreadable files in, one ``name <tab> reason`` per line;
            '': none.
    """

    def __init__(
        self,
        loader: torch.utils.data.DataLoader,
        limit: int,
        num_classes: int | None = None,
        evaluation: bool = False,
        shared: bool = True,
        list_path: str = '',
    ) -> None:
        self.loader, self.dataset = loader, loader.dataset
        self.limit, self.list_path = limit, list_path
        self.num_classes, self.evaluation, self.shared = num_classes, evaluation, shared
        self.unreadable: dict[str, str] = {}  # name: reason
        self.num_reported = self.skip_batches = 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Prepare the next epoch, which begins with batch ``start_step``."""
        if isinstance(self.loader.sampler, EpochSampler):
            self.loader.sampler.set_epoch(epoch)
            self.loader.sampler.start = start_step * self.loader.batch_size
        else:
            self.dataset.set_epoch(epoch)
            self.skip_batches = start_step  # a stream has to be read from its beginning
        # The workers' own seeds are drawn from this generator; timm's streams shuffle by them.
        self.loader.generator.manual_seed(seed_of('workers', self.dataset.seed, epoch))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for images, labels, ids, errors in islice(self.loader, self.skip_batches, None):
            for name, reason in chain.from_iterable(map(dict.items, errors)):
                if name not in self.unreadable:
                    self._report(name, reason)
            if self.evaluation and any(errors):
                images, labels, ids = (x[[not e for e in errors]] for x in (images, labels, ids))
            if self.num_classes and ((labels < 0) | (labels >= self.num_classes)).any():
                raise UserError(
                    f'label {labels.max()} in the data: --nb_classes {self.num_classes} is too '
                    'small, or an image has no label'
                )
            yield images, labels, ids
        unreadable = {name: e for part in gather(self.unreadable) for name, e in part.items()}
        if len(unreadable) > self.num_reported and is_main_process():
            self._write_list(unreadable)
            note = f'; they are listed in {self.list_path}' if self.list_path else ''
            print(f'{len(unreadable)} of {len(self.dataset)} images could not be read so far{note}')
        self.num_reported = len(unreadable)

    def _report(self, name: str, reason: str) -> None:
        self.unreadable[name] = reason
        count, total = len(self.unreadable), len(self.dataset)
        action = 'dropped' if self.evaluation else 'replaced by another image'
        tqdm.write(f'Cannot read {name}; {action} ({count} so far): {reason}', file=sys.stderr)
        if count > self.limit or count == total:
            self._write_list(self.unreadable)
            raise UserError(
                f'{count} of {total} images cannot be read, the last one is {name}; repair them, '
                f'or raise --max_bad_images (now {self.limit})'
            )

    def _write_list(self, unreadable: dict[str, str]) -> None:
        # appends the files that are not in the list yet
        if os.path.isdir(os.path.dirname(self.list_path)):
            with open(self.list_path, 'a+', encoding='utf-8', errors='surrogateescape') as f:
                f.seek(0)
                known = {line.split('\t')[0] for line in f}
                f.writelines(f'{k}\t{e}\n' for k, e in unreadable.items() if k not in known)


def _collate(items: list[tuple]) -> tuple:
    images, labels, ids, errors = zip(*items)
    # uint8 images stay channels-last, as decoded: permuting them on the device is faster
    if channels_last := images[0].dtype == torch.uint8:
        images = [image.permute(1, 2, 0) for image in images]
    images, labels, ids = map(torch.utils.data.default_collate, (images, labels, ids))
    return images.permute(0, 3, 1, 2) if channels_last else images, labels, ids, errors


def _init_worker(worker_id: int) -> None:
    ignore_signals()
    release_freed_memory()


def build_loaders(
    data: DataConfig,
    build_transform: Callable[[bool], Transform],
    *,
    num_classes: int,
    accum_iter: int = 1,
    dist_eval: bool = False,
    eval_only: bool = False,
    output_dir: str = '',
) -> tuple[Batches | None, Batches]:
    """Build the training and the validation loader of a classifier.

    Args:
        build_transform: takes is_train and returns the transform.
        eval_only: return None instead of a training loader.
        Others: see build_loader.

    Raises:
        UserError: see build_dataset, check_classes and build_loader.
    """
    val = build_dataset(False, data, build_transform(False))
    train = val if eval_only else build_dataset(True, data, build_transform(True))
    check_classes(data.data_path, num_classes, train, val)
    options = {'num_classes': num_classes, 'output_dir': output_dir}
    return (
        None if eval_only else build_loader(train, data, accum_iter=accum_iter, **options),
        build_loader(val, data, is_train=False, dist_eval=dist_eval, **options),
    )


def build_loader(
    dataset: SeededDataset | SeededStream,
    data: DataConfig,
    *,
    is_train: bool = True,
    accum_iter: int = 1,
    num_classes: int | None = None,
    dist_eval: bool = False,
    output_dir: str = '',
) -> Batches:
    """Build the loader of a data set.

    Args:
        is_train: True: shuffled, this process's share, whole batches. False: in order, every
            sample once.
        accum_iter: number of batches per update of the weights.
        num_classes: see Batches.
        dist_eval: evaluate this process's share of the samples instead of all of them. The
            shares may differ by one sample.
        output_dir: folder for the list of unreadable images; '': do not write a list.

    Raises:
        UserError: if the training set is smaller than one effective batch.
    """
    stream = isinstance(dataset, SeededStream)
    sampler = None  # in order
    if is_train and not stream:
        # the sampler adds the epoch to the seed
        sampler = EpochSampler(
            dataset, data.world_size, data.rank, seed=seed_of('order', data.seed) % 2**32
        )
    elif dist_eval and not stream:
        sampler = range(data.rank, len(dataset), data.world_size)
    # A stream keeps its state in the workers: use at least one, and restart them every epoch,
    # so that every epoch begins in the same way.
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=sampler,
        batch_size=data.batch_size,
        collate_fn=_collate,
        drop_last=is_train,
        num_workers=max(1, data.num_workers) if stream else data.num_workers,
        pin_memory=data.pin_mem,
        persistent_workers=data.num_workers > 0 and not stream,
        generator=torch.Generator(),
        worker_init_fn=_init_worker,
    )
    if is_train and len(loader) < accum_iter:
        raise UserError(
            f'{len(dataset)} images in {data.data_path} are fewer than one effective batch: '
            f'--batch_size {data.batch_size} x --accum_iter {accum_iter} x {data.world_size} '
            'process(es); lower --batch_size'
        )
    return Batches(
        loader,
        data.max_bad_images,
        num_classes,
        evaluation=not is_train,
        shared=is_train or dist_eval and not stream,
        list_path=os.path.join(output_dir, 'unreadable_images.txt') if output_dir else '',
    )
