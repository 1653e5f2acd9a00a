"""tools/prepare_imagenet.py on small archives that are built like the official ones."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
from filelock import FileLock
from torchvision.datasets import ImageFolder

from tests.helpers import ROOT, ok, one_error_line, run, script
from tests.imagenet_archives import (
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

tool = script('tools.prepare_imagenet')
COMMAND = [sys.executable, '-m', 'tools.prepare_imagenet']
COUNTS = ['--counts', 3, 9, 6]
BOTH = {**TRAIN_TREE, **VAL_TREE}


@pytest.fixture
def official(tmp_path):
    """The archives and the flags that name them."""
    train, val, labels = (tmp_path / name for name in ('train.tar', 'val.tar', 'labels.txt'))
    train.write_bytes(pack(train_members()))
    val.write_bytes(pack(val_members()))
    labels.write_text(LISTS['named'])
    return SimpleNamespace(
        root=tmp_path,
        out=tmp_path / 'out',
        train_tar=train,
        val_tar=val,
        labels=labels,
        train=['--train_tar', train],
        val=['--val_tar', val, '--val_labels', labels],
    )


def prepare(official, *flags, counts=COUNTS):
    return tool('--output_dir', official.out, *counts, *flags)


def assert_built(result, official, expected):
    ok(result)
    assert result.stderr == '' and tree(official.out) == expected


# ---- results ----


@pytest.mark.parametrize('kind', LISTS)
def test_label_lists(official, kind):
    official.labels.write_bytes(LISTS[kind].encode())
    result = prepare(official, *official.train, *official.val)
    assert_built(result, official, BOTH)
    for line in ('train: 9 images in 3 classes', 'val: 6 images in 3 classes'):
        assert line in result.stdout
    folders = [ImageFolder(official.out / split) for split in ('train', 'val')]
    assert folders[0].class_to_idx == folders[1].class_to_idx and folders[0][8][1] == 2


def test_devkit_without_train(official):
    path = official.root / 'devkit.tar.gz'
    path.write_bytes(devkit())
    assert_built(
        prepare(official, '--val_tar', official.val_tar, '--devkit', path), official, VAL_TREE
    )


def test_one_split_after_the_other(official):
    official.labels.write_text(LISTS['indices'])
    one_error_line(prepare(official, *official.val), 'line 1', 'index 2', '--train_tar')
    assert_built(prepare(official, *official.train), official, TRAIN_TREE)
    assert_built(prepare(official, *official.val), official, BOTH)


def test_second_run_changes_nothing(official):
    """It does not need the archives either."""
    ok(prepare(official, *official.train, *official.val))
    before = times(official.out)
    for file in (official.train_tar, official.val_tar, official.labels):
        file.unlink()
    ok(prepare(official, *official.train, *official.val))
    assert times(official.out) == before


def test_hidden_files_folders_and_other_endings(official):
    def add_hidden_files(members):
        folder = tarfile.TarInfo('./n01443537')
        folder.type = tarfile.DIRTYPE
        hidden = [('./n01443537/._n01443537_100.JPEG', b'resource fork'), ('.DS_Store', b'')]
        return [folder, *hidden, *((f'./n01443537/{name}', c) for name, c in members)]

    train = [(f'./{name}', content) for name, content in train_members(add_hidden_files)]
    val = [(name.replace('JPEG', 'jpg'), content) for name, content in val_members()]
    official.train_tar.write_bytes(pack([('._n01440764.tar', b'?'), *train]))
    official.val_tar.write_bytes(pack(val))
    renamed = {path.replace('JPEG', 'jpg'): content for path, content in VAL_TREE.items()}
    result = prepare(official, *official.train, *official.val)
    assert_built(result, official, {**TRAIN_TREE, **renamed})


@pytest.mark.slow
def test_two_runs_at_once(official):
    official.out.mkdir()
    command = [*COMMAND, '--output_dir', official.out, *COUNTS, *official.train]
    with FileLock(official.out / '.prepare_imagenet.lock'):
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert 'Waiting' in process.stdout.readline() and tree(official.out) == {}
    out, err = process.communicate(timeout=60)
    result = subprocess.CompletedProcess(command, process.returncode, out, err)
    assert_built(result, official, TRAIN_TREE)


# ---- stopped and restarted ----

KILLER = """
import os, shutil, signal, sys
from tools import prepare_imagenet

root, out = sys.argv[1:]
args = prepare_imagenet.get_args_parser().parse_args([
    '--train_tar', root + '/train.tar', '--val_tar', root + '/val.tar', '--output_dir', out,
    '--val_labels', root + '/labels.txt', '--counts', '3', '9', '6'])
