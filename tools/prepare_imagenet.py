r"""Build ImageNet's train/ and val/, with one folder per class, from the official archives.

    python -m tools.prepare_imagenet --train_tar ILSVRC2012_img_train.tar \
        --val_tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz \
        --output_dir imagenet

If a run is stopped, for whatever reason, the same command resumes it. A split is built as
train.part or val.part and renamed after its images have been counted, so a folder train/
is always complete. Besides the archives, train takes 140 GB of disk and val 7 GB.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from tqdm import tqdm

from util.cli import Parser, bounded, run
from util.errors import UserError, as_user_error, refuse

WNID = re.compile(r'n[0-9]{8}')
CLASS_ARCHIVE = re.compile(rf'({WNID.pattern})\.tar')
TRAIN_IMAGE = re.compile(r'[\w.-]+\.(?i:jpe?g)')
VAL_IMAGE = re.compile(r'ILSVRC2012_val_([0-9]{8})\.(?i:jpe?g)')
LABEL_LINE = re.compile(rf'(?:{VAL_IMAGE.pattern}\s+)?({WNID.pattern}|(?<=\s)[0-9]{{1,9}})')
LARGEST_LIST = 1 << 22  # bytes of a list of labels; 50,000 of the longest lines are 2 MB
DEVKIT_FILES = 'meta.mat', 'ILSVRC2012_validation_ground_truth.txt'
TAR_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    # tarfile raises the following for absurd sizes and endless chains of headers
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)


# ---- archives ----


# Open the tar file at the path ``name``, or in ``file``; UserError if it cannot be read.
@contextlib.contextmanager
def _open_tar(name, file=None, mode='r:'):
    refuse(
        (
            file is None and not os.path.isfile(name),
            f'{name} is not a file; give the path of the official archive',
        )
    )
    with (
        as_user_error(f'{name} is not a complete tar file; download it again', *TAR_ERRORS),
        tarfile.open(name, mode, fileobj=file) as tar,
    ):
        yield tar


# Yield (member, match of its file name) for the files in ``tar``, in its order; skip folders and
# hidden files (left by macOS). UserError for a name that does not match ``pattern``, which
# ``expected`` states in words, for members of other types, and if the archive is cut off.
def _list_files(tar, name, pattern, expected):
    stems = set()
    for member in tar:
        path = PurePosixPath(member.name)
        outside = path.is_absolute() or '..' in path.parts or '\\' in member.name
        skip = member.isdir() or path.name.startswith('.')
        match = pattern.fullmatch(path.name)
        refuse(
            (
                outside or member.issparse() or not (member.isfile() or member.isdir()),
                f'{name} has a member {member.name!r} that is not a regular file inside it; '
                'the official archive has none: download it again',
            ),
            (
                not skip and not match,
                f'{name} has a member {member.name!r}, expected only {expected}',
            ),
            (
                not skip and path.stem in stems,
                f'{name} has {path.stem!r} twice; download it again',
            ),
        )
        if not skip:
            stems.add(path.stem)
            yield member, match
    # tarfile accepts an archive that was cut between two members; a complete one ends in zeros.
    tar.fileobj.seek(tar.offset)
    refuse(
        (
            tar.fileobj.read(512) != bytes(512),
            f'{name} is cut off or damaged at byte {tar.offset}; download it again',
        )
    )


# Write ``member`` to ``path`` unless an earlier run has completed it.
def _unpack(tar, member, path):
    with as_user_error(f'cannot write {path} (fix this and run the same command)', OSError):
        if not os.path.exists(path) or os.path.getsize(path) != member.size:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tar.extractfile(member) as source, open(path, 'wb') as target:
                shutil.copyfileobj(source, target)


# ---- train: a tar of 1,000 tars ----


def index_train(path: str) -> dict[str, tarfile.TarInfo]:
    """Return the class archives in the training archive at ``path``, by WNID."""
    with _open_tar(path) as tar:
        files = _list_files(
            tar,
            path,
            CLASS_ARCHIVE,
            'class archives (n01440764.tar ...) as in ILSVRC2012_img_train.tar for --train_tar',
        )
        return {match[1]: member for member, match in files}


# Unpack the classes that ``folder`` does not have yet; each appears once it is complete.
def _unpack_train(path, classes, folder):
    with _open_tar(path) as outer:
        for wnid, archive in tqdm(classes.items(), 'train', mininterval=5, file=sys.stdout):
            name, target = f'{archive.name} in {path}', os.path.join(folder, wnid)
            if os.path.isdir(target):
                continue
            with outer.extractfile(archive) as inner, _open_tar(name, inner) as tar:
                for member, match in _list_files(tar, name, TRAIN_IMAGE, 'JPEG images'):
                    _unpack(tar, member, os.path.join(f'{target}.part', match[0]))
            refuse(
                (
                    not os.path.isdir(f'{target}.part'),
                    f'{name} has no images; download it again',
                )
            )
            os.rename(f'{target}.part', target)


# ---- val: a tar of 50,000 images, whose labels are in another file ----


# Yield (member, 'WNID/FILE') for each image in the validation archive at ``path``. ``labels``,
# from the file ``source``, are WNIDs by number of the image.
def _index_val(path, labels, source):
    with _open_tar(path) as tar:
        files = _list_files(
            tar,
            path,
            VAL_IMAGE,
            'images (ILSVRC2012_val_00000001.JPEG ...) as in ILSVRC2012_img_val.tar for --val_tar',
        )
        for member, match in tqdm(files, 'index of val', mininterval=5, file=sys.stdout):
            refuse(
                (
                    int(match[1]) not in labels,
                    f'{source} has no label for {match[0]}, only for {len(labels)} images; '
                    'give the complete list',
                )
            )
            yield member, os.path.join(labels[int(match[1])], match[0])


# Unpack the images that ``folder`` does not have yet.
def _unpack_val(path, images, folder):
    wanted = {Path(folder, p) for _, image in images for p in (image, os.path.dirname(image))}
    # a run with other labels put images into other classes
    if not wanted.issuperset(Path(folder).rglob('*')):
        shutil.rmtree(folder)
    with _open_tar(path) as tar:
        for member, image in tqdm(images, 'val', mininterval=5, file=sys.stdout):
            _unpack(tar, member, os.path.join(folder, image))


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
    refuse(
        (
            not os.path.isfile(path) or os.path.getsize(path) > LARGEST_LIST,
            f'--val_labels {path} is not a file of at most {LARGEST_LIST:,} bytes',
        )
    )
    with as_user_error(f'--val_labels {path} cannot be read', OSError, UnicodeDecodeError):
        lines = Path(path).read_text('utf-8-sig').rstrip().split('\n')
    wnids, labels = sorted(classes), {}
    for i, line in enumerate(lines, 1):
        place = f'--val_labels {path}, line {i}'
        match = LABEL_LINE.fullmatch(line.strip())
        refuse(
            (
                not match,
                f"{place}: {line[:60]!r} is not 'IMAGE WNID', 'IMAGE INDEX' or 'WNID'; fix it "
                "(for the devkit's list of bare numbers, pass --devkit)",
            )
        )
        number, label = int(match[1] or i), match[2]
        refuse(
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
    with _open_tar(path, mode='r:*') as tar:
        members = {os.path.basename(member.name): member for member in tar if member.isfile()}
        for file in DEVKIT_FILES:
            refuse(
                (
                    file not in members or members[file].size > LARGEST_LIST,
                    f'--devkit {path}: {file} is missing or larger than {LARGEST_LIST:,} bytes; '
                    'download ILSVRC2012_devkit_t12.tar.gz again',
                )
            )
        meta, truth = (tar.extractfile(members[file]).read() for file in DEVKIT_FILES)
    with as_user_error(
        f'--devkit {path} needs SciPy: pip install scipy, or pass --val_labels instead', ImportError
    ):
        from scipy.io import loadmat  # only the devkit needs it, so it is not a requirement
    try:
        wnids = {
            int(s['ILSVRC2012_ID']): WNID.fullmatch(str(s['WNID']))[0]
            for s in loadmat(io.BytesIO(meta), squeeze_me=True)['synsets'].reshape(-1)
            if s['num_children'] == 0
        }
        return {number: wnids[int(line)] for number, line in enumerate(truth.split(), 1)}
    except Exception as e:  # the parser raises many types on a damaged file
        raise UserError(
            f'--devkit {path} is damaged ({type(e).__name__}: {str(e)[:80]!r}); download it again'
        ) from e


# ---- the output folder ----


# Create ``folder`` and lock it; wait for another run that is working in it.
def _lock_folder(folder):
    os.makedirs(folder, exist_ok=True)
    lock = FileLock(os.path.join(folder, '.prepare_imagenet.lock'))
    with contextlib.suppress(Timeout):
        return lock.acquire(timeout=0)
    print(f'Waiting for another run that is working in {folder}', flush=True)
    return lock.acquire()


# Return the class folders in ``folder``; none if there is no such folder.
def _classes_in(folder):
    return {path.name for path in Path(folder).glob('*') if path.is_dir()}


def _check_counts(path, found, expected):
    refuse(
        (
            found != expected,
            f'{path} has {found}, expected {expected}; replace it, or pass --counts if '
            'that is right',
        )
    )


# Rename FOLDER.part to FOLDER after counting its images; count those of an existing FOLDER.
def _finish(folder, expected):
    counted = folder if os.path.exists(folder) else f'{folder}.part'
    classes = _classes_in(counted)
    images = sum(
        TRAIN_IMAGE.fullmatch(file) is not None
        for name in classes
        for file in os.listdir(os.path.join(counted, name))
    )
    _check_counts(counted, f'{images} images in {len(classes)} classes', expected)
    if counted != folder:
        os.rename(counted, folder)
    print(f'{folder}: {expected}{" (was there already)" * (counted == folder)}')


# ---- the command ----


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.prepare_imagenet', description=__doc__)
    parser.add_argument(
        '--train_tar', metavar='FILE', help='ILSVRC2012_img_train.tar; default: train/ is not built'
    )
    parser.add_argument(
        '--val_tar', metavar='FILE', help='ILSVRC2012_img_val.tar; default: val/ is not built'
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        '--devkit', metavar='FILE', help='labels of val: ILSVRC2012_devkit_t12.tar.gz (needs SciPy)'
    )
    labels.add_argument(
        '--val_labels',
        metavar='FILE',
        help="labels of val: a text file with lines 'ILSVRC2012_val_00000001.JPEG n01751748'; "
        'the WNID may be replaced by its index among the sorted classes of train, from 0; or '
        'WNIDs only, in the order of the images',
    )
    parser.add_argument(
        '--output_dir', default='imagenet', metavar='DIR', help='where train/ and val/ are built'
    )
    parser.add_argument(
        '--counts',
        nargs=3,
        type=bounded(int, 0),
        default=[1000, 1281167, 50000],
        metavar=('CLASSES', 'TRAIN', 'VAL'),
        help='expected counts: classes, training images, validation images',
    )
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
    train, val = (os.path.join(args.output_dir, split) for split in ('train', 'val'))
    in_classes = f'{args.counts[0]} classes'
    in_train, in_val = (f'{images} images in {in_classes}' for images in args.counts[1:])
    with as_user_error(f'--output_dir {args.output_dir}', OSError), _lock_folder(args.output_dir):
        # Find everything that is wrong with archives and labels before unpacking for hours.
        train_classes, val_classes = _classes_in(train), _classes_in(val)
        train_source, val_source, archives, images = train, val, {}, []
        if args.train_tar and not os.path.exists(train):
            train_source, archives = args.train_tar, index_train(args.train_tar)
            train_classes = set(archives)
            _check_counts(args.train_tar, f'{len(archives)} classes', in_classes)
        if args.val_tar and not os.path.exists(val):
            val_source = args.devkit or args.val_labels
            labels = (
                read_devkit(val_source) if args.devkit else read_list(val_source, train_classes)
            )
            images = list(_index_val(args.val_tar, labels, val_source))
            val_classes = {os.path.dirname(image) for _, image in images}
            _check_counts(
                args.val_tar, f'{len(images)} images in {len(val_classes)} classes', in_val
            )
        refuse(
            (
                train_classes and val_classes and train_classes != val_classes,
                f'{train_source} and {val_source} have different classes; replace one of them: '
                f'only one has {min(train_classes ^ val_classes, default="")}',
            )
        )
        for tar, unpack, found, folder, expected in (
            (args.train_tar, _unpack_train, archives, train, in_train),
            (args.val_tar, _unpack_val, images, val, in_val),
        ):
            if found:
                unpack(tar, found, f'{folder}.part')
            if tar:
                _finish(folder, expected)


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
