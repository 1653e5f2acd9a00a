"""Linear segmentation, a worked example of dense features: one linear layer on a frozen encoder's patch tokens, judged by mIoU.

    python tools/segment.py --model vit_base_patch16 --finetune OUT/checkpoint-399.pth --data_path DATA --nb_classes 21

DATA has images/train, images/val and masks/train, masks/val: for each image a PNG of its name whose values are classes, 255 where
none is given. Pictures are resized to squares; what is predicted is compared at the mask's own size.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds only its own folder

from engine_finetune import train_one_epoch  # noqa: E402
from models_vit import MODELS  # noqa: E402
from util import arguments, misc  # noqa: E402
from util.arguments import bounded  # noqa: E402
from util.datasets import BICUBIC, image_folder  # noqa: E402
from util.errors import UserError, first_line  # noqa: E402
from util.images import read_image  # noqa: E402
from util.loader import EpochSampler  # noqa: E402
from util.probes import build_encoder  # noqa: E402
from util.seeding import seed_generators, seed_of, seeded  # noqa: E402

IGNORED = 255


class Pictures(torch.utils.data.Dataset):
    """Pairs (image [3, S, S], mask int64 [S, S], for val of its own size), indexed by (epoch, i)."""

    def __init__(self, args, split):
        images, masks = (Path(image_folder(args, f'{kind}/{split}')) for kind in ('images', 'masks'))
        paths = sorted(path for path in images.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
        self.pairs = [(path, masks / path.relative_to(images).with_suffix('.png')) for path in paths]
        missing = [mask for _, mask in self.pairs if not mask.is_file()]
        if missing or not paths:
            raise UserError(f'--data_path: there is no {missing[0]}' if missing else f'--data_path: no images in {images}')
        size = (args.input_size, args.input_size)
        self.classes, self.seed, self.train = args.nb_classes, args.seed, split == 'train'
        self.crop = v2.Compose([v2.RandomResizedCrop(size, (0.25, 1.0), interpolation=BICUBIC), v2.RandomHorizontalFlip()])
        self.whole = v2.Resize(size, interpolation=BICUBIC)
        self.finish = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                                  v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        epoch, i = key
        try:
            image, mask = self.read(*self.pairs[i])
        except Exception as e:  # whatever a decoder raises
            raise ValueError(f'{self.pairs[i][0]} and its mask {self.pairs[i][1]}: {first_line(e)}') from e
        seed_generators('augment', self.seed, epoch, i)
        image, mask = self.crop(image, tv_tensors.Mask(mask)) if self.train else (self.whole(image), mask)
        return self.finish(image), mask.as_subclass(torch.Tensor), i

    def read(self, image, mask):
        image = v2.functional.pil_to_tensor(read_image(image))
        with Image.open(mask) as file:
            mask = torch.from_numpy(np.array(file).astype(np.int64))
        if mask.shape != image.shape[1:]:
            raise ValueError(f'{list(image.shape[1:])} and {list(mask.shape)}; a mask has its image\'s size and one channel')
        largest = mask.where(mask != IGNORED, 0).max().item()
        if largest >= self.classes:
            raise ValueError(f'class {largest}, but --nb_classes {self.classes}')
        return image, mask


class LinearSegmenter(nn.Module):
    """Images [N, 3, S, S] -> logits [N, classes, S, S]. The head is linear probing's, at every patch; the encoder is frozen."""

    def __init__(self, encoder, args):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        with seeded('head', args.seed):
            layer = nn.Conv2d(encoder.embed_dim, args.nb_classes, 1)
        self.head = nn.Sequential(nn.BatchNorm2d(encoder.embed_dim, affine=False), layer)

    def forward(self, x):
        features, = self.encoder.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return F.interpolate(self.head(features), size=x.shape[2:], mode='bilinear')


