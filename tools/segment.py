r"""Linear segmentation: train a linear layer on frozen patch tokens and report mIoU.

    python -m tools.segment --model vit_base_patch16 --finetune OUT/checkpoint-399.pth \
        --data_path DATA --nb_classes 21

DATA has images/train, images/val, masks/train and masks/val. The mask of an image is a PNG
file of the same name whose pixels are class indices, 255 where there is no label. Images are
resized to squares. Predictions are compared with the mask at its own size.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from models_probe import build_encoder
from models_vit import MODELS, VisionTransformer
from util.amp import NativeScalerWithGradNormCount, autocast
from util.arguments import DEVICE, PRINT_FREQ, add_encoder_arguments, check_checkpoint
from util.cli import Parser, add_flags, bounded, run
from util.data.image_file import ImageFile
from util.data.loader import EpochSampler
from util.datasets import BICUBIC, image_folder, normalize
from util.errors import UserError, first_line, refuse
from util.logs import MetricLogger
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
        self.num_classes, self.seed = num_classes, seed
        images, masks = (
            Path(image_folder(data_path, f'{kind}/{split}')) for kind in ('images', 'masks')
        )
        self.pairs = sorted(
            (path, masks / path.relative_to(images).with_suffix('.png'))
            for path in images.rglob('*')
            if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS
        )
        if not self.pairs:
            raise UserError(f'--data_path: there are no images in {images}')
        for image, mask in self.pairs:
            if not mask.is_file():
                raise UserError(f'--data_path: {mask} is missing, the mask of {image}')
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(input_size, (0.25, 1.0), interpolation=BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.ToPureTensor(),
            ]
            if split == 'train'
            # only the image is resized, because the mask is not a tv_tensor here
            else [v2.ToPureTensor(), v2.Resize((input_size, input_size), interpolation=BICUBIC)]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        paths = self.pairs[key[1]]
        try:
            image = v2.functional.pil_to_tensor(ImageFile(paths[0]).rgb())
            mask = v2.functional.pil_to_tensor(Image.open(paths[1])).long()
            largest = mask.where(mask != IGNORED, 0).max().item()
            refuse(
                (
                    mask.shape != (1, *image.shape[1:]),
                    f'the image is {list(image.shape)}, the mask {list(mask.shape)}; a mask '
                    'has the height and width of its image and one channel',
                ),
                (
                    largest >= self.num_classes,
                    f'class {largest} is not below --nb_classes {self.num_classes}',
                ),
            )
        except Exception as e:  # decoders raise many types
            raise ValueError('{} and its mask {}: {}'.format(*paths, first_line(e))) from e
        seed_generators('augment', self.seed, *key)
        return self.transform(image, tv_tensors.Mask(mask[0]))


class LinearSegmenter(torch.nn.Module):
    """Map normalized images [N, 3, S, S] to logits [N, num_classes, S, S].

    The head is that of linear probing, applied to every patch token. The encoder is frozen.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        with seeded('head', seed):
            self.head = torch.nn.Sequential(
                torch.nn.BatchNorm2d(encoder.embed_dim, affine=False),
                torch.nn.Conv2d(encoder.embed_dim, num_classes, 1),
                torch.nn.Upsample(encoder.patch_embed.img_size, mode='bilinear'),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder.get_intermediate_layers(x, reshape=True, norm=True)[0])


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: torch.utils.data.DataLoader,
    num_classes: int,
    device: torch.device,
    amp: str = 'fp32',
    print_freq: int = 20,
) -> tuple[float, float]:
    """Return mIoU and pixel accuracy in percent.

    mIoU is the mean over the classes that occur in a mask or a prediction.

    Args:
        loader: yields images [N, 3, H, W] (uint8) and masks [N, H, W].
    """
    model.eval()
    # number of pixels by label and prediction
    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for images, masks in MetricLogger().log_every(loader, print_freq, 'Evaluation'):
        with autocast(device, amp):
            logits = torch.nn.functional.interpolate(
                model(normalize(images.to(device))).float(), masks.shape[1:], mode='bilinear'
            )
        pairs = (masks * num_classes + logits.argmax(1).cpu())[masks != IGNORED]
        counts += pairs.bincount(minlength=num_classes**2).reshape_as(counts)
    # 0 / 0 is nan: a class that does not occur
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return 100 * iou.nanmean().item(), 100 * (counts.trace() / counts.sum()).item()


