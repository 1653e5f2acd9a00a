r"""Build ImageNet's train/ and val/, with one folder per class, from the official archives.

    python -m tools.prepare_imagenet --train_tar ILSVRC2012_img_train.tar \
        --val_tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz \
        --output_dir imagenet

If a run is stopped, for whatever reason, the same command resumes it. A split is built as
train.part or val.part and renamed after its images have been counted, so a folder train/
is always complete. Besides the archives, train takes 140 GB of disk and val 7 GB.
"""

import argparse
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock, Timeout
from tqdm import tqdm

from util.cli import Parser, add_flags, bounded, run
from util.errors import UserError, as_user_error, refuse

WNID = 'n[0-9]{8}'
VAL_IMAGE = r'ILSVRC2012_val_([0-9]{8})\.(?i:jpe?g)'
# the names of the files in an archive: the pattern, and what to call them
CONTENTS = {
    'train': (
        rf'{WNID}\.tar',
        'class archives (n01440764.tar ...) as in ILSVRC2012_img_train.tar for --train_tar',
    ),
    'class': (r'[\w.-]+\.(?i:jpe?g)', 'JPEG images'),
    'val': (
        VAL_IMAGE,
        'images (ILSVRC2012_val_00000001.JPEG ...) as in ILSVRC2012_img_val.tar for --val_tar',
    ),
}
LARGEST_LIST = 1 << 22  # bytes of a list of labels; 50,000 of the longest lines are 2 MB
COUNT = '{} images in {} classes'
WRONG_COUNT = '{} has {}, expected {}; replace it, or pass --counts if that is right'


# ---- archives ----


# Return ``path`` if it is a file. Reading a pipe or a device could last forever.
def _file(flag, path, limit=float('inf')):
    if not Path(path).is_file():
        raise UserError(f'{flag} {path} does not exist, or is not a file')
    if Path(path).stat().st_size > limit:
        raise UserError(f'{flag} {path} has more than {limit:,} bytes')
    return Path(path)


def index(name: str, kind: str, file: BinaryIO | None = None) -> dict[str, tarfile.TarInfo]:
    """Return the files in a tar archive, by their names without folder and ending.

    Folders and hidden files (which macOS adds) are skipped.

    Args:
        name: path of the archive.
        kind: which files are expected, a key of CONTENTS.
        file: the open archive, if it is inside another one; ``name`` is for messages only.

    Raises:
        UserError: if the archive cannot be read, is cut off, or has other files.
    """
    pattern, expected = CONTENTS[kind]
    files = {}
    with (
        as_user_error(
            f'{name} is not a complete tar file; download it again',
            tarfile.TarError,
            OSError,
            # for absurd sizes and endless chains of headers
            ValueError,
            OverflowError,
            RecursionError,
            MemoryError,
        ),
        tarfile.open(None if file else _file(f'--{kind}_tar', name), 'r:', file) as tar,
    ):
        for member in tqdm(
            tar, f'index of {kind}', disable=kind == 'class', mininterval=5, file=sys.stdout
        ):
            path = PurePosixPath(member.name)
            skip = member.isdir() or path.name.startswith('.')
            refuse(
                (
                    not (member.isfile() or member.isdir())
                    or member.issparse()
                    or path.is_absolute()
                    or '..' in path.parts
                    or '\\' in member.name,
                    f'{name} has a member {member.name!r} that is not a regular file inside it; '
                    'the official archive has none: download it again',
                ),
                (
                    not skip and not re.fullmatch(pattern, path.name),
                    f'{name} has a member {member.name!r}, expected only {expected}',
                ),
                (
                    not skip and path.stem in files,
                    f'{name} has {path.stem!r} twice; download it again',
                ),
            )
            if not skip:
                files[path.stem] = member
        # tarfile accepts an archive that was cut between two members; a complete one ends in zeros
        tar.fileobj.seek(tar.offset)
        refuse(
            (
                tar.fileobj.read(512) != bytes(512),
                f'{name} is cut off or damaged at byte {tar.offset}; download it again',
            ),
            (not files, f'{name} has no {expected}; download it again'),
        )
    return files


