"""tools/prepare_imagenet.py on small archives built like the official ones: real processes, and kills at every step of a run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from conftest import ROOT, run
from filelock import FileLock
from imagenet_archives import (
    LISTS,
    TRAIN_TREE,
    TRUTH,
    VAL_TREE,
    class_images,
    devkit,
    pack,
    special,
    times,
    train_members,
    tree,
    val_members,
    val_name,
)
from torchvision.datasets import ImageFolder

from tools import prepare_imagenet
from util.errors import UserError

SCRIPT = ROOT / 'tools' / 'prepare_imagenet.py'
COUNTS = ['--counts', 3, 9, 6]


@pytest.fixture
def official(tmp_path):
    """The archives, and the flags that name them."""
    files = {'train.tar': pack(train_members()), 'val.tar': pack(val_members()), 'labels.txt': LISTS['named'].encode()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    train, val, labels = (tmp_path / name for name in files)
    return SimpleNamespace(root=tmp_path, out=tmp_path / 'out', train_tar=train, val_tar=val, labels=labels,
                           train=['--train_tar', train], val=['--val_tar', val, '--val_labels', labels])


def prepare(official, *flags, counts=COUNTS, **kwargs):
    return run(sys.executable, SCRIPT, '--output_dir', official.out, *counts, *flags, timeout=60, **kwargs)


def namespace(official, train, val):
    return Namespace(train_tar=train and str(official.train_tar), val_tar=val and str(official.val_tar), devkit=None,
                     val_labels=str(official.labels), output_dir=str(official.out), counts=[3, 9, 6])


def assert_made(result, official, expected):
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert tree(official.out) == expected


def assert_refused(result, *words):
    assert result.returncode != 0
    line, = result.stderr.splitlines()
    assert line.startswith('error: ') and all(str(word) in line for word in words), line


# ---- what it makes ----

@pytest.mark.parametrize('kind', LISTS)
def test_label_lists(official, kind):
    official.labels.write_bytes(LISTS[kind].encode())
    result = prepare(official, *official.train, *official.val)
    assert_made(result, official, {**TRAIN_TREE, **VAL_TREE})
    assert 'train: 9 images in 3 classes' in result.stdout and 'val: 6 images in 3 classes' in result.stdout
    folders = [ImageFolder(official.out / split) for split in ('train', 'val')]
    assert folders[0].class_to_idx == folders[1].class_to_idx and folders[0][8][1] == 2


def test_devkit_and_val_alone(official):
    (official.root / 'devkit.tar.gz').write_bytes(devkit())
    assert_made(prepare(official, '--val_tar', official.val_tar, '--devkit', official.root / 'devkit.tar.gz'), official, VAL_TREE)


def test_one_split_after_the_other(official):
    official.labels.write_text(LISTS['indices'])
    assert_refused(prepare(official, *official.val), 'line 1', 'no class 2', '--train_tar')
    assert_made(prepare(official, *official.train), official, TRAIN_TREE)
    assert_made(prepare(official, *official.val), official, {**TRAIN_TREE, **VAL_TREE})


def test_again(official):
    """Nothing is touched, nor are the archives asked for."""
    prepare(official, *official.train, *official.val)
    before = times(official.out)
    for file in (official.train_tar, official.val_tar, official.labels):
        file.unlink()
    result = prepare(official, *official.train, *official.val)
    assert result.returncode == 0 and result.stdout.count('were there already') == 2
    assert times(official.out) == before


def test_litter_folders_and_other_endings(official):
    def litter(members):
        folder = tarfile.TarInfo('./n01443537')
        folder.type = tarfile.DIRTYPE
        return [folder, ('./n01443537/._n01443537_100.JPEG', b'resource fork'), ('.DS_Store', b'')] + [
            (f'./n01443537/{name}', content) for name, content in members]

    official.train_tar.write_bytes(pack([('._n01440764.tar', b'?'), *((f'./{n}', c) for n, c in train_members(litter))]))
    official.val_tar.write_bytes(pack([(name.replace('JPEG', 'jpg'), content) for name, content in val_members()]))
    expected = {**TRAIN_TREE, **{path.replace('JPEG', 'jpg'): content for path, content in VAL_TREE.items()}}
    assert_made(prepare(official, *official.train, *official.val), official, expected)


def test_two_at_once(official):
    official.out.mkdir()
    command = [str(c) for c in (sys.executable, SCRIPT, '--output_dir', official.out, *COUNTS, *official.train)]
    with FileLock(official.out / '.prepare_imagenet.lock'):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert b'Another run is at work' in process.stdout.readline() and tree(official.out) == {}
    process.communicate(timeout=60)
    assert process.returncode == 0 and tree(official.out) == TRAIN_TREE


# ---- stopped and started again ----

KILLER = '''
import os, shutil, signal, sys
from tools import prepare_imagenet
root, out = sys.argv[1:]
args = prepare_imagenet.parse_args(['--train_tar', root + '/train.tar', '--val_tar', root + '/val.tar', '--output_dir', out,
                                    '--val_labels', root + '/labels.txt', '--counts', '3', '9', '6'])
steps = 0

def step(event, arguments):
    global steps
    if event in ('open', 'os.mkdir', 'os.rename') and str(arguments[0]).startswith(out):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

def copy_in_halves(source, target, _):
    content = source.read()
    for half in (content[:len(content) // 2], content[len(content) // 2:]):
        target.write(half)
        target.flush()
        step('open', [out])

def child(work):
    pid = os.fork()
    if not pid:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def until_killed():
    sys.addaudithook(step)
    shutil.copyfileobj = copy_in_halves
    prepare_imagenet.main(args)

last, code = 0, -9
while code == -9:
    last += 1
    shutil.rmtree(out, ignore_errors=True)
    code = child(until_killed)
    shutil.copytree(out, f'{root}/killed/{last}') if os.path.exists(out) else os.makedirs(f'{root}/killed/{last}')
    if child(lambda: prepare_imagenet.main(args)) != 0:
        sys.exit(f'no restart after step {last}')
    shutil.copytree(out, f'{root}/restarted/{last}')
sys.exit(code)
'''


def test_killed_at_every_step(official):
    """SIGKILL before each file or folder is made or renamed, and in the middle and at the end of each file's content."""
    everything = {**TRAIN_TREE, **VAL_TREE}
    result = run(sys.executable, '-c', KILLER, official.root, official.out, cwd=ROOT, timeout=100)
    assert result.returncode == 0, result.stderr
    killed = list((official.root / 'killed').iterdir())
    assert len(killed) > 3 * len(everything) + 10
    for folder in killed:
        left = tree(folder)
        for split, whole in (('train', TRAIN_TREE), ('val', VAL_TREE)):
            if (folder / split).exists():
                assert {path: content for path, content in left.items() if path.startswith(split + '/')} == whole
        for wnid in os.listdir(folder / 'train.part') if (folder / 'train.part').exists() else []:
            if not wnid.endswith('.part'):
                assert sorted(os.listdir(folder / 'train.part' / wnid)) == sorted(name for name, _ in class_images(wnid))
        assert tree(official.root / 'restarted' / folder.name) == everything, f'step {folder.name}'


