"""Makes ImageNet's train/ and val/, a folder a class in each as torchvision's ImageFolder reads them, from the official archives.

    python tools/prepare_imagenet.py --train_tar ILSVRC2012_img_train.tar --val_tar ILSVRC2012_img_val.tar \\
        --devkit ILSVRC2012_devkit_t12.tar.gz --output_dir imagenet

A run that was stopped, in whatever way, goes on from there when the same command is given again. A split grows as train.part or
val.part and gets its name after its images have been counted, so that a folder train/ is always a whole one. Besides the archives
this takes 140 GB of disk for train and 7 GB for val.
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
from pathlib import PurePosixPath

from filelock import FileLock, Timeout
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of a script, Python adds only its own folder

from util.errors import UserError  # noqa: E402
from util.parser import Parser, bounded  # noqa: E402

CHUNK = 1 << 20
WNID = re.compile(r'n[0-9]{8}')
IMAGE = re.compile(r'[\w.-]+\.(?i:jpe?g)')
VAL_IMAGE = re.compile(r'ILSVRC2012_val_([0-9]{8})\.(?i:jpe?g)')
LABEL_LINE = re.compile(rf'(?:{VAL_IMAGE.pattern}\s+)?({WNID.pattern}|(?<=\s)[0-9]{{1,9}})')
LARGEST_LIST = 1 << 22  # bytes of any list of labels; 50,000 lines of the longest kind are 2 MB
DEVKIT_FILES = 'meta.mat', 'ILSVRC2012_validation_ground_truth.txt'


# ---- archives ----

@contextlib.contextmanager
def archive(name, fileobj=None, mode='r:'):
    """The tar file at the path ``name``, or in ``fileobj``, as a TarFile. UserError for what goes wrong in reading it."""
    if fileobj is None and os.path.exists(name) and not os.path.isfile(name):
        raise UserError(f'{name} is no file; give the path of the official archive')
    try:
        with tarfile.open(name, mode, fileobj=fileobj) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, RecursionError, MemoryError) as e:
        # The later ones are what tarfile makes of absurd sizes and endless chains of headers.
        reason = str(e).partition('\n')[0].rstrip(':') or type(e).__name__
        raise UserError(f'{name} is not a tar file, or not a whole one ({reason}); fetch it again') from e
    except OSError as e:
        raise UserError(f'{name} cannot be read: {e.strerror or e}; give the path of the official archive') from e


def files(tar, name):
    """(member, bare file name) of the files in ``tar``, in its order. Folders and hidden files, macOS's litter, are left out.

    Raises UserError for members that an archive of images has no business to have, and for an archive that ends too early.
    """
    seen = set()
    for member in tar:
        path = PurePosixPath(member.name)
        outside = path.is_absolute() or '..' in path.parts or '\\' in member.name
        if outside or member.issparse() or not (member.isfile() or member.isdir()):
            what = 'points outside' if outside else 'is no plain file'
            raise UserError(f'{name} has a member {member.name!r} that {what}; the official archive has none: fetch it again')
        if member.isdir() or path.name.startswith('.'):
            continue
        if path.stem in seen:
            raise UserError(f'{name} has {path.stem!r} twice; fetch it again')
        seen.add(path.stem)
        yield member, path.name
    # tarfile takes an archive that was cut between two members for a whole one; only the zeros that end a tar file tell.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise UserError(f'{name} is cut off or damaged at byte {tar.offset}; fetch it again')


def save(tar, member, path):
    """Unpack ``member`` into the file ``path``. One that is there with its full size was finished by an earlier run."""
    try:
        if os.path.exists(path) and os.path.getsize(path) == member.size:
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tar.extractfile(member) as source, open(path, 'wb') as target:
            shutil.copyfileobj(source, target, CHUNK)
    except OSError as e:
        raise UserError(f'{path} cannot be unpacked: {e.strerror or e}; mend it, then the same command goes on') from e


def progress(items, **kwargs):
    """``items`` with a bar on stdout, since stderr is for errors; one update a minute where a log file is written."""
    return tqdm(items, file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 60, **kwargs)


# ---- train: a tar of 1,000 tars ----

def index_train(path):
    """{WNID: member} of the class archives in the training archive at ``path``."""
    classes = {}
    with archive(path) as tar:
        for member, file in files(tar, path):
            wnid, ending = os.path.splitext(file)
            if not WNID.fullmatch(wnid) or ending != '.tar':
                raise UserError(f'--train_tar {path} has a member {member.name!r} and should have only class archives such as '
                                'n01440764.tar; give ILSVRC2012_img_train.tar, and the images of val as --val_tar')
            classes[wnid] = member
    return classes


def unpack_train(path, classes, folder):
    """Unpack the classes that ``folder`` does not have yet."""
    with archive(path) as outer:
        for wnid, member in progress(classes.items(), desc='train', unit='class'):
            if not os.path.isdir(os.path.join(folder, wnid)):
                with outer.extractfile(member) as inner:
                    unpack_class(f'{member.name} in {path}', inner, os.path.join(folder, wnid))


def unpack_class(name, fileobj, folder):
    """All images of a class archive into ``folder``, which appears when the last of them is there."""
    part = folder + '.part'
    with archive(name, fileobj) as tar:
        for member, file in files(tar, name):
            if not IMAGE.fullmatch(file):
                raise UserError(f'{name} has a member {member.name!r} and should have only JPEG images; fetch it again')
            save(tar, member, os.path.join(part, file))
    if not os.path.isdir(part):
        raise UserError(f'{name} has no images; fetch it again')
    os.rename(part, folder)


# ---- val: a tar of 50,000 images, and their labels from elsewhere ----

def index_val(path, labels, source, classes):
    """[(member, 'WNID/FILE')] of the validation archive at ``path``; ``labels``, from the file ``source``, are {number: WNID}.

    A label outside ``classes``, those of train if they are known, is an error.
    """
    images = []
    with archive(path) as tar:
        for member, file in progress(files(tar, path), desc='index of val', unit='image', leave=False):
            match = VAL_IMAGE.fullmatch(file)
            if not match:
                raise UserError(f'--val_tar {path} has a member {member.name!r} and should have only images such as '
                                'ILSVRC2012_val_00000001.JPEG; give ILSVRC2012_img_val.tar, and the one of train as --train_tar')
            wnid = labels.get(int(match[1]))
            if wnid is None:
                raise UserError(f'{source} has no label for {file}, only for {len(labels)} images; give the complete list')
            if classes is not None and wnid not in classes:
                raise UserError(f'{source} puts {file} into {wnid}, which is not one of the {len(classes)} classes of train; '
                                'give the labels that belong to it')
            images.append((member, os.path.join(wnid, file)))
    return images


def unpack_val(path, images, folder):
    """Unpack the images that ``folder`` does not have yet."""
    wanted = {os.path.join(folder, p) for _, image in images for p in (image, os.path.dirname(image))}
    there = {os.path.join(root, name) for root, dirs, names in os.walk(folder) for name in dirs + names}
    if there - wanted:  # left by a run with other labels, which had images in other classes
        shutil.rmtree(folder)
    with archive(path) as tar:
        for member, image in progress(images, desc='val', unit='image'):
            save(tar, member, os.path.join(folder, image))


def read_list(path, classes):
    """{number of the image: WNID} from lines 'IMAGE WNID', 'IMAGE INDEX' or, in the images' order, 'WNID'; one kind in a file.

    An INDEX is the place in the sorted ``classes``, counted from 0. UserError for a line that is nothing of this.
    """
    if os.path.exists(path) and not (os.path.isfile(path) and os.path.getsize(path) <= LARGEST_LIST):
        raise UserError(f'--val_labels {path} is no file, or larger than {LARGEST_LIST:,} bytes; give the list of labels')
    try:
        with open(path, encoding='utf-8-sig') as f:
            lines = f.read().rstrip().split('\n')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'--val_labels {path} cannot be read: {getattr(e, "strerror", None) or "it is not a text file"}') from e
    classes, labels, first = sorted(classes or ()), {}, None
    for i, line in enumerate(lines, 1):
        number, label = match.groups() if (match := LABEL_LINE.fullmatch(line.strip())) else (None, None)
        kind = label and (number is None, label.isdigit())
        first = first or kind
        if not kind or kind != first:
            raise UserError(f"--val_labels {path}, line {i}: {line[:60]!r} is not 'IMAGE WNID', 'IMAGE INDEX' or 'WNID', or "
                            "not as line 1; mend it (for the devkit's list of bare numbers, give --devkit)")
        if label.isdigit() and int(label) >= len(classes):
            raise UserError(f'--val_labels {path}, line {i}: no class {label} among the {len(classes)} of train, counted from 0; '
                            'give --train_tar, or make train/ first')
        number = int(number or i)
        if number in labels:
            raise UserError(f'--val_labels {path}, line {i}: a second label for image {number}; take one of them out')
        labels[number] = classes[int(label)] if label.isdigit() else label
    return labels


def read_devkit(path):
    """{number of the image: WNID}: the devkit lists numbers of its own for the classes, which its meta.mat explains."""
    with archive(path, mode='r:*') as tar:
        members = {os.path.basename(member.name): member for member in tar if member.isfile()}
        if missing := [file for file in DEVKIT_FILES if file not in members]:
            raise UserError(f'--devkit {path} has no {missing[0]} in it; give ILSVRC2012_devkit_t12.tar.gz')
        if large := [file for file in DEVKIT_FILES if members[file].size > LARGEST_LIST]:
            raise UserError(f'--devkit {path}: {large[0]} in it has more than {LARGEST_LIST:,} bytes; fetch it again')
        meta, truth = (tar.extractfile(members[file]).read() for file in DEVKIT_FILES)
    try:
        from scipy.io import loadmat  # needed by nothing else here
    except ImportError:
        raise UserError(f'--devkit {path} takes SciPy to read: pip install scipy, or give --val_labels instead') from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)['synsets'].reshape(-1)
        wnids = {int(s['ILSVRC2012_ID']): WNID.fullmatch(str(s['WNID']))[0] for s in synsets if s['num_children'] == 0}
        return {number: wnids[int(line)] for number, line in enumerate(truth.split(), 1)}
    except Exception as e:  # whatever a parser raises on a damaged file
        raise UserError(f'--devkit {path} makes no sense ({type(e).__name__}: {str(e)[:80]!r}); fetch it again') from e


# ---- the run ----

def alone_in(folder):
    """Makes ``folder`` and keeps other runs out of it for the length of a with block; waits for one that is at work there."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, '.prepare_imagenet.lock'))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f'Another run is at work in {folder}; this one waits for it', flush=True)
            return lock.acquire()
    except OSError as e:
        raise UserError(f'--output_dir {folder} cannot be written to: {e.strerror or e}; choose another') from e