@torch.no_grad()
def evaluate(model, loader, device, args):
    """(mean over the classes that occur of intersection over union, share of pixels that are right), both in per cent."""
    model.eval()
    counts = torch.zeros(args.nb_classes**2, dtype=torch.int64, device=device)  # of pixels, by truth and prediction
    for images, masks, _ in misc.MetricLogger().log_every(loader, args.print_freq, 'Evaluation'):
        images, masks = images.to(device), masks.to(device)
        with misc.autocast(device, args.amp):
            logits = model(images)
        predicted = F.interpolate(logits.float(), size=masks.shape[1:], mode='bilinear').argmax(dim=1)
        given = masks != IGNORED
        counts += torch.bincount(masks[given] * args.nb_classes + predicted[given], minlength=len(counts))
    counts = counts.double().reshape(args.nb_classes, -1)
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    return (100 * right / union)[union > 0].mean().item(), (100 * right.sum() / counts.sum()).item()


def get_args_parser():
    parser = arguments.Parser('tools/segment.py', description='Linear segmentation on frozen patch features')
    arguments.add_encoder_arguments(parser, MODELS, pooling=False)
    group = parser.add_argument_group('training')
    group.add_argument('--batch_size', default=16, type=bounded(int, 1), metavar='N', help='images a step')
    group.add_argument('--epochs', default=10, type=bounded(int, 1), metavar='N', help='passes over the training images')
    group.add_argument('--lr', default=1e-3, type=bounded(float, 0), metavar='LR',
                       help="AdamW's learning rate; half a cosine leads to 0")
    group.add_argument('--weight_decay', default=0.01, type=bounded(float, 0), metavar='W', help="AdamW's")
    group.add_argument('--print_freq', default=20, type=bounded(int, 1), metavar='N', help='steps between two log lines')
    arguments.add_device_arguments(group)
    group = parser.add_argument_group('data')
    group.add_argument('--data_path', metavar='DIR', help='folder with images/ and masks/, train/ and val/ in each')
    group.add_argument('--num_workers', default=8, type=bounded(int, 0), metavar='N', help='loader processes')
    # what util.arguments.setup and the training loop read beyond that
    parser.set_defaults(resume='', eval=True, accum_iter=1, compile='off', min_lr=0.0, warmup_epochs=0, pin_mem=True,
                        world_size=1, local_rank=-1, dist_on_itp=False, dist_url='env://', dist_timeout=10.0,
                        global_pool=False, output_dir='', max_skipped_steps=10)
    return parser


def main(args):
    arguments.check_sizes(args, MODELS)
    arguments.check_checkpoint(args)
    device = arguments.setup(args)
    if args.world_size > 1:
        raise UserError('tools/segment.py runs as one process; start it without torchrun')
    train, val = Pictures(args, 'train'), Pictures(args, 'val')
    if len(train) < args.batch_size:
        raise UserError(f'--batch_size {args.batch_size}: there are only {len(train)} training images')
    sampler = EpochSampler(train, 1, 0, seed=seed_of('order', args.seed) % 2**32)
    loading = dict(num_workers=args.num_workers, pin_memory=args.pin_mem)
    loader = torch.utils.data.DataLoader(train, args.batch_size, sampler=sampler, drop_last=True, **loading)
    loader_val = torch.utils.data.DataLoader(val, sampler=[(0, i) for i in range(len(val))], **loading)  # masks of any size

    model = LinearSegmenter(build_encoder(args), args).to(device)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = misc.NativeScalerWithGradNormCount(enabled=args.amp == 'fp16', device=device)
    try:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            train_one_epoch(model, nn.CrossEntropyLoss(ignore_index=IGNORED), loader, optimizer, device, epoch, scaler, args=args)
        miou, pixels = evaluate(model, loader_val, device, args)
    except ValueError as e:  # that of a loader's worker comes with its traceback
        raise UserError(str(e).strip().splitlines()[-1].removeprefix('ValueError: ')) from e
    print(f'mIoU {miou:.2f} %, {pixels:.2f} % of the pixels are right ({len(val)} images, {args.nb_classes} classes)')


if __name__ == '__main__':
    misc.run(main, get_args_parser().parse_args())
