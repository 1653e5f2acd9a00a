"""Data sets that timm opens: tar files, torchvision, Hugging Face, TFDS, WebDataset.

Everything that depends on how timm and its readers are built is in this file. Tried with
timm 1.0.12 to 1.0.31.
"""

from pathlib import Path

import timm.data
from timm.data.readers import reader_image_in_tar

from util.errors import UserError, as_user_error


class TimmSource:
    """A map-style data set of timm or torchvision, as a source for SeededDataset.

    Attributes: classes, the class names in the order of their labels, or None if unknown.
    """

    def __init__(self, dataset: timm.data.ImageDataset) -> None:
        # timm's own __getitem__ would silently replace files that cannot be read
        self.dataset, self.samples = dataset, getattr(dataset, 'reader', dataset)
        self.classes = _class_names(dataset)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[object, int]:
        image, label = self.samples[i][:2]
        return image, -1 if label is None else label

    def name(self, i: int) -> str:
        return hasattr(self.dataset, 'filename') and self.dataset.filename(i) or f'sample {i}'


def _class_names(dataset: timm.data.ImageDataset) -> list[str] | None:
    reader = getattr(dataset, 'reader', None)
    labels = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    return sorted(labels, key=labels.get) if labels else getattr(dataset, 'classes', None)


def open_source(
    dataset: str,
    data_path: str | None,
    split: str,
    *,
    is_train: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
) -> TimmSource | timm.data.IterableImageDataset:
    """Open a data set by its name in timm.data.create_dataset.

    Args:
        dataset: the name, e.g. ``wds/imagenet``.
        is_train: shuffle a stream, and give each process a share of it.
        batch_size, num_workers: hints for streams.
        seed: of the order of a stream.

    Returns:
        A source for SeededDataset, or for SeededStream if it can only be read in order.

    Raises:
        UserError: if the data is missing or damaged, or a package that reads it is not
            installed.
    """
    kind = dataset.partition('/')[0].lower()
    if kind == 'wds' and not Path(data_path).is_dir():  # WebDataset runs URLs in a shell
        raise UserError(
            f'--data_path {data_path} is not a folder; copy the shards of --dataset {dataset} '
            'into one'
        )
    # timm stores an index for more than 10 GB of tar files. Older releases unpickle it unsafely:
    # it could run code. Newer ones have a restricted unpickler.
    if kind == 'tar' and not hasattr(reader_image_in_tar, '_TarInfoUnpickler'):
        folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
        for file in folder.glob(f'*{reader_image_in_tar.CACHE_FILENAME_SUFFIX}'):
            raise UserError(
                f'{file} could run code, and timm {timm.__version__} would not prevent it; '
                'delete the file, or pip install -U timm'
            )
    with as_user_error(f'--dataset {dataset}, --data_path {data_path}, split {split}', Exception):
        try:
            source = timm.data.create_dataset(
                dataset,
                root=data_path,
                split=split,
                is_training=is_train,
                batch_size=batch_size,
                seed=seed,
            )
        except ImportError as e:
            raise UserError(f'package {e.name} is missing: pip install {e.name}') from e
    if not isinstance(source, timm.data.IterableImageDataset):
        return TimmSource(source)
    if not is_train:
        # Sharded evaluation would drop or pad samples. If each process reads the full stream,
        # the accuracy is exact.
        source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1
    source.set_loader_cfg(num_workers=max(1, num_workers))
    source.classes = _class_names(source)
    return source