FLAGS = {
    '--batch_size': dict(default=16, type=bounded(int, 1), metavar='N', help='images per step'),
    '--epochs': dict(default=10, type=bounded(int, 1), metavar='N', help='number of epochs'),
    '--lr': dict(
        default=1e-3,
        type=bounded(float, 0),
        metavar='LR',
        help='learning rate of AdamW; it falls to 0 along a half cosine',
    ),
    '--weight_decay': dict(default=0.01, type=bounded(float, 0), metavar='W', help='of AdamW'),
    '--data_path': dict(
        metavar='DIR', help='folder with images/ and masks/, train/ and val/ in each'
    ),
    '--num_workers': dict(default=8, type=bounded(int, 0), metavar='N', help='data-loader workers'),
}


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.segment', description=__doc__)
    add_encoder_arguments(parser, MODELS, pooling=False)
    add_flags(parser.add_argument_group('training and data'), FLAGS, PRINT_FREQ, DEVICE)
    return parser


def main(args: argparse.Namespace) -> None:
    check_checkpoint('--finetune', args.finetune)
    runtime = start_runtime(
        device=args.device, amp=args.amp, seed=args.seed, num_workers=args.num_workers
    )
    if not args.finetune:
        print('No --finetune: the encoder has random weights')

    # ---- model
    model = LinearSegmenter(
        build_encoder(
            args.model,
            input_size=args.input_size,
            global_pool=False,
            finetune=args.finetune,
            seed=args.seed,
        ),
        args.nb_classes,
        args.seed,
    ).to(runtime.device)

    # ---- data
    train, val = (
        ImagesAndMasks(args.data_path, split, args.input_size, args.nb_classes, args.seed)
        for split in ('train', 'val')
    )
    refuse(
        (runtime.world_size > 1, 'tools.segment runs as one process; start it without torchrun'),
        (
            len(train) < args.batch_size,
            f'--batch_size {args.batch_size}: there are only {len(train)} training images',
        ),
    )
    loader, loader_val = (
        torch.utils.data.DataLoader(
            dataset, num_workers=runtime.num_workers, pin_memory=runtime.pin_mem, **options
        )
        for dataset, options in (
            (
                train,
                {
                    'batch_size': args.batch_size,
                    'sampler': EpochSampler(train, 1, 0, seed=seed_of('order', args.seed) % 2**32),
                    'drop_last': True,
                },
            ),
            # one image at a time, because the masks differ in size
            (val, {'sampler': [(0, i) for i in range(len(val))]}),
        )
    )

    # ---- training loop
    optimizer = torch.optim.AdamW(
        model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    scaler = NativeScalerWithGradNormCount(enabled=runtime.amp == 'fp16', device=runtime.device)
    try:
        for epoch in range(args.epochs):
            loader.sampler.set_epoch(epoch)
            log = MetricLogger()
            for images, masks in log.log_every(
                loader, args.print_freq, f'Epoch [{epoch}]', args.batch_size
            ):
                with autocast(runtime.device, runtime.amp):
                    loss = torch.nn.functional.cross_entropy(
                        model(normalize(images.to(runtime.device))),
                        masks.to(runtime.device),
                        ignore_index=IGNORED,
                    )
                optimizer.zero_grad()
                scaler(loss, optimizer)
                schedule.step()
                log.update(loss=loss.item() if log.due else None)
            if scaler.skipped >= len(loader):
                raise UserError(
                    f'all steps of epoch {epoch} had NaN or Inf gradients; lower --lr {args.lr}, '
                    'or use --amp fp32'
                )
        print(
            'mIoU {:.2f} %, pixel accuracy {:.2f} % ({} images, {} classes)'.format(
                *evaluate(
                    model, loader_val, args.nb_classes, runtime.device, runtime.amp, args.print_freq
                ),
                len(val),
                args.nb_classes,
            )
        )
    except ValueError as e:  # from a loader worker it comes with a traceback as its text
        raise UserError(str(e).strip().splitlines()[-1].removeprefix('ValueError: ')) from e


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
