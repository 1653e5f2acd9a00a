"""Read PyTorch's file formats without running anything that the files name.

torch.save writes a zip archive: a pickle (data.pkl) that names the tensors, and one record
per storage (data/0, data/1, ...). TorchScript archives are the same plus code. The legacy
format of torch.save is a sequence of pickles followed by the storages.

``torch.load(weights_only=True)`` is not used: it ignores checksums, PyTorch 2.6 reads beyond
the memory of a record that is shorter than its pickle says, and a pickle of 1 kB can make it
fill the memory. Here all tensors are empty until the pickle has been read, so that no opcode
can do anything large with them.
"""

import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import torch

from util.checkpoints.verify import check_archive


# Placeholder for objects that are not used: NumPy scalars and arrays, mmengine logs. NumPy's own
# classes are not used because a crafted array of objects has pointers to anywhere in memory.
class Stub:
    def __init__(self, *args: object) -> None:
        pass


class ScriptModule(Stub):
    """A module of a TorchScript archive: only its attributes, without its code."""


# The names in known formats; None is _Unpickler.rebuild_tensor. Nothing here runs code.
_GLOBALS = {
    'argparse.Namespace': Namespace,
    'collections.OrderedDict': OrderedDict,
    '_codecs.encode': lambda text, _: text.encode('latin1'),  # how protocol 2 stores bytes
    '__builtin__.set': set,
    'builtins.set': set,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'torch._utils._rebuild_tensor': None,
    'torch._utils._rebuild_tensor_v2': None,
    'torch._utils._rebuild_tensor_v3': None,
    **dict.fromkeys(
        (
            'torch._utils._rebuild_parameter',
            'torch.jit._pickle.restore_type_tag',
            'torch.jit._pickle.build_boollist',
            'torch.jit._pickle.build_doublelist',
            'torch.jit._pickle.build_intlist',
            'torch.jit._pickle.build_tensorlist',
        ),
        lambda value, *_: value,
    ),
    'torch.storage.UntypedStorage': torch.uint8,
    'torch.DoubleStorage': torch.float64,
    'torch.FloatStorage': torch.float32,
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.LongStorage': torch.int64,
    'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16,
    'torch.CharStorage': torch.int8,
    'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool,
    **{f'torch.{name}': v for name, v in vars(torch).items() if isinstance(v, torch.dtype)},
    'mmengine.logging.history_buffer.HistoryBuffer': Stub,
    'numpy.dtype': Stub,
    'numpy.ndarray': Stub,
    'numpy.core.multiarray._reconstruct': Stub,
    'numpy.core.multiarray.scalar': Stub,
    'numpy._core.multiarray._reconstruct': Stub,
    'numpy._core.multiarray.scalar': Stub,
}


# Unpickler that knows the names in _GLOBALS and nothing else. Its base class is private: the
# unpickler written in Python. The public one, written in C, allocates 64 GB for a pickle of 10
# bytes (with an index into the memo), and its BUILD opcode calls methods of any object. Tried with
# Python 3.10 to 3.13. Attributes:
#     storages: key -> (dtype, number of elements).
#     tensors: (tensor, key of its storage, size, stride, offset) of each tensor.
class _Unpickler(pickle._Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding='latin1')
        self.storages, self.tensors = {}, []

    def find_class(self, module: str, name: str) -> object:
        dotted = f'{module}.{name}'
        if dotted not in _GLOBALS and not dotted.startswith('__torch__.'):
            raise ValueError(
                f'it names {dotted}, which could run code; save it with nothing but tensors, '
                'plain values and argparse.Namespace'
            )
        # __torch__: a class in a TorchScript archive
        return _GLOBALS.get(dotted, ScriptModule) or self._rebuild_tensor

    def _rebuild_tensor(
        self, key, offset, size, stride, requires_grad=False, hooks=None, dtype=None
    ):
        tensor = torch.empty(0, dtype=dtype or self.storages[key][0])
        self.tensors.append((tensor, key, size, stride, offset))
        return tensor

    def persistent_load(self, pid: tuple) -> str:
        kind, dtype, key, _, numel, *view = pid
        storage = self.storages.setdefault(key, (dtype, numel))
        if kind != 'storage' or storage != (dtype, numel) or numel < 0 or any(view):
            raise ValueError('it names a storage in a way that PyTorch does not')
        return key

    def _build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (Namespace, OrderedDict, Stub)):
            raise ValueError(f'it sets attributes of a {type(target).__name__}')
        vars(target).update(state if isinstance(state, dict) else {})

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}

    # give the tensors their elements; contents: pairs of a storage's key and its bytes
    def _fill(self, contents):
        storages = {}
        for key, content in contents:
            dtype, numel = self.storages[key]
            # the last view refuses another number of elements
            storages[key] = torch.tensor(np.frombuffer(content, np.uint8)).view(dtype).view(numel)
        for tensor, key, size, stride, offset in self.tensors:
            # as_strided refuses to reach beyond the storage
            tensor.data = storages[key].view(tensor.dtype).as_strided(size, stride, offset)


def read_torch_file(path: str | os.PathLike) -> object:
    """Return the object in a file of torch.save or TorchScript, its tensors on the CPU.

    A TorchScript module is returned as its state dict.

    Raises:
        Exception: of any type, if the file is damaged or altered, or names a class or function
            of no known format.
    """
    with open(path, 'rb') as f:
        if f.peek(4)[:4] != b'PK\x03\x04':
            return _read_legacy(f, os.path.getsize(path))
    with zipfile.ZipFile(path) as archive:
        root = check_archive(archive, os.path.getsize(path))
        unpickler = _Unpickler(archive.open(f'{root}/data.pkl'))
        value = unpickler.load()
        unpickler._fill((key, archive.read(f'{root}/data/{key}')) for key in unpickler.storages)
    return dict(_iterate_module(value)) if isinstance(value, ScriptModule) else value


def _read_legacy(f, size):
    # magic number, version, byte order and sizes of types
    if [_Unpickler(f).load() for _ in range(3)][:2] != [0x1950A86A20F9469CFC6C, 1001]:
        raise ValueError('torch.save writes no such file')
    unpickler = _Unpickler(f)
    value, keys = unpickler.load(), _Unpickler(f).load()
    # in the order of keys: number of elements (8 bytes), elements
    unpickler._fill(
        (key, f.read(min(8 + n * dtype.itemsize, size)).removeprefix(n.to_bytes(8, 'little')))
        for key in keys
        for dtype, n in [unpickler.storages[key]]
    )
    return value


# Yield the dotted names and tensors of a TorchScript module, as its state_dict has them.
def _iterate_module(module, prefix=''):
    for name in list(vars(module)):
        value = vars(module).pop(name, None)  # taken out, because a module may be part of itself
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, ScriptModule):
            yield from _iterate_module(value, f'{prefix}{name}.')
