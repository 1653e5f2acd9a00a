"""Archives like the official ones of ImageNet: 9 training, 6 validation images, 3 classes."""

import io
import os
import tarfile

import numpy as np
from PIL import Image

# WNID: number in the devkit, in another order
CLASSES = {'n01440764': 3, 'n01443537': 1, 'n02102040': 2}
VAL = ['n02102040', 'n01440764', 'n01443537', 'n02102040', 'n01440764', 'n01440764']
TRUTH = 'ILSVRC2012_validation_ground_truth.txt'


def jpeg(number):
    """Return a JPEG file that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (8 + number, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG')
    return buffer.getvalue()


def val_name(number):
    return f'ILSVRC2012_val_{number:08d}.JPEG'


TRAIN_TREE = {
    f'train/{wnid}/{wnid}_{100 + i}.JPEG': jpeg(10 * c + i)
    for c, wnid in enumerate(CLASSES)
    for i in range(2 + c)
}
VAL_TREE = {
    f'val/{wnid}/{val_name(number)}': jpeg(50 + number) for number, wnid in enumerate(VAL, 1)
}


def pack(members, mode='w'):
    """Return a tar file of ``members``: (name, content), or a TarInfo without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name, kind, target='/etc/passwd'):
    """Return a member of another type, such as a link to ``target``."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ''
    return info


def class_images(wnid):
    """Return (name, content) of the training images of a class."""
    images = [(path, content) for path, content in TRAIN_TREE.items() if f'/{wnid}/' in path]
    return [(os.path.basename(path), content) for path, content in images]


def train_members(change=lambda members: members, wnid='n01443537'):
    """Return the members of the training archive; ``change`` is applied to one class."""
    images = {w: class_images(w) for w in CLASSES}
    images[wnid] = change(images[wnid])
    return [(f'{w}.tar', pack(members)) for w, members in images.items()]


def val_members():
    """Return the members of the validation archive, in the order of their numbers."""
    return sorted((os.path.basename(path), content) for path, content in VAL_TREE.items())


def devkit(**files):
    """Return a devkit. ``files`` replace some of its files; None removes a file.

    meta.mat is a MATLAB struct array: the classes in the order of their numbers, then words
    higher up in the tree.
    """
    from scipy.io import savemat

    rows = sorted((i, wnid, 0) for wnid, i in CLASSES.items())
    rows += [(4, 'n00001740', 2), (5, 'n00001930', 1)]
    fields = 'ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images'
    synsets = [
        (float(i), wnid, 'word', 'meaning', float(n), np.arange(float(n)), 1.0, 1300.0)
        for i, wnid, n in rows
    ]
    meta = io.BytesIO()
    dtype = [(field, object) for field in fields.split()]
    savemat(meta, {'synsets': np.array([synsets], dtype=dtype)})
    truth = ''.join(f'{CLASSES[wnid]}\n' for wnid in VAL).encode()
    files = {'meta.mat': meta.getvalue(), TRUTH: truth, 'readme.txt': b'hello', **files}
    folder = 'ILSVRC2012_devkit_t12/data'
    return pack([(f'{folder}/{name}', x) for name, x in files.items() if x is not None], 'w:gz')


ORDERED = sorted(CLASSES)
UNORDERED = ''.join(f'{val_name(i)}\t{VAL[i - 1]} \r\n' for i in (3, 1, 2, 6, 5, 4))
LISTS = {
    'named': ''.join(f'{val_name(i)} {wnid}\n' for i, wnid in enumerate(VAL, 1)),
    'indices': ''.join(f'{val_name(i)} {ORDERED.index(wnid)}\n' for i, wnid in enumerate(VAL, 1)),
    'in order': ''.join(f'{wnid}\n' for wnid in VAL),
    'unordered, CRLF, byte order mark': f'\ufeff{UNORDERED}\r\n',
}


def tree(folder):
    """Return {path: content} of all files except the lock."""
    files = [path for path in folder.rglob('*') if path.is_file() and path.suffix != '.lock']
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def times(folder):
    """Return {path: time of the last change} of all files except the lock."""
    files = [path for path in folder.rglob('*') if path.is_file() and path.suffix != '.lock']
    return {path: path.stat().st_mtime_ns for path in files}
