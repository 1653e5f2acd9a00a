r"""Linear segmentation: train a linear layer on frozen patch tokens and report mIoU.

    python -m tools.segment --model vit_base_patch16 --finetune OUT/checkpoint-399.pth \
        --data_path DATA --nb_classes 21

DATA has images/train, images/val, masks/train and masks/val. The mask of an image is a PNG
file of the same name whose pixels are class indices, 255 where there is no label. Images are
resized to squares. Predictions are compared with the mask at its own size.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from models_probe import build_encoder
from models_vit import MODELS, VisionTransformer
from util.amp import NativeScalerWithGradNormCount, autocast
from util.arguments import (
    add_device_arguments,
    add_encoder_arguments,
    add_print_freq,
    check_checkpoint,
    grid_size_of,
)
from util.cli import Parser, bounded, run
from util.data.image_file import read_image
from util.data.loader import EpochSampler
from util.datasets import BICUBIC, image_folder, normalize
from util.errors import UserError, first_line, refuse
from util.logs import MetricLogger
from util.lr_sched import Schedule, adjust_learning_rate
from util.runtime import start_runtime
from util.seeding import seed_generators, seed_of, seeded

IGNORED = 255


class ImagesAndMasks(torch.utils.data.Dataset):
    """Images [3, S, S] (uint8) with masks (int64), indexed by (epoch, i).

    For training, image and mask are cropped and flipped together, and the mask is
    [S, S]. For evaluation the mask keeps its own size.

    Args:
        data_path: folder with images/SPLIT and masks/SPLIT.
        split: 'train' or 'val'.
        input_size: S, pixels per side.
        num_classes: masks with larger class indices are an error.
        seed: of crops and flips.

    Raises:
        UserError: if there are no images, or a mask is missing.
    """

    def __init__(
        self, data_path: str, split: str, input_size: int, num_classes: int, seed: int
    ) -> None:
        images, masks = (
            Path(image_folder(data_path, f'{kind}/{split}')) for kind in ('images', 'masks')
        )
        paths = sorted(
            p for p in images.rglob('*') if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS
        )
        refuse((not paths, f'--data_path: there are no images in {images}'))
        self.pairs = [(p, masks / p.relative_to(images).with_suffix('.png')) for p in paths]
        for image, mask in self.pairs:
            refuse((not mask.is_file(), f'--data_path: {mask} is missing, the mask of {image}'))
        self.num_classes, self.seed, self.is_train = num_classes, seed, split == 'train'
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(input_size, (0.25, 1.0), interpolation=BICUBIC),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.resize = v2.Resize((input_size, input_size), interpolation=BICUBIC)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, i = key
        try:
            image = v2.functional.pil_to_tensor(read_image(self.pairs[i][0]))
            with Image.open(self.pairs[i][1]) as file:
                mask = tv_tensors.Mask(np.array(file).astype(np.int64))
            largest = mask.where(mask != IGNORED, 0).max().item()
            refuse(
                (
                    mask.shape != image.shape[1:],
                    f'the image is {list(image.shape[1:])}, the mask {list(mask.shape)}; a mask '
                    'has the size of its image and one channel',
                ),
                (
                    largest >= self.num_classes,
                    f'class {largest} is not below --nb_classes {self.num_classes}',
                ),
            )
        except Exception as e:  # decoders raise many types
            pair = '{} and its mask {}'.format(*self.pairs[i])
            raise ValueError(f'{pair}: {first_line(e)}') from e
        seed_generators('augment', self.seed, epoch, i)
        image, mask = self.augment(image, mask) if self.is_train else (self.resize(image), mask)
        return image, mask.as_subclass(torch.Tensor)


class LinearSegmenter(nn.Module):
    """Map normalized images [N, 3, S, S] to logits [N, num_classes, S, S].

    The head is that of linear probing, applied to every patch token. The encoder is frozen.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        with seeded('head', seed):
            self.head = nn.Sequential(
                nn.BatchNorm2d(encoder.embed_dim, affine=False),
                nn.Conv2d(encoder.embed_dim, num_classes, 1),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (features,) = self.encoder.forward_intermediates(
            x, indices=1, norm=True, intermediates_only=True
        )
        return nn.functional.interpolate(self.head(features), size=x.shape[2:], mode='bilinear')


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: torch.utils.data.DataLoader,
    num_classes: int,
    device: torch.device,
    amp: str = 'fp32',
    print_freq: int = 20,
) -> tuple[float, float]:
    """Return mIoU and pixel accuracy in percent.

    mIoU is the mean over the classes that occur in a mask or a prediction.

    Args:
        loader: yields images [N, 3, S, S] (uint8) and masks [N, H, W].
    """
    model.eval()
    # number of pixels by label and prediction
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    for images, masks in MetricLogger().log_every(loader, print_freq, 'Evaluation'):
        masks = masks.to(device)
        with autocast(device, amp):
            logits = model(normalize(images.to(device)))
        predicted = nn.functional.interpolate(
            logits.float(), size=masks.shape[1:], mode='bilinear'
        ).argmax(1)
        pairs = (masks * num_classes + predicted)[masks != IGNORED]
        counts += pairs.bincount(minlength=len(counts))
    counts = counts.double().reshape(num_classes, num_classes)
    correct = counts.diag()
    union = counts.sum(0) + counts.sum(1) - correct
    # 0 / 0 is nan: a class that does not occur
    return 100 * (correct / union).nanmean().item(), 100 * (correct.sum() / counts.sum()).item()


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.segment', description=__doc__)
    add_encoder_arguments(parser, MODELS, pooling=False)
    group = parser.add_argument_group('training')
    group.add_argument(
        '--batch_size', default=16, type=bounded(int, 1), metavar='N', help='images per step'
    )
    group.add_argument(
        '--epochs',
        default=10,
        type=bounded(int, 1),
        metavar='N',
        help='number of epochs',
    )
    group.add_argument(
        '--lr',
        default=1e-3,
        type=bounded(float, 0),
        metavar='LR',
        help='learning rate of AdamW; it falls to 0 along a half cosine',
    )
    group.add_argument(
        '--weight_decay', default=0.01, type=bounded(float, 0), metavar='W', help='of AdamW'
    )
    add_print_freq(group)
    add_device_arguments(group)
    group = parser.add_argument_group('data')
    group.add_argument(
        '--data_path', metavar='DIR', help='folder with images/ and masks/, train/ and val/ in each'
    )
    group.add_argument(
        '--num_workers', default=8, type=bounded(int, 0), metavar='N', help='data-loader workers'
    )
    return parser