def test_killed_in_the_middle_of_an_image(official):
    """A real run, stopped from outside with a large image half written. The class before it is not unpacked again."""
    large = os.urandom(1 << 20) * 60
    official.train_tar.write_bytes(pack(train_members(lambda members: [*members, ('n01443537_large.JPEG', large)])))
    half = official.out / 'train.part' / 'n01443537.part' / 'n01443537_large.JPEG'
    command = [sys.executable, SCRIPT, '--output_dir', official.out, '--counts', 3, 10, 6, *official.train]
    for _ in range(20):  # on a busy machine the kill may come late
        shutil.rmtree(official.out, ignore_errors=True)
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (half.exists() and half.stat().st_size):
            time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if half.exists() and half.stat().st_size < len(large):
            break
    assert 0 < half.stat().st_size < len(large) and not (official.out / 'train').exists()

    before = {path.name: time for path, time in times(official.out / 'train.part').items() if path != half}
    assert len(before) == 5  # two of the first class, three of the second
    result = prepare(official, *official.train, counts=['--counts', 3, 10, 6])
    assert_made(result, official, {**TRAIN_TREE, 'train/n01443537/n01443537_large.JPEG': large})
    assert before.items() <= {path.name: time for path, time in times(official.out).items()}.items()


def test_other_labels_after_a_stop(official):
    """No image stays in the class where the labels of the run before had it."""
    wrong = official.out / 'val.part' / 'n01440764'
    wrong.mkdir(parents=True)
    (wrong / val_name(1)).write_bytes(val_members()[0][1])
    assert_made(prepare(official, *official.val), official, VAL_TREE)


# ---- what it refuses ----

HOSTILE = {
    'symbolic link': special('n01443537_9.JPEG', tarfile.SYMTYPE), 'hard link': special('n01443537_9.JPEG', tarfile.LNKTYPE),
    'device': special('n01443537_9.JPEG', tarfile.CHRTYPE), 'pipe': special('n01443537_9.JPEG', tarfile.FIFOTYPE),
    'sparse file': special('n01443537_9.JPEG', tarfile.GNUTYPE_SPARSE),
    'absolute': ('/tmp/n01443537_9.JPEG', b'x'), 'outside': ('../../../n01443537_9.JPEG', b'x'),
    'outside, further down': ('a/../../../n01443537_9.JPEG', b'x'), 'backslashes': ('..\\n01443537_9.JPEG', b'x'),
    'a line end': ('n01443537_9\n.JPEG', b'x'), 'no image': ('n01443537_9.sh', b'x')}


