"""The weights in a TorchScript archive, OpenAI's file format, read without running anything that the archive holds.

torch.jit.load would compile and run code from the file. All that is wanted here is tensors, and those are a pickle that names
them (data.pkl) beside their bytes (data/0, data/1, ...).
"""

import pickle
import zipfile

import torch

_DTYPES = {'HalfStorage': torch.float16, 'FloatStorage': torch.float32, 'DoubleStorage': torch.float64,
           'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16, 'CharStorage': torch.int8,
           'ByteStorage': torch.uint8, 'BoolStorage': torch.bool, 'BFloat16Storage': torch.bfloat16}


class _Module:
    """Stands for an object of any class of the archive's: its attributes and nothing else."""

    def __init__(self, *args):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state


def _tensor(storage, offset, size, stride, *_):
    """In place of torch._utils._rebuild_tensor_v2; as_strided refuses to reach beyond the storage."""
    return storage.as_strided(size, stride, offset).clone()


def _as_it_is(value, *_):
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive, root):
        super().__init__(archive.open(f'{root}data.pkl'))
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        if module.startswith('__torch__'):
            return _Module
        if module == 'torch' and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return _tensor
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if module == 'torch.jit._pickle':  # lists of one type, and such
            return _as_it_is
        raise pickle.UnpicklingError(f'it holds {module}.{name}, which is no part of a CLIP')

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f'it holds a {kind!r}, which is no part of a CLIP')
        data = self.archive.read(f'{self.root}data/{key}')
        return torch.frombuffer(bytearray(data), dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith('/constants.pkl') for name in archive.namelist())


def read_torchscript(path):
    """State dict of the module in the TorchScript archive at ``path``: tensors by their dotted names, on the CPU.

    Raises:
        ValueError: damaged, or not an archive of modules and tensors alone.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith('/constants.pkl')).removesuffix('constants.pkl')
            module = _Unpickler(archive, root).load()
        return dict(_tensors(module, ''))
    except Exception as e:  # whatever a file made to do harm can raise on the way
        raise ValueError(f'it is damaged, or no archive of modules and tensors alone: {e}') from None


def _tensors(module, prefix):
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f'{prefix}{name}.')
