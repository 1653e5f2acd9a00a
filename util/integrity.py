"""What is looked at in a checkpoint file before PyTorch reads it: that it is whole, and that it names no foreign class.

torch.load looks at no checksums: a flipped bit inside a tensor loads without a word. Nor does PyTorch 2.6 compare sizes: it
reads beyond the memory of a record that is shorter than its pickle says.

A torch.save file is a zip archive with a CRC-32 of every record, from which damage is told. Records that were exchanged,
each with its right CRC-32, are told by a digest of them all, which our own writer adds. Two formats carry no checksum:
PyTorch's older one, a row of pickles and bytes, and .safetensors, to which tools/export.py adds ours.
"""

import hashlib
import os
import pickle
import re
import zipfile

import safetensors
import safetensors.torch
import torch

SEAL = '.sha256'  # the name of our record, and of our entry in the metadata of .safetensors
CHUNK = 1 << 22
LARGE = 1 << 33  # bytes of tensors that any machine here has room for
LONGEST_HEADER = 1 << 24  # bytes of JSON at the head of a .safetensors file; a ViT-H's are 0.1 MB

# What the known formats name beside plain values; of storages, the bytes of a number in them.
_STORAGES = {'torch.storage.UntypedStorage': 1, **{f'torch.{kind}Storage': size for kind, size in [
    ('Double', 8), ('Float', 4), ('Half', 2), ('BFloat16', 2), ('Long', 8), ('Int', 4), ('Short', 2), ('Char', 1),
    ('Byte', 1), ('Bool', 1)]}}
_NAMES = re.compile(
    r'collections\.OrderedDict|argparse\.Namespace|_codecs\.encode|(__builtin__|builtins)\.set|'
    r'torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)|'
    r'torch\.(Size|device|bool|(float|bfloat|int|uint)\d+(_\w+)?)')
_OLDER = 0x1950a86a20f9469cfc6c, 1001  # the magic number and version that a file of the older format begins with


class ForeignName(ValueError):
    """A pickle names a class or function that no known format has. The message is its dotted name."""


def seal(file):
    """Add to the zip archive in ``file``, open for reading and writing, a record with the digest of the others."""
    with zipfile.ZipFile(file, 'a') as archive:
        records = archive.infolist()
        root = records[0].filename.partition('/')[0]
        archive.writestr(f'{root}/{SEAL}', _digest(records))


def _digest(records):
    """Hex SHA-256 over the records' names, sizes and CRC-32s.

    Nothing has to be read for it, and against damage it is as good as one over their bytes. Against an attacker neither is:
    who can write one file can write another.
    """
    listed = sorted((r.filename, r.file_size, r.CRC) for r in records)
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def check(path, stand_ins=()):
    """Look through the torch.save file at ``path``, of either format, before torch.load does.

    Nothing is run or imported. ``stand_ins``: dotted names that may be in it beside those of all formats.

    Raises:
        ForeignName: it would import something else.
        ValueError, and whatever zipfile and pickle have for damaged files: it is not whole, not as it was sealed, or would
            take more memory than the file takes space.
    """
    if is_zip(path):
        with zipfile.ZipFile(path) as archive:
            _check_records(archive, os.path.getsize(path))
            sizes = {r.filename.rpartition('/')[2]: r.file_size for r in archive.infolist() if '/data/' in r.filename}
            for name in archive.namelist():
                if name.endswith('.pkl'):
                    with archive.open(name) as f:
                        _Rehearsal(f, stand_ins, sizes).load()
        return
    with open(path, 'rb') as f:
        claimed = {}
        for first in [*_OLDER, None, None, None]:  # system, content, and the keys of the bytes that follow
            rehearsal = _Rehearsal(f, stand_ins)
            if rehearsal.load() != first and first:
                raise ValueError('torch.save writes no such file')
            claimed.update(rehearsal.claimed)
    if sum(claimed.values()) > os.path.getsize(path):
        raise ValueError('its tensors claim more bytes than the file has')


def is_zip(path):
    """Whether torch.load would take the file for a zip archive."""
    with open(path, 'rb') as f:
        return f.read(4) == b'PK\x03\x04'


def check_sizes(records, size):
    """ValueError if records of a zip file of ``size`` bytes are compressed, overlap, or are two of a name.

    PyTorch writes none of this, and by it a small file can fill the memory.
    """
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
        raise ValueError('it has compressed records')
    if sum(r.file_size for r in records) > size:
        raise ValueError('its records claim more bytes than the file has')
    if len({r.filename for r in records}) < len(records):
        raise ValueError('it has two records of one name')


def _check_records(archive, size):
    records = archive.infolist()
    check_sizes(records, size)
    if not any(r.CRC for r in records):  # torch.save can be told to leave the checksums out, and then writes zeros
        for record in records:
            del record.CRC  # what is not there, zipfile does not compare
        return
    for record in records:
        with archive.open(record) as f:
            while f.read(CHUNK):
                pass
    seals = [r for r in records if r.filename.endswith(f'/{SEAL}')]
    if seals and archive.read(seals[0]) != _digest([r for r in records if r is not seals[0]]).encode():
        raise ValueError('its records are not those that it was saved with')