@pytest.mark.parametrize('member', HOSTILE.values(), ids=HOSTILE)
def test_hostile_members(official, member):
    """In the archive of val, among the classes, and among the images of a class."""
    name = repr(member.name if isinstance(member, tarfile.TarInfo) else member[0])
    around = {path.name for path in official.root.iterdir()} | {'out'}
    for path, members in ((official.val_tar, val_members()), (official.train_tar, train_members())):
        path.write_bytes(pack([*members, member]))
        with pytest.raises(UserError, match=re.escape(f'{path} has a member {name}')):
            prepare_imagenet.main(namespace(official, path == official.train_tar, path == official.val_tar))
    assert tree(official.out) == {}
    official.train_tar.write_bytes(pack(train_members(lambda members: [*members, member])))
    assert_refused(prepare(official, *official.train), f'n01443537.tar in {official.train_tar}', name)
    assert not (official.out / 'train.part' / 'n01443537').exists() and not (official.out / 'train').exists()
    assert {path.name for path in official.root.iterdir()} == around


def test_swapped(official):
    swapped = ['--train_tar', official.val_tar, '--val_tar', official.train_tar, '--val_labels', official.labels]
    assert_refused(prepare(official, *swapped), '--train_tar', val_name(1), '--val_tar')
    assert_refused(prepare(official, *swapped[2:]), '--val_tar', 'n01440764.tar', '--train_tar')
    assert tree(official.out) == {}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cut_anywhere(official, split):
    """At every block and in the middle of every block, and nothing is written before that is found."""
    path = official.root / f'{split}.tar'
    whole = path.read_bytes()
    content = len(whole.rstrip(b'\0'))
    content += -content % 512  # what follows are the zeros at the end
    for length in range(0, content + 1, 256 if split == 'val' else 768):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match='fetch it again'):
            prepare_imagenet.main(namespace(official, split == 'train', split == 'val'))
    assert tree(official.out) == {}


@pytest.mark.parametrize('cut', [100, 700, 1024, -10240])
def test_a_class_archive_that_is_cut(official, cut):
    """In an archive that is whole. A good one then completes what is there."""
    members = [(name, content[:cut] if name == 'n01443537.tar' else content) for name, content in train_members()]
    members[1] = (members[1][0], members[1][1].rstrip(b'\0') if cut == -10240 else members[1][1])
    official.train_tar.write_bytes(pack(members))
    assert_refused(prepare(official, *official.train), f'n01443537.tar in {official.train_tar}', 'fetch it again')
    assert os.path.isdir(official.out / 'train.part' / 'n01440764') and not (official.out / 'train').exists()
    official.train_tar.write_bytes(pack(train_members()))
    assert_made(prepare(official, *official.train), official, TRAIN_TREE)


@pytest.mark.parametrize('content, message', [
    (None, 'No such file'), (b'', 'empty file'), (b'hello', 'not a tar file'), (bytes(10240), 'has 0 classes'),
    (special('long name', b'L').tobuf() * 3000, 'recursion'), (pack(train_members(), 'w:gz'), 'not a tar file'),
    (pack([*train_members(), *train_members()]), "'n01440764' twice"), (pack(train_members(lambda _: [])), 'n01443537.tar in'),
    (pack(train_members()[:2]), 'has 2 classes and should have 3'),
], ids=['missing', 'empty', 'text', 'no members', 'endless header', 'compressed', 'twice', 'empty class', 'class missing'])
def test_wrong_archives(official, content, message):
    official.train_tar.unlink()
    if content is not None:
        official.train_tar.write_bytes(content)
    assert_refused(prepare(official, *official.train), official.train_tar, message)
    assert not (official.out / 'train').exists()


def test_wrong_counts(official):
    """The numbers of the whole ImageNet are expected unless others are given; with the right ones nothing is unpacked again."""
    assert_refused(prepare(official, *official.train, counts=[]), 'has 3 classes and should have 1000', '--counts')
    assert_refused(prepare(official, *official.val, counts=[]), '6 images in 3 classes and should have 50000 in 1000', '--counts')
    assert_refused(prepare(official, *official.val, counts=['--counts', 3, 9, 7]), '6 images in 3 classes and should have 7 in 3')
    assert tree(official.out) == {}
    assert_refused(prepare(official, *official.train, counts=['--counts', 3, 10, 6]), 'train.part has 9 images', 'should have 10')
    assert not (official.out / 'train').exists()
    before = times(official.out)
    assert_made(prepare(official, *official.train), official, TRAIN_TREE)
    assert sorted(before.values()) == sorted(times(official.out).values())
    next((official.out / 'train').rglob('*.JPEG')).unlink()
    assert_refused(prepare(official, *official.train), 'train has 8 images in 3 classes and should have 9 in 3')


