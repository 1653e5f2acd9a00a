"""Data sets and transforms. Augmentation is a function of (seed, epoch, sample)."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

from util.crop import resized_crop_box, single_crop_box
from util.data.image_file import ImageFile, UnreadableImage, unreadable
from util.data.image_folder import ImageFolder
from util.data.timm_sources import open_source
from util.distributed import main_process_first
from util.errors import UserError, as_user_error, first_line, refuse
from util.seeding import seed_generators, seed_of, seeded

BICUBIC = transforms.InterpolationMode.BICUBIC
BLANK = Image.new('RGB', (8, 8))

Transform = Callable[[ImageFile], torch.Tensor]


@dataclass(frozen=True)
class DataConfig:
    """Configuration of data sets and loaders. The fields are named like the flags.

    Attributes:
        data_path: folder with train/ and val/, or the place of ``dataset``.
        dataset: name of a timm data set; '' for image folders.
        train_split, val_split: splits of ``dataset``; not used with image folders.
        batch_size: images per process and step.
        num_workers: loader workers per process.
        max_bad_images: unreadable images that one process tolerates before the run stops.
    """

    data_path: str | None
    dataset: str = ''
    train_split: str = 'train'
    val_split: str = 'validation'
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 0
    pin_mem: bool = False
    max_bad_images: int = 100
    rank: int = 0
    world_size: int = 1


class SeededDataset(torch.utils.data.Dataset):
    """A data set indexed by (epoch, i), as EpochSampler yields them, or by i (epoch 0).

    An item is (image [3, H, W], label, i, errors). An unreadable image is replaced by the next
    one in the list. ``errors`` maps the names of unreadable images to the reasons. Batches
    reports them and stops the run if there are too many.

    Args:
        source: has a length; ``source[i]`` is (image, label), where image is a path, an open
            file, bytes or a PIL image; ``source.name(i)`` identifies the image in messages;
            ``source.classes`` lists the class names, or is None.
        transform: turns an ImageFile into a tensor [3, H, W].
        limit: after limit + 1 unreadable images in a row, the item is a blank image.
        replace: False: the item is a blank image if image i cannot be read. Evaluation must not
            count another image twice.
    """

    def __init__(
        self,
        source: Sequence,
        transform: Transform,
        seed: int = 0,
        limit: int = 100,
        replace: bool = True,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.tries = min(limit + 1, len(source)) if replace else 1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int, int, dict]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        errors = {}
        for k in (*range(i, i + self.tries), None):
            try:
                with unreadable():
                    image, label = (BLANK, 0) if k is None else self.source[k % len(self)]
                # not restored afterwards: that would cost about 5 % of the time per sample
                seed_generators('augment', self.seed, epoch, i)
                return self.transform(ImageFile(image)), label, i, errors
            except UnreadableImage as e:
                errors[self.source.name(k % len(self))] = first_line(e)


class SeededStream(torch.utils.data.IterableDataset):
    """A data set that can only be read in order, such as WebDataset shards.

    Items are those of SeededDataset, except that an unreadable image is replaced by the
    previous one. Samples are numbered in the order in which they come, so their crops depend on
    the numbers of processes and workers. timm's readers choose the order of the samples, seeded
    by (seed, epoch).

    Args:
        source: iterates over (image, label); has a length, set_epoch(epoch) and ``classes``.
        transform: turns an ImageFile into a tensor [3, H, W].
    """

    def __init__(
        self,
        source: Iterable,
        transform: Transform,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int, dict]]:
        worker = torch.utils.data.get_worker_info()  # None in the main process
        last_good, last_label = ImageFile(BLANK), 0
        for count, (image, label) in enumerate(self.source):
            local = count * worker.num_workers + worker.id if worker else count
            i = local * self.world_size + self.rank
            # restored afterwards, because timm's readers draw from the same generators
            with seeded('augment', self.seed, self.epoch, i):
                try:
                    file, errors = ImageFile(image), {}
                    x = self.transform(file)
                    last_good, last_label = file, label
                except UnreadableImage as e:
                    # replaced, because all processes must see the same number of steps
                    x, errors = self.transform(last_good), {f'sample {i}': first_line(e)}
            yield x, last_label, i, errors


def build_dataset(
    is_train: bool, data: DataConfig, transform: Transform
) -> SeededDataset | SeededStream:
    """Open the training or the validation set.

    Raises:
        UserError: if --data_path or --dataset is wrong, or the data cannot be read or is empty.
    """
    check_data_flags(data.data_path, data.dataset)
    if data.dataset:
        split = data.train_split if is_train else data.val_split
        source = open_source(
            data.dataset,
            data.data_path,
            split,
            is_train=is_train,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            seed=seed_of('order', data.seed) % 2**31,
        )
        if isinstance(source, torch.utils.data.IterableDataset):
            return SeededStream(source, transform, data.seed, data.rank, data.world_size)
        place = f'split {split} of {data.data_path}'
    else:
        place = image_folder(data.data_path, 'train' if is_train else 'val')
        with main_process_first():  # the other processes find its list in the cache
            source = ImageFolder(place)
        if empty := sorted(set(range(len(source.classes))) - set(source.targets.tolist())):
            print(
                f'Note: there are no images in {place}/{source.classes[empty[0]]} '
                f'({len(empty)} empty class folders in all)'
            )
    if len(source) == 0:
        raise UserError(f'--data_path: there are no images in {place}')
    return SeededDataset(source, transform, data.seed, data.max_bad_images, replace=is_train)


def check_data_flags(data_path: str | None, dataset: str = '') -> None:
    """Raise UserError if --data_path is missing or --dataset is malformed.

    Whether the data exists is not checked: that is up to the machine that reads it.
    """
    kind = ''.join(dataset.lower().partition('/')[:2])  # 'torch/' of torch/NAME
    refuse(
        (
            kind not in ('', 'tar', 'folder', 'torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/'),
            f'--dataset {dataset}: must be tar, folder, torch/NAME, hfds/NAME, hfids/NAME, '
            'tfds/NAME or wds/NAME',
        ),
        (
            not data_path and not dataset,
            '--data_path is missing: give a folder with train/ and val/, each with one '
            'subfolder per class',
        ),
        (
            not data_path and kind not in ('hfds/', 'hfids/', 'tfds/'),
            f'--data_path is missing: give the folder or file of --dataset {dataset}',
        ),
    )


def image_folder(data_path: str | None, split: str) -> str:
    """Return the folder ``data_path``/``split``. Raises UserError if it does not exist."""
    check_data_flags(data_path)
    root = os.path.join(data_path, split)
    if not os.path.isdir(root):
        raise UserError(f'--data_path {data_path} has no folder {split}/ in it')
    return root


def check_classes(
    data_path: str | None, num_classes: int, *datasets: SeededDataset | SeededStream
) -> None:
    """Raise UserError unless all data sets have the same ``num_classes`` classes.

    Data sets whose class names are unknown are not checked.
    """
    known = [d.source.classes for d in datasets if d.source.classes is not None]
    for names in known:
        refuse(
            (
                names != known[0],
                f'--data_path {data_path}: training and validation set have different classes; '
                f'{min(set(names) ^ set(known[0]), default="")} is in one of them only',
            ),
            (
                len(names) != num_classes,
                f'--nb_classes {num_classes}, but {data_path} has {len(names)} classes; '
                f'give --nb_classes {len(names)}',
            ),
        )


# ---- transforms: from an ImageFile to uint8 [3, H, W], or to float that is already normalized ----


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalize a batch with ImageNet's mean and std, on its device.

    Not done by the loader workers, because uint8 batches are 4x smaller to transfer.

    Args:
        images: [N, 3, H, W], uint8; or float, which is returned unchanged.

    Returns:
        float32 [N, 3, H, W].
    """
    if images.dtype != torch.uint8:
        return images
    mean, std = _statistics(images.device)
    return images.contiguous().float().div_(255).sub_(mean).div_(std)


