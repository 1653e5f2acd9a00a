"""Data sets, transforms and loaders: image folders whose augmentations depend on (seed, epoch, sample) alone."""

import os
import sys

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets, transforms
from tqdm import tqdm

from util.errors import UserError
from util.seeding import seed_of, seeded

BICUBIC = transforms.InterpolationMode.BICUBIC


class SeededImageFolder(datasets.ImageFolder):
    """ImageFolder indexed by (epoch, i), as EpochSampler gives them.

    An item is (image, class, i, skipped). A file that cannot be read is passed over for the next one in the list, and ``skipped``
    counts these; the loader's user names them and decides when it is too many.
    """

    def __init__(self, root, transform, seed=0, limit=100):
        try:
            super().__init__(root, transform, allow_empty=True)
        except FileNotFoundError:
            raise UserError(f'--data_path: {root} has no class folders; put the images into {root}/CLASS/') from None
        if not self.samples:
            raise UserError(f'--data_path: there are no images in the class folders of {root}')
        self.seed = seed
        self.limit = min(limit + 1, len(self.samples))

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        for skipped in range(self.limit):
            path, target = self.samples[(i + skipped) % len(self.samples)]
            try:
                image = self.loader(path)
                break
            except Exception:  # whatever a decoder raises on a broken file, and files that have gone away
                continue
        else:  # the limit is passed and the run is about to stop
            skipped, image = self.limit, Image.new('RGB', (8, 8))
        with seeded('augment', self.seed, epoch, i):
            image = self.transform(image)
        return image, target, i, skipped


class EpochSampler(torch.utils.data.DistributedSampler):
    """DistributedSampler that tells the workers the epoch: it yields (epoch, i). Any number of ranks share one order."""

    def __iter__(self):
        return ((self.epoch, i) for i in super().__iter__())


class UnreadableImages:
    """Batches (images, classes, sample numbers) of a loader over a SeededImageFolder.

    Each file that had to be passed over is named once; more than ``limit`` of them in this process end the run.
    """

    def __init__(self, loader, limit):
        self.loader = loader
        self.limit = limit
        self.paths = set()

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.loader.sampler.set_epoch(epoch)

    def __iter__(self):
        for images, targets, samples, skipped in self.loader:
            for i in skipped.nonzero()[:, 0].tolist():
                self._report(samples[i].item(), skipped[i].item())
            yield images, targets, samples

    def _report(self, sample, skipped):
        files = self.loader.dataset.samples
        for k in range(sample, sample + skipped):
            path = files[k % len(files)][0]
            if path in self.paths:
                continue
            self.paths.add(path)
            tqdm.write(f'Image {path} cannot be read; another one takes its place ({len(self.paths)} so far)', file=sys.stderr)
        if len(self.paths) > self.limit or len(self.paths) == len(files):
            raise UserError(f'{len(self.paths)} of {len(files)} images cannot be read, the last {path}; '
                            'repair them, or allow more with --max_bad_images')


def build_pretrain_transform(args):
    """MAE's augmentation: random resized crop of 20 to 100 % of the area, bicubic; flip; ImageNet's mean and deviation."""
    return transforms.Compose([
        transforms.RandomResizedCrop(args.input_size, scale=(0.2, 1.0), interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def build_pretrain_loader(args):
    """Loader over args.data_path/train with batches (images, classes, sample numbers); see SeededImageFolder.

    Raises UserError where the folder is missing or gives not a single update of the weights in an epoch.
    """
    dataset = SeededImageFolder(
        image_folder(args, 'train'), build_pretrain_transform(args), args.seed, limit=args.max_bad_images)
    sampler = EpochSampler(dataset, num_replicas=args.world_size, rank=args.rank, shuffle=True,
                           seed=seed_of('order', args.seed) % 2**32)  # the sampler adds the epoch to it
    steps = len(sampler) // args.batch_size
    if steps < args.accum_iter:
        raise UserError(
            f'{len(dataset)} images in {dataset.root} are fewer than one effective batch: --batch_size {args.batch_size} x '
            f'--accum_iter {args.accum_iter} x {args.world_size} process(es); lower --batch_size')
    loader = torch.utils.data.DataLoader(
        dataset, sampler=sampler, batch_size=args.batch_size, num_workers=args.num_workers, pin_memory=args.pin_mem,
        drop_last=True, persistent_workers=args.num_workers > 0)
    return UnreadableImages(loader, args.max_bad_images)


def image_folder(args, split):
    """args.data_path/split, after checking that it is there."""
    if not args.data_path:
        raise UserError('--data_path is missing: give the folder that holds train/ and val/, a folder a class in each')
    if not os.path.isdir(args.data_path):
        raise UserError(f'--data_path {args.data_path} is not a folder; it should hold train/ and val/, a folder a class in each')
    root = os.path.join(args.data_path, split)
    if not os.path.isdir(root):
        raise UserError(f'--data_path {args.data_path} has no folder {split}/ in it')
    return root


def build_dataset(is_train, args):
    """ImageFolder over train/ or val/ with the classifier's transform."""
    return datasets.ImageFolder(image_folder(args, 'train' if is_train else 'val'), build_transform(is_train, args))


def build_transform(is_train, args):
    """Fine-tuning's transforms: timm's RandAugment and random erasing for training, resize and centre crop for evaluation."""
    if is_train:
        return create_transform(
            input_size=args.input_size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
            interpolation='bicubic', re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
            mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    crop_ratio = 224 / 256 if args.input_size <= 224 else 1.0
    return transforms.Compose([
        transforms.Resize(int(args.input_size / crop_ratio), interpolation=BICUBIC),
        transforms.CenterCrop(args.input_size),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])
