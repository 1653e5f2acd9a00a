"""The list of images in a folder with one folder a class: torchvision's ImageFolder for data sets of millions of files."""

import hashlib
import os
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

CACHE_FROM = 10_000  # files; fewer are listed in less than a second


class ImageFolder:
    """What torchvision's ImageFolder lists, in the same order. An item is (path, class).

    All names lie in one array: of a list of millions of objects every loader worker would in time get a copy, since looking at
    one writes its reference count. The list is kept in the user's cache folder, and taken from there for as long as no folder in
    it has changed, so that not every process of every run has to ask the file system for all names.

    Attributes: root; classes, the folders' names in order; targets, int32, the class of each image.

    Raises:
        FileNotFoundError: there are no class folders.
    """

    def __init__(self, root):
        self.root = str(root)
        # Hidden folders, such as editors and notebooks leave behind, are no classes.
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))
        if not self.classes:
            raise FileNotFoundError(root)
        cache = _cache_path(self.root)
        self._names, self._ends, self.targets = _read_cache(cache, self.root) or self._list(cache)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.path(i), int(self.targets[i])

    def path(self, i):
        """Path of image i."""
        name = self._names[self._ends[i - 1] if i > 0 else 0:self._ends[i]]
        return os.path.join(self.root, os.fsdecode(name.tobytes()))

    def _list(self, cache):
        names, targets, folders = [], [], [('', os.stat(self.root).st_mtime_ns)]
        for target, class_name in enumerate(self.classes):
            for folder, _, files in sorted(os.walk(os.path.join(self.root, class_name), followlinks=True)):
                inside = os.path.relpath(folder, self.root)
                folders.append((inside, os.stat(folder).st_mtime_ns))
                files = sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS))
                names += [os.fsencode(os.path.join(inside, name)) for name in files]
                targets += [target] * len(files)
        index = _pack(names), np.fromiter(accumulate(map(len, names)), np.int64), np.array(targets, np.int32)
        # A file that comes within the clock's resolution after the listing would leave the folder's time as it is.
        settled = time.time_ns() - max(changed for _, changed in folders) > 2e9
        if len(names) >= CACHE_FROM and settled:
            _write_cache(cache, index, folders)
        return index


def _cache_path(root):
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'milan')
    return folder / f'images-{hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()}.npz'


def _pack(names):
    return np.frombuffer(b''.join(names), np.uint8)


def _write_cache(path, index, folders):
    part = path.with_suffix(f'.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as f:
            np.savez(f, names=index[0], ends=index[1], targets=index[2], times=np.array([time for _, time in folders]),
                     folders=_pack([b'\0'.join(os.fsencode(name) for name, _ in folders)]))
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # the next run lists again


def _read_cache(path, root):
    """(names, ends, targets) if the file is there, whole, and every folder as it was; else None."""
    try:
        with np.load(path, allow_pickle=False) as f:
            folders = os.fsdecode(f['folders'].tobytes()).split('\0')
            if [os.stat(os.path.join(root, name)).st_mtime_ns for name in folders] != f['times'].tolist():
                return None
            return f['names'], f['ends'], f['targets']
    except Exception:  # NumPy has many kinds for a damaged file; the images are listed again then
        return None
