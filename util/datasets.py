"""Data sets and transforms: images from folders or from whatever timm reads, augmented as a function of (seed, epoch, sample)."""

import functools
import glob
import os

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers import reader_image_in_tar
from torchvision import transforms

from util.crop import RandomResizedCrop, single_crop_box
from util.distributed import main_process_first
from util.errors import UserError, first_line
from util.folder import ImageFolder
from util.images import ImageFile, UnreadableImage
from util.seeding import seed_generators, seed_of, seeded

BICUBIC = transforms.InterpolationMode.BICUBIC


class SeededDataset(torch.utils.data.Dataset):
    """A data set indexed by (epoch, i), as EpochSampler gives them, or by i alone, which is epoch 0.

    An item is (image, class, i, skipped). A file that cannot be read is passed over for the next one in the list; ``skipped``
    counts these, and the loader's user names them and decides when it is too many.

    Args:
        source: map-style; gives (path, open file, bytes or PIL image; class): ImageFolder, timm's ImageDataset, torchvision's.
        transform: from an ImageFile to a tensor, [3, H, W].
        limit: files to pass over for one item before it is given up (then a blank image comes with skipped = limit + 1).
        replace: False leaves out what cannot be read: a blank image with skipped = 1. Evaluation must count no image twice.
    """

    def __init__(self, source, transform, seed=0, limit=100, replace=True):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.tries = min(limit + 1, len(source)) if replace else 1

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        for skipped in range(self.tries):
            try:
                image, target = self.read((i + skipped) % len(self.source))
                return self._augmented(image, epoch, i), target, i, skipped
            except UnreadableImage:
                continue
        return self._augmented(ImageFile(Image.new('RGB', (8, 8))), epoch, i), 0, i, self.tries

    def _augmented(self, image, epoch, i):
        seed_generators('augment', self.seed, epoch, i)  # to put them back after would take a twentieth of a sample's time
        return self.transform(image)

    def read(self, i):
        """(ImageFile, class) of sample i; raises UnreadableImage."""
        try:
            if hasattr(self.source, 'reader'):  # timm's own __getitem__ would pass over broken files without telling
                image, target = self.source.reader[i][:2]
            else:
                image, target = self.source[i]
        except Exception as e:  # every reader has its own kinds
            raise UnreadableImage(f'{type(e).__name__}: {e}') from e
        return ImageFile(image), -1 if target is None else target

    def why(self, i):
        """Why sample i cannot be read, in a line."""
        try:
            self.read(i)[0].rgb()
        except UnreadableImage as e:
            return first_line(e)
        return 'for a moment only'

    def name(self, i):
        """What to call sample i: its file where it has one."""
        if hasattr(self.source, 'path'):
            return self.source.path(i)
        return self.source.filename(i) if hasattr(self.source, 'filename') else f'sample {i}'


class SeededStream(torch.utils.data.IterableDataset):
    """The same for data that can only be read in order (WebDataset shards, streamed Hugging Face data): items of the same parts.

    Samples are numbered as they come, so that here their crops depend on the numbers of processes and workers too. Which sample
    comes when is up to timm's readers, seeded by (seed, epoch).
    """

    def __init__(self, source, transform, seed=0, rank=0, world_size=1):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self):
        return len(self.source)

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        good = Image.new('RGB', (8, 8)), 0
        for count, sample in enumerate(self.source):
            i = (count * workers + first) * self.world_size + self.rank
            with seeded('augment', self.seed, self.epoch, i):  # the readers draw from the same generators
                try:
                    image, skipped = self.transform(ImageFile(sample[0])), 0
                    good = sample
                except UnreadableImage:  # the one before takes its place, so that all processes count the same steps
                    image, skipped = self.transform(ImageFile(good[0])), 1
            yield image, good[1], i, skipped

    def name(self, i):
        return f'sample {i}'

    def why(self, i):
        return 'unknown'


