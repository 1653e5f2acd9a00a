"""The weights in a TorchScript archive, OpenAI's file format, read without running anything that the archive holds.

torch.jit.load would compile and run code from the file. All that is wanted here is tensors, and those are a pickle that names
them (data.pkl) beside their bytes (data/0, data/1, ...).
"""

import os
import pickle
import zipfile

import torch

from util.errors import first_line
from util.integrity import check_sizes

_DTYPES = {'HalfStorage': torch.float16, 'FloatStorage': torch.float32, 'DoubleStorage': torch.float64,
           'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16, 'CharStorage': torch.int8,
           'ByteStorage': torch.uint8, 'BoolStorage': torch.bool, 'BFloat16Storage': torch.bfloat16}


class _Module:
    """Stands for an object of any class of the archive's: its attributes and nothing else."""

    def __init__(self, *args):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state


class _Unpickler(pickle._Unpickler):
    # The one in Python and not that in C, where a pickle of 10 bytes can ask for 64 GB (by an index into the memo).

    def __init__(self, archive, root):
        super().__init__(archive.open(f'{root}data.pkl'))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.startswith('__torch__'):
            return _Module
        if module == 'torch' and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return self.tensor
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if module == 'torch.jit._pickle':  # lists of one type, and such
            return self.as_it_is
        raise pickle.UnpicklingError(f'it holds {module}.{name}, which is no part of a CLIP')

    def tensor(self, storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)  # which refuses to reach beyond the storage

    def as_it_is(self, value, *_):
        return value

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != 'storage' or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError('it holds more than modules and tensors')
        if key not in self.storages:
            data = bytearray(self.archive.read(f'{self.root}data/{key}'))  # which compares the CRC-32
            if len(data) != numel * dtype.itemsize:
                raise pickle.UnpicklingError(f'the record {key} of a tensor is not as large as it should be')
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_torchscript(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith('/constants.pkl') for name in archive.namelist())
    except Exception:  # no zip archive, or a damaged one, of which zipfile has many kinds
        return False


def read_torchscript(path):
    """State dict of the module in the TorchScript archive at ``path``: tensors by their dotted names, on the CPU.

    Raises:
        ValueError: damaged, or not an archive of modules and tensors alone.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith('/constants.pkl')).removesuffix('constants.pkl')
            data = [r for r in archive.infolist() if r.filename.startswith((f'{root}data/', f'{root}data.pkl'))]
            check_sizes(data, os.path.getsize(path))  # the code beside them is compressed
            module = _Unpickler(archive, root).load()
        return dict(_tensors(module, '', set()))
    except Exception as e:  # whatever a file made to do harm can raise on the way
        raise ValueError(f'it is damaged, or no archive of modules and tensors alone: {first_line(e)}') from None


def _tensors(module, prefix, seen):
    if module in seen:
        raise ValueError('it has one module in two places')
    seen.add(module)
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f'{prefix}{name}.', seen)
