"""The list of a folder and its cache."""

import io
import os
import time
import zipfile

import numpy as np
import pytest
import torchvision

from tests.helpers import draw_photo
from util.data import image_folder
from util.data.image_folder import ImageFolder
from util.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Three classes, one with a subfolder, one empty; a text file; a hidden folder."""
    root = tmp_path / 'tree'
    for name in ('b/2.png', 'b/1.JPEG', 'b/deeper/0.png', 'a/ü.png', 'a/notes.txt', '.x/x.png'):
        draw_photo(root / f'{name}.png', name, (40, 30))
        (root / f'{name}.png').rename(root / name)
    (root / 'c').mkdir()
    return root


def paths(images):
    return [os.path.normpath(images.name(i)) for i in range(len(images))]


def test_order_equals_torchvisions(tree):
    ours, theirs = ImageFolder(tree), torchvision.datasets.ImageFolder(tree, allow_empty=True)
    assert ours.classes == ['a', 'b', 'c']
    samples = [(path, theirs.classes[label]) for path, label in theirs.samples if '.x' not in path]
    assert len(samples) == 4
    labels = [ours.classes[label] for label in ours.targets]
    assert list(zip(paths(ours), labels)) == [(os.path.normpath(p), name) for p, name in samples]
    assert [ours[i] for i in range(4)] == [(ours.name(i), ours.targets[i]) for i in range(4)]


def test_no_class_folders(tmp_path):
    (tmp_path / '.hidden').mkdir()
    with pytest.raises(UserError, match=str(tmp_path)):
        ImageFolder(tmp_path)


def set_times(root, when):
    """Set the modification time of all folders: the list of a recent change is not cached."""
    for path in (root, *(p for p in root.rglob('*') if p.is_dir())):
        os.utime(path, (when, when))


@pytest.fixture
def cache(tree, tmp_path, monkeypatch):
    """The cache file of ``tree``."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    ImageFolder(tree)
    assert not (tmp_path / 'cache').exists()  # too few files
    monkeypatch.setattr(image_folder, 'CACHE_FROM', 1)
    ImageFolder(tree)
    assert not (tmp_path / 'cache').exists()  # the folders have just changed
    set_times(tree, time.time() - 100)
    ImageFolder(tree)
    (path,) = (tmp_path / 'cache' / 'milan').iterdir()
    return path


def test_cache_is_read_until_a_folder_changes(tree, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, '_list', lambda *_: pytest.fail('listed again'))
        cached = ImageFolder(tree)
    cache.unlink()
    listed = ImageFolder(tree)
    assert paths(cached) == paths(listed) and cached.targets.tolist() == listed.targets.tolist()
    assert cached.targets.dtype == listed.targets.dtype

    (tree / 'b' / 'deeper' / '00.png').write_bytes(b'')
    assert len(ImageFolder(tree)) == len(listed) + 1


def enlarge(data):
    """Return the archive with a header that announces 10**14 elements."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, 'w') as new:
        for name in old.namelist():
            content = old.read(name)
            huge = content.replace(b'(4,), }' + 14 * b' ', b'(100000000000000,), }')
            assert len(huge) == len(content)
            new.writestr(name, huge)
    return file.getvalue()


def other_archive(data):
    file = io.BytesIO()
    np.savez(file, other=np.zeros(3))
    return file.getvalue()


DAMAGE = {
    'empty': lambda data: b'',
    'start': lambda data: data[:100],
    'cut': lambda data: data[:-30],
    'bit': lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    'text': lambda data: b'not an archive' * 100,
    'pickle': lambda data: np.zeros(1).dumps(),
    'other archive': other_archive,
    'huge': enlarge,
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_cache_is_replaced(damage, tree, cache):
    expected = [ImageFolder(tree)[i] for i in range(4)]
    whole = cache.read_bytes()
    cache.write_bytes(DAMAGE[damage](whole))
    assert cache.read_bytes() != whole
    folder = ImageFolder(tree)
    assert [folder[i] for i in range(len(folder))] == expected
    assert cache.read_bytes() == whole


def test_cache_folder_that_cannot_be_written(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, 'CACHE_FROM', 1)
    set_times(tree, 1)
    (tmp_path / 'file').write_bytes(b'')
    for blocked in (tmp_path / 'file', tmp_path / 'file' / 'folder'):
        monkeypatch.setenv('XDG_CACHE_HOME', str(blocked))
        assert len(ImageFolder(tree)) == 4