@lru_cache
def _statistics(device: torch.device) -> torch.Tensor:
    return torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device)[
        ..., None, None
    ]


def random_resized_crop(
    image: ImageFile,
    size: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    draw: Callable = resized_crop_box,
) -> torch.Tensor:
    """Crop an image at random, and resize it bicubically.

    Args:
        scale: range of the area, as a fraction of the image's.
        ratio: range of the aspect ratio, width / height.
        draw: resized_crop_box or single_crop_box.

    Returns:
        uint8 [3, size, size].
    """
    return image.crop(draw(*image.size, scale, ratio), size)


def build_pretrain_transform(input_size: int) -> Transform:
    """Build MAE's augmentation: random resized crop of 20 to 100 % of the area, and flip."""
    return transforms.Compose(
        [
            partial(random_resized_crop, size=input_size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
        ]
    )


def build_transform(
    is_train: bool,
    input_size: int,
    *,
    color_jitter: float | None = None,
    aa: str = 'rand-m9-mstd0.5-inc1',
    reprob: float = 0.25,
    remode: str = 'pixel',
    recount: int = 1,
) -> Transform:
    """Build the transform for fine-tuning.

    Training: random resized crop, flip, timm's auto-augmentation and random erasing.
    Evaluation: resize and center crop. The keyword arguments are named like the flags.

    Raises:
        UserError: if timm does not know the policy ``aa``.
    """
    if not is_train:
        return _center_crop(
            input_size, input_size * 256 // 224 if input_size <= 224 else input_size
        )
    with as_user_error(
        f"--aa {aa}: must be a policy of timm such as rand-m9-mstd0.5-inc1, or '' for none",
        AssertionError,
        ValueError,
        KeyError,
        IndexError,
    ):
        _, augment, to_tensor = create_transform(
            input_size=input_size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa or None,
            interpolation='bicubic',
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            separate=True,
        )
    # our crop and flip instead of timm's: the same distribution, drawn before decoding
    return transforms.Compose(
        [
            partial(random_resized_crop, size=input_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToPILImage(),
            augment,
            to_tensor,
        ]
    )


def build_linprobe_transform(is_train: bool, input_size: int) -> Transform:
    """Build the transform for linear probing (MAE, appendix A.1).

    Training: random resized crop and flip. Evaluation: resize (256 for 224) and center crop.
    """
    if not is_train:
        return _center_crop(input_size, input_size * 256 // 224)
    return transforms.Compose(
        [
            partial(random_resized_crop, size=input_size, draw=single_crop_box),
            transforms.RandomHorizontalFlip(),
        ]
    )


def _center_crop(size: int, resize: int) -> Transform:
    # by PIL, because published accuracies are compared to a hundredth of a percent
    return transforms.Compose(
        [
            ImageFile.rgb,
            transforms.Resize(resize, interpolation=BICUBIC),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