def classes_in(folder):
    return {entry.name for entry in os.scandir(folder) if entry.is_dir()}


def check(where, images, classes, expected):
    """UserError unless ``expected``, (images, classes), is what there is."""
    if (images, classes) != expected:
        raise UserError(f'{where} has {images} images in {classes} classes and should have {expected[0]} in {expected[1]}; '
                        'remove or replace it, or give --counts if that is right')


def finish(folder, expected):
    """Give a split its name if its images, counted on the disk, are all there."""
    made = not os.path.exists(folder)
    counted = folder + '.part' if made else folder
    classes = classes_in(counted)
    images = sum(IMAGE.fullmatch(file) is not None for name in classes for file in os.listdir(os.path.join(counted, name)))
    check(counted, images, len(classes), expected)
    if made:
        os.rename(counted, folder)
    print(f'{folder}: {images} images in {len(classes)} classes{"" if made else ", which were there already"}')


def get_args_parser():
    parser = Parser('tools/prepare_imagenet.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train_tar', metavar='FILE', help='ILSVRC2012_img_train.tar; without it, train/ is left alone')
    parser.add_argument('--val_tar', metavar='FILE', help='ILSVRC2012_img_val.tar; without it, val/ is left alone')
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument('--devkit', metavar='FILE', help='labels of val: ILSVRC2012_devkit_t12.tar.gz (needs SciPy)')
    labels.add_argument('--val_labels', metavar='FILE',
                        help="labels of val: a text file of lines 'ILSVRC2012_val_00000001.JPEG n01751748', or with the class's "
                        'place among the sorted ones of train, from 0, or just n01751748, in the order of the images')
    parser.add_argument('--output_dir', default='imagenet', metavar='DIR', help='receives train/ and val/ (default: %(default)s)')
    parser.add_argument('--counts', nargs=3, type=bounded(int, 0), default=[1000, 1281167, 50000],
                        metavar=('CLASSES', 'TRAIN', 'VAL'),
                        help='classes, and images of train and val, that there have to be (default: 1000 1281167 50000)')
    return parser