def build_dataset(is_train, args, transform=None):
    """The training or the validation set of --data_path and --dataset: SeededDataset or SeededStream.

    Reads args.data_path, dataset, train_split, val_split, seed, max_bad_images, batch_size, num_workers, rank, world_size; and
    what build_transform reads, where no ``transform`` is given.

    Raises:
        UserError: there is nothing at that place, or it cannot be read.
    """
    transform = transform or build_transform(is_train, args)
    source = _open_timm(is_train, args) if args.dataset else _open_folder(is_train, args)
    if isinstance(source, torch.utils.data.IterableDataset):
        return SeededStream(source, transform, args.seed, args.rank, args.world_size)
    if len(source) == 0:
        raise UserError(f'--data_path {args.data_path}: there are no images in its {_split(is_train, args)} split')
    return SeededDataset(source, transform, args.seed, args.max_bad_images, replace=is_train)


def _open_folder(is_train, args):
    root = image_folder(args, 'train' if is_train else 'val')
    try:
        with main_process_first():  # the others find its list in the cache
            folder = ImageFolder(root)
    except FileNotFoundError:
        raise UserError(f'--data_path: {root} has no class folders; put the images into {root}/CLASS/') from None
    if not len(folder):
        raise UserError(f'--data_path: there are no images in the class folders of {root}')
    empty = set(range(len(folder.classes))) - set(folder.targets.tolist())
    if empty:
        more = f' and {len(empty) - 1} more' if len(empty) > 1 else ''
        print(f'Note: there are no images in {root}/{folder.classes[min(empty)]}{more}')
    return folder


def check_data_flags(args):
    """UserError where --data_path or --dataset cannot be meant; whether the data is there is for the machine that reads it."""
    if not getattr(args, 'dataset', ''):  # not every tool has that flag
        if not args.data_path:
            raise UserError('--data_path is missing: give the folder that holds train/ and val/, a folder a class in each')
        return
    kind = args.dataset.partition('/')[0].lower()
    named, plain = ('torch', 'hfds', 'hfids', 'tfds', 'wds'), ('tar', 'folder')
    if kind not in (named if '/' in args.dataset else plain):
        raise UserError(f'--dataset {args.dataset}: take tar, folder, torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or wds/NAME')
    if not args.data_path and kind in ('torch', 'wds', *plain):
        raise UserError(f'--data_path is missing: give the place of --dataset {args.dataset}')


def image_folder(args, split):
    """args.data_path/split, after checking that it is there."""
    check_data_flags(args)
    if not os.path.isdir(args.data_path or ''):
        raise UserError(f'--data_path {args.data_path} is not a folder; it should hold train/ and val/, a folder a class in each')
    root = os.path.join(args.data_path, split)
    if not os.path.isdir(root):
        raise UserError(f'--data_path {args.data_path} has no folder {split}/ in it')
    return root


def _split(is_train, args):
    return args.train_split if is_train else args.val_split


def _refuse_pickled_list(data_path):
    """UserError if beside the tar files there is a list of their images that timm would read, and run what is in it."""
    folder = data_path if os.path.isdir(data_path) else os.path.dirname(data_path)
    found = glob.glob(os.path.join(glob.escape(folder), f'*{reader_image_in_tar.CACHE_FILENAME_SUFFIX}'))
    if found:
        raise UserError(f'{found[0]} could run code, which timm {timm.__version__} would not prevent; delete it, or '
                        'pip install -U timm')


def _open_timm(is_train, args):
    """timm's data set of the name in args.dataset; see timm.data.create_dataset for the names."""
    check_data_flags(args)
    kind = args.dataset.partition('/')[0].lower()
    if kind == 'wds' and not os.path.isdir(args.data_path):  # WebDataset would hand a URL to a shell
        raise UserError(f'--data_path {args.data_path} is no folder; copy the shards of --dataset {args.dataset} into one')
    if kind == 'tar' and not hasattr(reader_image_in_tar, '_TarInfoUnpickler'):
        _refuse_pickled_list(args.data_path)
    try:
        source = create_dataset(args.dataset, root=args.data_path, split=_split(is_train, args), is_training=is_train,
                                batch_size=args.batch_size, seed=seed_of('order', args.seed) % 2**31)
    except ImportError as e:
        raise UserError(f'--dataset {args.dataset} needs a package that is not here: pip install {e.name}') from e
    except Exception as e:  # every reader has its own kinds
        raise UserError(f'--dataset {args.dataset}, --data_path {args.data_path}, split {_split(is_train, args)}: '
                        f'{first_line(e)}') from e
    if isinstance(source, torch.utils.data.IterableDataset):
        if not is_train:
            # Split between processes, a stream would be cut or padded to equal parts; all of it on each gives the exact accuracy.
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1
        if hasattr(source, 'set_loader_cfg'):
            source.set_loader_cfg(num_workers=max(1, args.num_workers))
    return source