# Unpack an archive's ``members`` to their paths in ``folder``, unless an earlier run has completed
# them. ``file``: see index.
def _unpack(name, members, folder, file=None):
    # a run with other labels put images into other classes
    if not members.keys() >= set(folder.glob('*/*')):
        shutil.rmtree(folder)
    with tarfile.open(name, 'r:', file) as tar:
        for path, member in tqdm(
            members.items(), 'val', disable=bool(file), mininterval=5, file=sys.stdout
        ):
            with as_user_error(f'cannot write {path} (fix this and run the same command)', OSError):
                if not path.exists() or path.stat().st_size != member.size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, open(path, 'wb') as target:
                        shutil.copyfileobj(source, target)


# Unpack the class archives in the archive ``name``. A class appears once it is complete.
def _unpack_train(name, archives, folder):
    with tarfile.open(name, 'r:') as tar:
        for wnid, archive in tqdm(archives.items(), 'train', mininterval=5, file=sys.stdout):
            if not (folder / wnid).is_dir():
                part = folder / f'{wnid}.part'
                images = index(f'{archive.name} in {name}', 'class', tar.extractfile(archive))
                _unpack(
                    None,
                    {part / PurePosixPath(image.name).name: image for image in images.values()},
                    part,
                    tar.extractfile(archive),
                )
                part.rename(folder / wnid)


# ---- the labels of val, which are in another file ----


def read_list(path: str, classes: set[str]) -> dict[int, str]:
    """Read the labels of val from a text file.

    Args:
        path: its lines are 'IMAGE WNID', or 'IMAGE INDEX', or 'WNID' in the order of the
            images. INDEX is the position in the sorted ``classes``, counted from 0.
        classes: WNIDs of the training set, as far as they are known.

    Returns:
        WNID by number of the image.

    Raises:
        UserError: if the file cannot be read, or a line has another form.
    """
    with as_user_error(f'--val_labels {path} cannot be read', OSError, UnicodeDecodeError):
        text = _file('--val_labels', path, LARGEST_LIST).read_text('utf-8-sig')
    wnids, labels = sorted(classes), {}
    for i, line in enumerate(text.rstrip().split('\n'), 1):
        place = f'--val_labels {path}, line {i}'
        match = re.fullmatch(rf'(?:{VAL_IMAGE}\s+)?({WNID}|(?<=\s)[0-9]{{1,9}})', line.strip())
        number, label = (int(match[1] or i), match[2]) if match else (i, '')
        refuse(
            (
                not match,
                f"{place}: {line[:60]!r} is not 'IMAGE WNID', 'IMAGE INDEX' or 'WNID'; fix it "
                "(for the devkit's list of bare numbers, pass --devkit)",
            ),
            (
                label.isdigit() and int(label) >= len(wnids),
                f'{place}: index {label} is out of range for the {len(wnids)} classes of '
                'train; pass --train_tar, or build train/ first',
            ),
            (number in labels, f'{place}: second label for image {number}; remove one of them'),
        )
        labels[number] = wnids[int(label)] if label.isdigit() else label
    return labels


def read_devkit(path: str) -> dict[int, str]:
    """Read the labels of val, WNIDs by number of the image, from the devkit.

    Its meta.mat maps the numbers that it uses for the classes to WNIDs.
    """
    with as_user_error(
        f'--devkit {path} needs SciPy: pip install scipy, or pass --val_labels instead', ImportError
    ):
        from scipy.io import loadmat  # only the devkit needs it, so it is not a requirement
    file = _file('--devkit', path)
    with (
        # the parsers raise many types on a damaged file
        as_user_error(f'--devkit {path} is damaged; download it again', Exception),
        tarfile.open(file) as tar,
    ):
        members = {
            PurePosixPath(member.name).name: member
            for member in tar
            if member.isfile() and member.size <= LARGEST_LIST
        }
        meta, truth = (
            tar.extractfile(members[name])
            for name in ('meta.mat', 'ILSVRC2012_validation_ground_truth.txt')
        )
        wnids = {
            int(s['ILSVRC2012_ID']): re.fullmatch(WNID, str(s['WNID']))[0]
            for s in loadmat(meta, squeeze_me=True)['synsets'].reshape(-1)
            if s['num_children'] == 0
        }
        return {number: wnids[int(line)] for number, line in enumerate(truth.read().split(), 1)}


# ---- the output folder ----


# Create ``folder`` and lock it; wait for another run that is working in it.
def _lock_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / '.prepare_imagenet.lock')
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f'Waiting for another run that is working in {folder}', flush=True)
        return lock.acquire()