steps = 0

def step(event, arguments):
    global steps
    if event in ('open', 'os.mkdir', 'os.rename') and str(arguments[0]).startswith(out):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

def copy_in_halves(source, target):
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
    os.makedirs(out, exist_ok=True)
    shutil.copytree(out, f'{root}/killed/{last}')
    if child(lambda: prepare_imagenet.main(args)) != 0:
        sys.exit(f'no restart after step {last}')
    shutil.copytree(out, f'{root}/restarted/{last}')
sys.exit(code)
"""


@pytest.mark.slow
def test_killed_at_every_step(official):
    """SIGKILL before any file or folder is created or renamed, and within and after each file."""
    result = run(sys.executable, '-c', KILLER, official.root, official.out, timeout=100)
    assert result.returncode == 0, result.stderr
    killed = list((official.root / 'killed').iterdir())
    assert len(killed) > 3 * len(BOTH) + 10
    for folder in killed:
        left = tree(folder)
        for split, expected in (('train', TRAIN_TREE), ('val', VAL_TREE)):
            if (folder / split).exists():
                found = {path for path in left if path.startswith(f'{split}/')}
                assert {path: left[path] for path in found} == expected
        for part in (folder / 'train.part').glob('n????????'):  # a class without .part is complete
            names = [name for name, _ in class_images(part.name)]
            assert sorted(os.listdir(part)) == sorted(names)
        assert tree(official.root / 'restarted' / folder.name) == BOTH, f'step {folder.name}'


@pytest.mark.slow
def test_killed_within_an_image(official):
    """Kill a process that has written half of a large image, in the second class."""
    large = os.urandom(1 << 20) * 60
    members = train_members(lambda members: [*members, ('n01443537_large.JPEG', large)])
    official.train_tar.write_bytes(pack(members))
    half = official.out / 'train.part' / 'n01443537.part' / 'n01443537_large.JPEG'
    counts = ['--counts', 3, 10, 6]
    command = [*COMMAND, '--output_dir', official.out, *counts, *official.train]
    for _ in range(20):  # the kill may come too late
        shutil.rmtree(official.out, ignore_errors=True)
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and not (half.exists() and half.stat().st_size):
            time.sleep(0.0002)
        process.kill()
        process.wait()
        if half.exists() and half.stat().st_size < len(large):
            break
    assert 0 < half.stat().st_size < len(large) and not (official.out / 'train').exists()

    written = times(official.out / 'train.part')
    before = {path.name: modified for path, modified in written.items() if path != half}
    assert len(before) == 5  # two of the first class, three of the second
    result = prepare(official, *official.train, counts=counts)
    assert_built(result, official, {**TRAIN_TREE, 'train/n01443537/n01443537_large.JPEG': large})
    after = {path.name: modified for path, modified in times(official.out).items()}
    assert before.items() <= after.items()  # not unpacked again


def test_other_labels_after_a_stop(official):
    """No image stays in the class in which the labels of the earlier run put it."""
    wrong = official.out / 'val.part' / 'n01440764'
    wrong.mkdir(parents=True)
    (wrong / val_name(1)).write_bytes(val_members()[0][1])
    assert_built(prepare(official, *official.val), official, VAL_TREE)


def test_disk_full(official):
    """The second class is written to a device that is always full."""
    folder = official.out / 'train.part' / 'n01443537.part'
    folder.mkdir(parents=True)
    file = folder / 'n01443537_101.JPEG'
    file.symlink_to('/dev/full')
    one_error_line(prepare(official, *official.train), file, 'No space left on device')
    assert (official.out / 'train.part' / 'n01440764').is_dir()
    assert not (official.out / 'train').exists()
    file.unlink()
    assert_built(prepare(official, *official.train), official, TRAIN_TREE)


# ---- wrong archives ----

HOSTILE = {
    'symbolic link': special('n01443537_9.JPEG', tarfile.SYMTYPE),
    'hard link': special('n01443537_9.JPEG', tarfile.LNKTYPE),
    'device': special('n01443537_9.JPEG', tarfile.CHRTYPE),
    'pipe': special('n01443537_9.JPEG', tarfile.FIFOTYPE),
    'sparse file': special('n01443537_9.JPEG', tarfile.GNUTYPE_SPARSE),
    'absolute path': ('/tmp/n01443537_9.JPEG', b'x'),
    'parent folder': ('../../../n01443537_9.JPEG', b'x'),
    'parent folder, inside': ('a/../../../n01443537_9.JPEG', b'x'),
    'backslashes': ('..\\n01443537_9.JPEG', b'x'),
    'line end': ('n01443537_9\n.JPEG', b'x'),
    'not an image': ('n01443537_9.sh', b'x'),
}


@pytest.mark.parametrize('member', HOSTILE.values(), ids=HOSTILE)
def test_hostile_members(official, member):
    """In val, among the class archives, and among the images of a class."""
    name = repr(member.name if isinstance(member, tarfile.TarInfo) else member[0])
    before = {path.name for path in official.root.iterdir()} | {'out'}
    official.val_tar.write_bytes(pack([*val_members(), member]))
    one_error_line(prepare(official, *official.val), official.val_tar, name)
    official.train_tar.write_bytes(pack([*train_members(), member]))
    one_error_line(prepare(official, *official.train), official.train_tar, name)
    assert tree(official.out) == {}
    official.train_tar.write_bytes(pack(train_members(lambda members: [*members, member])))
    result = prepare(official, *official.train)
    one_error_line(result, f'n01443537.tar in {official.train_tar}', name)
    assert not (official.out / 'train.part' / 'n01443537').exists()
    assert not (official.out / 'train').exists()
    assert {path.name for path in official.root.iterdir()} == before


def test_swapped_archives(official):
    train, val = ['--train_tar', official.val_tar], ['--val_tar', official.train_tar]
    one_error_line(prepare(official, *train), official.val_tar, '--train_tar', val_name(1))
    labels = ['--val_labels', official.labels]
    one_error_line(prepare(official, *val, *labels), '--val_tar', 'n01440764.tar')
    assert tree(official.out) == {}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cut_archives(official, split):
    """Cut at every block and within every block. Nothing is written before it is found."""
    path = official.root / f'{split}.tar'
    whole = path.read_bytes()
    content = len(whole.rstrip(b'\0'))
    content += -content % 512  # zeros follow
    flags = official.train if split == 'train' else official.val
    for length in range(0, content + 1, 256 if split == 'val' else 768):
        path.write_bytes(whole[:length])
        one_error_line(prepare(official, *flags), path, 'again')
    assert tree(official.out) == {}


@pytest.mark.parametrize('cut', [100, 700, 1024, -10240])
def test_cut_class_archive(official, cut):
    """The outer archive is complete. With a good archive, the same command resumes."""
    members = dict(train_members())
    members['n01443537.tar'] = members['n01443537.tar'][:cut]
    if cut == -10240:
        members['n01443537.tar'] = members['n01443537.tar'].rstrip(b'\0')
    official.train_tar.write_bytes(pack(members.items()))
    result = prepare(official, *official.train)
    one_error_line(result, f'n01443537.tar in {official.train_tar}', 'again')
    assert (official.out / 'train.part' / 'n01440764').is_dir()
    assert not (official.out / 'train').exists()
    official.train_tar.write_bytes(pack(train_members()))
    assert_built(prepare(official, *official.train), official, TRAIN_TREE)


WRONG_ARCHIVES = {
    'missing': (None, 'not a file'),
    'empty': (b'', 'empty file'),
    'text': (b'hello', 'not a complete tar file'),
    'without members': (bytes(10240), 'no class archives'),
    'endless header': (special('long name', b'L').tobuf() * 3000, 'recursion'),
    'compressed': (pack(train_members(), 'w:gz'), 'not a complete tar file'),
    'twice': (pack([*train_members(), *train_members()]), "'n01440764' twice"),
    'empty class': (pack(train_members(lambda _: [])), 'n01443537.tar in'),
    'missing class': (pack(train_members()[:2]), 'has 2 classes, expected 3'),
}


@pytest.mark.parametrize('case', WRONG_ARCHIVES)
def test_wrong_archives(official, case):
    content, message = WRONG_ARCHIVES[case]
    official.train_tar.unlink()
    if content is not None:
        official.train_tar.write_bytes(content)
    one_error_line(prepare(official, *official.train), official.train_tar, message)
    assert not (official.out / 'train').exists()


def test_wrong_counts(official):
    """The counts of ImageNet are the default. With the right --counts nothing is unpacked again."""
    for flags, counts, words in (
        (official.train, [], [official.train_tar, '3 classes', '1000 classes']),
        (official.val, [], ['6 images in 3 classes', '50000 images in 1000 classes']),
        (official.val, ['--counts', 3, 9, 7], ['6 images', '7 images in 3']),
    ):
        one_error_line(prepare(official, *flags, counts=counts), '--counts', *words)
    assert tree(official.out) == {}
    result = prepare(official, *official.train, counts=['--counts', 3, 10, 6])
    one_error_line(result, official.out / 'train.part', '9 images', '10 images')
    assert not (official.out / 'train').exists()
    before = times(official.out)
    assert_built(prepare(official, *official.train), official, TRAIN_TREE)
    assert sorted(before.values()) == sorted(times(official.out).values())
    next((official.out / 'train').rglob('*.JPEG')).unlink()
    one_error_line(prepare(official, *official.train), official.out / 'train', '8 images')


# ---- wrong labels ----

NAMED, IN_ORDER, INDICES = LISTS['named'], LISTS['in order'], LISTS['indices']
WRONG_LABELS = {
    'short': (NAMED[:-40], [val_name(6), '5 images']),
    'short, in order': (IN_ORDER[:-10], [val_name(6), '5 images']),
    'unknown class': (NAMED.replace('n01443537', 'n09999999'), ['different classes', 'n0']),
    'other number': (NAMED.replace('val_00000003', 'val_00000013'), [val_name(3)]),
    'other name': (NAMED.replace('val_00000003', 'test_00000003'), ['line 3', 'test_00000003']),
    'index': (INDICES.replace('JPEG 1', 'JPEG 3'), ['line 3', 'index 3']),
    'twice': (NAMED + NAMED[:40], ['line 7', 'image 1']),
    'two forms': (IN_ORDER + NAMED, ['line 7', 'image 1']),
    'empty line': (IN_ORDER.replace('\n', '\n\n', 1), ['line 2', "''"]),
    'list of the devkit': ('490\n361\n', ['line 1', "'490'", '--devkit']),
    'empty': ('', ['line 1']),
    'not text': ('\xff\xfe', ['line 1']),
    'missing': (None, ['--val_labels']),
}


@pytest.mark.parametrize('case', WRONG_LABELS)
def test_wrong_labels(official, case):
    text, words = WRONG_LABELS[case]
    official.labels.unlink()
    if text is not None:
        official.labels.write_text(text)
    one_error_line(prepare(official, *official.train, *official.val), official.labels, *words)
    assert tree(official.out) == {}


WRONG_DEVKITS = {
    'without meta.mat': ({'meta.mat': None}, 'meta.mat'),
    'without list': ({TRUTH: None}, TRUTH),
    'damaged': ({'meta.mat': b'damaged'}, 'damaged'),
    'unknown class': ({TRUTH: b'1\n4\n'}, 'damaged; download it again: 4'),
    'short': ({TRUTH: b'1\n2\n'}, val_name(3)),
}


@pytest.mark.parametrize('case', WRONG_DEVKITS)
def test_wrong_devkits(official, case):
    changed, word = WRONG_DEVKITS[case]
    path = official.root / 'devkit.tar.gz'
    path.write_bytes(devkit(**changed))
    one_error_line(prepare(official, '--val_tar', official.val_tar, '--devkit', path), path, word)


def test_cut_devkit_and_missing_scipy(official, monkeypatch):
    path = official.root / 'devkit.tar.gz'
    flags = ['--val_tar', official.val_tar, '--devkit', path]
    path.write_bytes(devkit()[:-300])
    one_error_line(prepare(official, *flags), path, 'again')
    path.write_bytes(devkit())
    for module in ('scipy', 'scipy.io'):
        monkeypatch.setitem(sys.modules, module, None)
    one_error_line(prepare(official, *flags), 'pip install scipy', '--val_labels')
    assert_built(prepare(official, *official.val), official, VAL_TREE)


def test_val_with_other_classes_than_train(official):
    """Build val first, with labels that do not belong to this train."""
    official.labels.write_text(NAMED.replace('n01443537', 'n09999999'))
    ok(prepare(official, *official.val))
    one_error_line(prepare(official, *official.train), official.out / 'val', 'n01443537')


# ---- wrong flags ----


def test_folder_that_cannot_be_written_to(official):
    official.out.write_text('a file')
    one_error_line(prepare(official, *official.train), f'--output_dir {official.out}')
    official.out.unlink()
    official.out.mkdir()
    (official.out / 'train').write_text('a file')
    one_error_line(prepare(official, *official.train), official.out / 'train')


@pytest.mark.parametrize(
    'flags, words',
    [
        ([], ['--train_tar']),
        (['--val_tar', 'x'], ['--devkit', '--val_labels']),
        (['--val_tar', 'x', '--devkit', 'y', '--val_labels', 'z'], ['not allowed with']),
    ],
    ids=['nothing', 'without labels', 'two lists of labels'],
)
def test_wrong_use(official, flags, words):
    one_error_line(prepare(official, *flags), *words)
    assert not official.out.exists()