def class_names(dataset):
    """The classes of a data set of build_dataset in the order of their numbers; None where the source does not tell."""
    source = dataset.source
    reader = getattr(source, 'reader', None)
    numbers = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    names = getattr(source, 'classes', None) or sorted(numbers, key=numbers.get)
    return list(names) or None


def check_classes(args, *sets):
    """Raise UserError unless each of the data sets has args.nb_classes classes, and all of them the same ones."""
    known = [names for names in map(class_names, sets) if names is not None]
    for names in known:
        if names != known[0]:
            odd = sorted(set(names) ^ set(known[0])) or names
            raise UserError(f'--data_path {args.data_path}: training and validation set have different classes; {odd[0]} is in '
                            'one of them only')
        if len(names) != args.nb_classes:
            raise UserError(f'--nb_classes {args.nb_classes}, but {args.data_path} has {len(names)} classes; '
                            f'give --nb_classes {len(names)}')


# ---- transforms: from an ImageFile to uint8 [3, H, W], or to floats that are normalised already ----

def normalise(images):
    """A batch on its device, ready for a model: bytes [N, 3, H, W] become floats with ImageNet's mean 0 and deviation 1.

    On the device, and not by the loader's workers, since bytes are a quarter of what there is to copy. Floats pass through.
    """
    if images.dtype != torch.uint8:
        return images
    mean, std = _statistics(images.device)
    return images.contiguous().float().div_(255).sub_(mean).div_(std)


@functools.lru_cache
def _statistics(device):
    return torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device).view(2, 3, 1, 1)


def build_pretrain_transform(args):
    """MAE's augmentation: random resized crop of 20 to 100 % of the area, bicubic; flip."""
    return transforms.Compose([RandomResizedCrop(args.input_size, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip()])


def build_transform(is_train, args):
    """Fine-tuning's transforms: timm's RandAugment and random erasing for training, resize and centre crop for evaluation."""
    if is_train:
        try:
            _, augment, final = create_transform(
                input_size=args.input_size, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa or None,
                interpolation='bicubic', re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
                mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, separate=True)
        except (AssertionError, ValueError, KeyError, IndexError) as e:
            raise UserError(f"--aa {args.aa} is no policy that timm knows, such as rand-m9-mstd0.5-inc1, or '' for none: "
                            f'{first_line(e)}') from e
        # our crop and flip in place of timm's: the same draws, made before the file is decoded
        crop = [RandomResizedCrop(args.input_size), transforms.RandomHorizontalFlip(), transforms.ToPILImage()]
        return transforms.Compose([*crop, augment, final])
    crop_ratio = 224 / 256 if args.input_size <= 224 else 1.0
    return _centre(args.input_size, int(args.input_size / crop_ratio))


def build_linprobe_transform(is_train, args):
    """Linear probing's transforms (MAE, appendix A.1): random resized crop, flip; resize to 256 for 224 pixels, centre crop."""
    if is_train:
        return transforms.Compose([RandomResizedCrop(args.input_size, draw=single_crop_box), transforms.RandomHorizontalFlip()])
    return _centre(args.input_size, args.input_size * 256 // 224)


def _centre(size, resize):
    """Evaluation's, by PIL: accuracies are compared with those of others to a hundredth."""
    return transforms.Compose([ImageFile.rgb, transforms.Resize(resize, interpolation=BICUBIC), transforms.CenterCrop(size),
                               transforms.PILToTensor()])
