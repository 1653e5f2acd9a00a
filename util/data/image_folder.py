"""The list of images in a folder with one subfolder per class, for millions of files."""

import contextlib
import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import UserError
from util.files import atomic_write

CACHE_FROM = 10_000  # files; fewer are listed in less than a second


class ImageFolder:
    """Images and labels as in torchvision's ImageFolder, in the same order.

    An item is (path, label). Paths are stored in one NumPy array: a Python list would be
    copied into every loader worker, because reference counts defeat copy-on-write. The list of
    a large folder is cached in ~/.cache/milan until one of the folders in it changes, so that
    not every process of every run has to ask the file system for all names.

    Attributes:
        root: the folder.
        classes: names of the class folders, sorted. Hidden folders such as
            .ipynb_checkpoints are skipped.
        targets: int32, the label of each image.

    Raises:
        UserError: if there are no class folders.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = str(root)
        self.classes = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith('.')
        )
        if not self.classes:
            raise UserError(f'{root} has no class folders; move the images to {root}/CLASS/')
        digest = blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()
        cache = Path(
            os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache',
            'milan',
            f'folder-{digest}.npz',
        )
        self._names, self.targets = self._read(cache) or self._list(cache)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[str, int]:
        return self.name(i), int(self.targets[i])

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[i]))

    def _times(self, folders: list[str]) -> list[int]:
        return [os.stat(os.path.join(self.root, folder)).st_mtime_ns for folder in folders]

    def _read(self, cache: Path) -> tuple[np.ndarray, np.ndarray] | None:
        # returns None if the cache is missing, damaged (NumPy raises many types) or out of date
        with contextlib.suppress(Exception), np.load(cache) as f:
            if self._times(f['folders']) == f['times'].tolist():
                return f['names'], f['targets']

    def _list(self, cache: Path) -> tuple[np.ndarray, np.ndarray]:
        # returns (names relative to the root, labels)
        start, names, targets, folders = time.time_ns(), [], [], ['']
        for label, class_name in enumerate(self.classes):
            tree = os.walk(os.path.join(self.root, class_name), followlinks=True)
            for folder, _, files in sorted(tree):
                folders.append(os.path.relpath(folder, self.root))
                names += [
                    os.fsencode(os.path.join(folders[-1], name))
                    for name in sorted(files)
                    if name.lower().endswith(IMG_EXTENSIONS)
                ]
            targets += [label] * (len(names) - len(targets))
        names, targets = np.array(names, dtype='S'), np.array(targets, dtype=np.int32)
        times = self._times(folders)
        # Not cached if a folder has changed meanwhile, or so recently that the next change may
        # fall within the clock's resolution.
        if len(names) >= CACHE_FROM and start - max(times) > 2e9:
            with contextlib.suppress(OSError, UserError):  # the next run lists the folder again
                cache.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(
                    cache,
                    lambda f: np.savez(
                        f, names=names, targets=targets, folders=folders, times=times
                    ),
                )
        return names, targets