# Rename FOLDER.part to FOLDER after counting its images; count those of an existing FOLDER.
def _finish(folder, expected):
    counted = folder if folder.exists() else Path(f'{folder}.part')
    images = Counter(path.parent.name for path in counted.glob('*/*.[jJ][pP]*[gG]'))
    found = COUNT.format(images.total(), sum(path.is_dir() for path in counted.glob('*')))
    if found != expected:
        raise UserError(WRONG_COUNT.format(counted, found, expected))
    counted.rename(folder)
    print(f'{folder}: {expected}{" (was there already)" * (counted == folder)}')


# ---- the command ----


ARCHIVES = {
    '--train_tar': dict(
        metavar='FILE', help='ILSVRC2012_img_train.tar; default: train/ is not built'
    ),
    '--val_tar': dict(metavar='FILE', help='ILSVRC2012_img_val.tar; default: val/ is not built'),
}
LABELS = {
    '--devkit': dict(
        metavar='FILE', help='labels of val: ILSVRC2012_devkit_t12.tar.gz (needs SciPy)'
    ),
    '--val_labels': dict(
        metavar='FILE',
        help="labels of val: a text file with lines 'ILSVRC2012_val_00000001.JPEG n01751748'; "
        'the WNID may be replaced by its index among the sorted classes of train, from 0; or '
        'WNIDs only, in the order of the images',
    ),
}
OUTPUT = {
    '--output_dir': dict(default='imagenet', metavar='DIR', help='where train/ and val/ are built'),
    '--counts': dict(
        nargs=3,
        type=bounded(int, 0),
        default=[1000, 1281167, 50000],
        metavar=('CLASSES', 'TRAIN', 'VAL'),
        help='expected counts: classes, training images, validation images',
    ),
}


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.prepare_imagenet', description=__doc__)
    add_flags(parser, ARCHIVES)
    add_flags(parser.add_mutually_exclusive_group(), LABELS)
    add_flags(parser, OUTPUT)
    return parser


def main(args: argparse.Namespace) -> None:
    for wrong, message in (
        (
            not args.train_tar and not args.val_tar,
            'there is nothing to unpack: pass --train_tar, --val_tar or both',
        ),
        (
            args.val_tar and not args.devkit and not args.val_labels,
            '--val_tar has no labels: pass --devkit or --val_labels too',
        ),
    ):
        if wrong:
            get_args_parser().error(message)
    train, val = (Path(args.output_dir, split) for split in ('train', 'val'))
    in_train, in_val = (COUNT.format(images, args.counts[0]) for images in args.counts[1:])
    source = args.devkit or args.val_labels
    with as_user_error(f'--output_dir {args.output_dir}', OSError), _lock_folder(train.parent):
        # Find everything that is wrong with archives and labels before unpacking for hours.
        archives = index(args.train_tar, 'train') if args.train_tar and not train.exists() else {}
        members = index(args.val_tar, 'val') if args.val_tar and not val.exists() else {}
        train_classes = set(archives) or {path.name for path in train.glob('n????????')}
        labels = {}
        if members:
            labels = read_devkit(source) if args.devkit else read_list(source, train_classes)
        unlabeled = [m.name for stem, m in members.items() if int(stem[-8:]) not in labels]
        images = {
            Path(f'{val}.part', labels.get(int(stem[-8:]), ''), PurePosixPath(m.name).name): m
            for stem, m in members.items()
        }
        val_classes = {path.parent.name for path in images or val.glob('n????????/*')}
        refuse(
            (
                archives and len(archives) != args.counts[0],
                WRONG_COUNT.format(
                    args.train_tar, f'{len(archives)} classes', f'{args.counts[0]} classes'
                ),
            ),
            (
                unlabeled,
                f'{source} has no label for {"".join(unlabeled[:1])}, only for {len(labels)} '
                'images; give the complete list',
            ),
            (
                images and [len(val_classes), len(images)] != args.counts[::2],
                WRONG_COUNT.format(
                    args.val_tar, COUNT.format(len(images), len(val_classes)), in_val
                ),
            ),
            (
                train_classes and val_classes and train_classes != val_classes,
                f'{args.train_tar if archives else train} and {source if images else val} have '
                'different classes; replace one of them: only one has '
                f'{min(train_classes ^ val_classes, default="")}',
            ),
        )
        for tar, unpack, found, folder, expected in (
            (args.train_tar, _unpack_train, archives, train, in_train),
            (args.val_tar, _unpack, images, val, in_val),
        ):
            if found:
                unpack(tar, found, Path(f'{folder}.part'))
            if tar:
                _finish(folder, expected)


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