@pytest.mark.parametrize('text, words', [
    (LISTS['named'][:-40], (val_name(6), 'only for 5')),
    (LISTS['in order'][:-10], (val_name(6), 'only for 5')),
    (LISTS['named'].replace('n01443537', 'n09999999'), (val_name(3), 'n09999999', 'of train')),
    (LISTS['named'].replace('val_00000003', 'val_00000013'), (val_name(3), 'no label')),
    (LISTS['named'].replace('val_00000003', 'test_00000003'), ('line 3', 'test_00000003')),
    (LISTS['indices'].replace('JPEG 1', 'JPEG 3'), ('line 3', 'no class 3')),
    (LISTS['named'] + LISTS['named'][:40], ('line 7', 'image 1')),
    (LISTS['in order'] + LISTS['named'], ('line 7', 'not as line 1')),
    (LISTS['in order'].replace('\n', '\n\n', 1), ('line 2', "''")),
    ('490\n361\n', ('line 1', "'490'", '--devkit')),
    ('', ('line 1',)), ('\xff\xfe', ('line 1',)), (None, ('No such file',)),
], ids=['short', 'short, in order', 'unknown class', 'other number', 'other name', 'index', 'twice', 'mixed', 'empty line',
        "the devkit's", 'empty', 'no text', 'missing'])
def test_wrong_labels(official, text, words):
    official.labels.unlink()
    if text is not None:
        official.labels.write_text(text)
    assert_refused(prepare(official, *official.train, *official.val), official.labels, *words)
    assert tree(official.out) == {}


@pytest.mark.parametrize('files, message', [
    ({'meta.mat': None}, 'has no meta.mat'), ({TRUTH: None}, f'has no {TRUTH}'), ({'meta.mat': b'damaged'}, 'makes no sense'),
    ({TRUTH: b'1\n4\n'}, "KeyError: '4'"), ({TRUTH: b'1\n2\n'}, f'no label for {val_name(3)}'),
], ids=['no meta.mat', 'no list', 'damaged', 'no class', 'short'])
def test_wrong_devkits(official, files, message):
    path = official.root / 'devkit.tar.gz'
    path.write_bytes(devkit(**files))
    assert_refused(prepare(official, '--val_tar', official.val_tar, '--devkit', path), path, message)


def test_cut_devkit_and_no_scipy(official):
    path = official.root / 'devkit.tar.gz'
    path.write_bytes(devkit()[:-300])
    assert_refused(prepare(official, '--val_tar', official.val_tar, '--devkit', path), path, 'fetch it again')
    path.write_bytes(devkit())
    (official.root / 'scipy.py').write_text('raise ImportError')
    result = prepare(official, '--val_tar', official.val_tar, '--devkit', path, env={'PYTHONPATH': str(official.root)})
    assert_refused(result, 'pip install scipy', '--val_labels')
    assert_made(prepare(official, *official.val, env={'PYTHONPATH': str(official.root)}), official, VAL_TREE)


def test_disk_full(official):
    """The second class goes to a device that is always full."""
    folder = official.out / 'train.part' / 'n01443537.part'
    folder.mkdir(parents=True)
    (folder / 'n01443537_101.JPEG').symlink_to('/dev/full')
    assert_refused(prepare(official, *official.train), folder / 'n01443537_101.JPEG', 'No space left on device')
    assert os.path.isdir(official.out / 'train.part' / 'n01440764') and not (official.out / 'train').exists()
    (folder / 'n01443537_101.JPEG').unlink()  # someone made room
    assert_made(prepare(official, *official.train), official, TRAIN_TREE)


def test_no_place_to_write(official):
    official.out.write_text('a file')
    assert_refused(prepare(official, *official.train), f'--output_dir {official.out}')
    official.out.unlink()
    official.out.mkdir()
    (official.out / 'train').write_text('a file')
    assert_refused(prepare(official, *official.train), official.out / 'train')


def test_classes_that_differ(official):
    """val was made first, with labels that do not belong to this train."""
    official.labels.write_text(LISTS['named'].replace('n01443537', 'n09999999'))
    assert prepare(official, *official.val).returncode == 0
    assert_refused(prepare(official, *official.train), 'do not have the same classes', 'n01443537')


@pytest.mark.parametrize('flags, words', [
    ([], ('--train_tar',)), (['--val_tar', 'x'], ('--devkit', '--val_labels')),
    (['--val_tar', 'x', '--devkit', 'y', '--val_labels', 'z'], ('not allowed with',))])
def test_wrong_use(official, flags, words):
    assert_refused(prepare(official, *flags), *words)
    assert not official.out.exists()