def parse_args(argv=None):
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if not args.train_tar and not args.val_tar:
        parser.error('there is nothing to unpack: give --train_tar, --val_tar or both')
    if args.val_tar and not args.devkit and not args.val_labels:
        parser.error('--val_tar has no labels in it: give --devkit or --val_labels too')
    return args


def main(args):
    train, val = (os.path.join(args.output_dir, split) for split in ('train', 'val'))
    of_train, of_val = ((images, args.counts[0]) for images in args.counts[1:])
    with alone_in(args.output_dir):
        # What can be wrong with archives and labels is looked for in both of them before the hours that unpacking takes.
        make_train, make_val = (tar and not os.path.exists(f) for tar, f in ((args.train_tar, train), (args.val_tar, val)))
        classes = index_train(args.train_tar) if make_train else classes_in(train) if os.path.isdir(train) else None
        if make_train and len(classes) != args.counts[0]:
            raise UserError(f'{args.train_tar} has {len(classes)} classes and should have {args.counts[0]}; '
                            'replace it, or give --counts if that is right')
        if make_val:
            labels = read_devkit(args.devkit) if args.devkit else read_list(args.val_labels, classes)
            images = index_val(args.val_tar, labels, args.devkit or args.val_labels, classes)
            check(args.val_tar, len(images), len({os.path.dirname(image) for _, image in images}), of_val)
        if make_train:
            unpack_train(args.train_tar, classes, train + '.part')
        if args.train_tar:
            finish(train, of_train)
        if make_val:
            unpack_val(args.val_tar, images, val + '.part')
        if args.val_tar:
            finish(val, of_val)
        if os.path.isdir(train) and os.path.isdir(val) and (odd := classes_in(train) ^ classes_in(val)):
            raise UserError(f'{train} and {val} do not have the same classes, {min(odd)} for one; replace the one that is wrong')


if __name__ == '__main__':
    try:
        main(parse_args())  # not by misc.run, which would load PyTorch: unpacking does not need it
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on from here')
    except (UserError, OSError) as e:
        sys.stdout.flush()
        sys.exit(f'error: {e}')