def main(args: argparse.Namespace) -> None:
    grid_size_of(args.model, MODELS[args.model], args.input_size)
    check_checkpoint('--finetune', args.finetune)
    runtime = start_runtime(
        device=args.device, amp=args.amp, seed=args.seed, num_workers=args.num_workers
    )
    refuse((runtime.world_size > 1, 'tools.segment runs as one process; start it without torchrun'))
    if not args.finetune:
        print('No --finetune: the encoder has random weights')

    # ---- data
    train, val = (
        ImagesAndMasks(args.data_path, split, args.input_size, args.nb_classes, args.seed)
        for split in ('train', 'val')
    )
    refuse(
        (
            len(train) < args.batch_size,
            f'--batch_size {args.batch_size}: there are only {len(train)} training images',
        )
    )
    options = {'num_workers': runtime.num_workers, 'pin_memory': runtime.pin_mem}
    loader = torch.utils.data.DataLoader(
        train,
        args.batch_size,
        sampler=EpochSampler(train, 1, 0, seed=seed_of('order', args.seed) % 2**32),
        drop_last=True,
        **options,
    )
    # one image at a time, because the masks differ in size
    loader_val = torch.utils.data.DataLoader(
        val, sampler=[(0, i) for i in range(len(val))], **options
    )

    # ---- model
    encoder = build_encoder(
        args.model,
        input_size=args.input_size,
        global_pool=False,
        finetune=args.finetune,
        seed=args.seed,
    )
    model = LinearSegmenter(encoder, args.nb_classes, args.seed).to(runtime.device)
    optimizer = torch.optim.AdamW(
        model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay
    )
    schedule = Schedule(args.lr, min_lr=0.0, warmup_epochs=0, epochs=args.epochs)
    scaler = NativeScalerWithGradNormCount(enabled=runtime.amp == 'fp16', device=runtime.device)

    # ---- training loop
    try:
        for epoch in range(args.epochs):
            model.train()
            loader.sampler.set_epoch(epoch)
            log = MetricLogger()
            for step, (images, masks) in enumerate(
                log.log_every(loader, args.print_freq, f'Epoch [{epoch}]', args.batch_size)
            ):
                adjust_learning_rate(optimizer, epoch + step / len(loader), schedule)
                with autocast(runtime.device, runtime.amp):
                    loss = nn.functional.cross_entropy(
                        model(normalize(images.to(runtime.device))),
                        masks.to(runtime.device),
                        ignore_index=IGNORED,
                    )
                optimizer.zero_grad()
                scaler(loss, optimizer)
                if log.due:
                    log.update(loss=loss.item())
            refuse(
                (
                    scaler.skipped >= len(loader),
                    f'all steps of epoch {epoch} had NaN or Inf gradients; lower --lr {args.lr}, '
                    'or use --amp fp32',
                )
            )
        miou, accuracy = evaluate(
            model, loader_val, args.nb_classes, runtime.device, runtime.amp, args.print_freq
        )
    except ValueError as e:  # from a loader worker it comes with a traceback as its text
        raise UserError(str(e).strip().splitlines()[-1].removeprefix('ValueError: ')) from e
    print(
        f'mIoU {miou:.2f} %, pixel accuracy {accuracy:.2f} % '
        f'({len(val)} images, {args.nb_classes} classes)'
    )


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