class _Rehearsal(pickle._Unpickler):
    """Unpickles with blanks in place of all classes and functions, to see which they are and what bytes they ask for.

    Args:
        sizes: bytes of the records by their keys; None: not known.

    Attributes: claimed, the bytes of the storages by their keys.
    """

    # Python's unpickler in Python and not in C: there, a pickle of 10 bytes can ask for 64 GB (by an index into the memo).

    def __init__(self, file, stand_ins, sizes=None):
        super().__init__(file, encoding='latin1')
        self.stand_ins, self.sizes, self.claimed = stand_ins, sizes, {}

    def find_class(self, module, name):
        dotted = f'{module}.{name}'
        if not (_NAMES.fullmatch(dotted) or dotted in _STORAGES or dotted in self.stand_ins):
            raise ForeignName(dotted)
        return type(name, (_Blank,), {'itemsize': _STORAGES.get(dotted)})  # a new one, since pickles can write into classes

    def persistent_load(self, pid):
        kind, storage, key, _, numel = pid[:5]
        if kind != 'storage' or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise ValueError('it names bytes in a way that PyTorch does not')
        size = numel * storage.itemsize
        if self.sizes is not None and self.sizes[key] != size:
            raise ValueError(f'the record {key} of a tensor is not as large as it should be')
        self.claimed[key] = size
        return _Blank()


class _Blank:
    """Takes whatever a pickle does to an object."""

    def __init__(self, *args):
        pass

    def __setitem__(self, key, value):
        pass

    def __setstate__(self, state):
        pass

    append = extend = add = __setstate__


def check_claims(tensors):
    """ValueError if a dict of tensors, written out, would fill the memory, and takes little as it is: expanded tensors.

    A file of 1 kB can hold a tensor of 1 TB. It costs nothing until somebody copies it: check before.
    """
    held = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(value.numel() * value.element_size() for value in tensors.values()) > max(4 * sum(held.values()), LARGE):
        raise ValueError('its tensors claim more numbers than it has')


# ---- what a run that goes on takes from it beside the weights ----

_KEPT = {'AdamW': {'step', 'exp_avg', 'exp_avg_sq'}, 'LARS': {'mu'}}  # without which of a parameter they cannot go on


def check_training_state(checkpoint, optimizer):
    """ValueError unless what ``checkpoint`` has beside the weights is of the kinds and shapes that ``optimizer`` needs.

    Its own load_state_dict compares little more than counts, and what is wrong would come up in the middle of a step.
    """
    scaler = checkpoint.get('scaler') or {}
    numbers = {'epoch': 0, 'step': 0, 'step_images': 0, 'max_accuracy': 0.0, **dict.fromkeys(scaler, 0.0)}
    for name, value in {**checkpoint, **scaler}.items():
        if name in numbers and not _alike(numbers[name], value):
            raise ValueError(f'{name} is a {type(value).__name__}, or out of range')
    inside = 'step' in checkpoint  # it was saved inside the epoch after ``epoch``
    if not (-1 if inside else 0) <= checkpoint['epoch'] < 1e9 or inside and (checkpoint['step'] < 0 or 'sums' not in checkpoint):
        raise ValueError('there is no such epoch or step')
    saved = checkpoint['optimizer']
    groups, state = saved['param_groups'], saved['state']
    if not all(isinstance(v, dict) for v in (state, *groups)) or not all(isinstance(v, dict) for v in state.values()):
        raise ValueError('it is not the state of an optimiser')
    for ours, theirs in zip(optimizer.param_groups, groups):
        for name, value in ours.items():
            optional = value is None or isinstance(value, bool)  # of which releases of PyTorch have more or fewer
            if name != 'params' and not (_alike(value, theirs[name]) if name in theirs else optional):
                raise ValueError(f'its option {name} is missing or out of range')
    params = dict(zip((i for group in groups for i in group['params']),
                      (p for group in optimizer.param_groups for p in group['params'])))
    needed = _KEPT.get(type(optimizer).__name__, set())
    for i, kept in state.items():
        if i not in params or not needed <= kept.keys():
            raise ValueError('the state of a parameter has gaps')
        for name, value in kept.items():
            _check_kept(name, value, params[i], name in needed and name != 'step')
        steps = torch.as_tensor(kept.get('step', 0)).detach()
        if steps.ndim or steps < 0 or steps % 1:
            raise ValueError('the steps of a parameter are no count')


def _check_kept(name, value, parameter, whole):
    """ValueError unless an optimiser can keep ``value`` of ``parameter``: a tensor of its shape; a number if not ``whole``."""
    if not isinstance(value, torch.Tensor):
        if whole or not _alike(0.0, value):
            raise ValueError(f'{name} of a parameter is a {type(value).__name__}, or out of range')
        return
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # expanded, and not to be written to
        raise ValueError(f'{name} of a parameter has fewer numbers than its shape says')
    if not value.is_floating_point() or (whole or value.ndim) and value.shape != parameter.shape:
        raise ValueError(f'{name} of shape {list(value.shape)} for a parameter of shape {list(parameter.shape)}')


def _alike(ours, theirs):
    """Whether ``theirs`` can stand where ``ours`` does: a number where one is, a whole one, or a pair."""
    if isinstance(ours, tuple):
        return isinstance(theirs, (tuple, list)) and len(theirs) == len(ours) and all(map(_alike, ours, theirs))
    if ours is None or isinstance(ours, bool):
        return theirs is None or isinstance(theirs, bool)
    return isinstance(theirs, int if isinstance(ours, int) else (int, float)) and abs(theirs) < 1e30


# ---- .safetensors ----

def load_safetensors(path):
    """Tensors by name. ValueError: the file has our digest and is not as it was saved. SafetensorError: it is damaged."""
    with open(path, 'rb') as f:
        if int.from_bytes(f.read(8), 'little') > LONGEST_HEADER:
            raise ValueError(f'its header is longer than {LONGEST_HEADER} bytes')
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, 'pt') as f:
        expected = (f.metadata() or {}).get(SEAL)
    if expected not in (None, digest(tensors)):
        raise ValueError('its tensors are not those that it was saved with')
    return tensors


def digest(tensors):
    """Hex SHA-256 over names, types, shapes and bytes of a dict of tensors."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(repr((name, value.dtype, list(value.shape))).encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
