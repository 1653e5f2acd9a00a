"""Damage or alter a checkpoint: its bytes, the records of its archive, the objects in it.

All functions draw from the random generator ``rng``, and change their argument in place.
"""

import argparse
import io
import struct
import zipfile
from collections import OrderedDict

import torch

from tests.stress.hostile import CALLS, laughs

# ---- bytes ----


def _place(rng, data):
    """Draw an index into data: anywhere, or near an end, where the headers are."""
    n = len(data)
    return rng.choice(
        [rng.randrange(n), rng.randrange(min(n, 300)), n - 1 - rng.randrange(min(n, 900))]
    )


def flip(rng, data):
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def cut(rng, data):
    del data[_place(rng, data) :]


def cut_out(rng, data):
    start = _place(rng, data)
    del data[start : start + rng.choice([1, 4, 64, 1000, rng.randrange(1, len(data))])]


def insert(rng, data):
    start = _place(rng, data)
    data[start:start] = rng.randbytes(rng.choice([1, 4, 64, 1000]))


def zero(rng, data):
    start = _place(rng, data)
    stop = min(len(data), start + rng.choice([1, 16, 512, 4096]))
    data[start:stop] = bytes(stop - start)


def overwrite(rng, data):
    start = _place(rng, data)
    stop = min(len(data), start + rng.choice([2, 16, 512, 4096]))
    data[start:stop] = rng.randbytes(stop - start)


def exchange(rng, data):
    length = rng.choice([4, 64, 1024])
    a, b = (rng.randrange(len(data) - length) for _ in range(2))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def repeat(rng, data):
    start = _place(rng, data)
    data[start:start] = data[start : start + rng.choice([1, 64, 5000])]


def append(rng, data):
    data += rng.choice([b'\0', b'\n', rng.randbytes(100), bytes(5000), bytes(data)])


BYTES = [flip, flip, flip, cut, cut_out, insert, zero, overwrite, exchange, repeat, append]


# ---- records of a zip archive, which then gets correct checksums ----


def unzip(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [[name, archive.read(name)] for name in archive.namelist()]


def zipped(records, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as archive:
        for name, content in records:
            archive.writestr(name, bytes(content))
    return buffer.getvalue()


def _tensors(records):
    return [r for r in records if '/data/' in r[0] and r[1]]


def swap_tensors(rng, records):
    first = rng.choice(_tensors(records))
    alike = [r for r in _tensors(records) if len(r[1]) == len(first[1]) and r[1] != first[1]]
    second = rng.choice(alike or _tensors(records))
    first[1], second[1] = second[1], first[1]


def swap_names(rng, records):
    first, second = rng.sample(_tensors(records), 2)
    first[0], second[0] = second[0], first[0]


def rename(rng, records):
    record = rng.choice(records)
    record[0] = rng.choice(
        [
            record[0] + 'x',
            'other/' + record[0],
            record[0].replace('/', '/../', 1),
            record[0].upper(),
        ]
    )


def lose(rng, records):
    records.remove(rng.choice(records))


def double(rng, records):
    records.append([rng.choice(records)[0], rng.choice(records)[1]])


def stretch(rng, records):
    record = rng.choice(_tensors(records))
    record[1] = rng.choice([record[1][:-4], record[1] + bytes(4), b'', record[1] * 3])


def alter(rng, records):
    record = rng.choice(records)
    content = bytearray(record[1] or b'x')
    rng.choice(BYTES)(rng, content) if len(content) > 2000 else flip(rng, content)
    record[1] = bytes(content)


def alter_pickle(rng, records):
    record = next(r for r in records if r[0].endswith('data.pkl'))
    content = bytearray(record[1])
    for _ in range(rng.choice([1, 1, 3])):
        content[rng.randrange(len(content))] = rng.choice(
            [rng.randrange(256), ord('.'), ord('0'), ord('}')]
        )
    record[1] = bytes(content)


def compress(rng, records):
    return zipped(records, zipfile.ZIP_DEFLATED)


def bomb(rng, records):
    rng.choice(_tensors(records))[1] = bytes(64 << 20)
    return zipped(records, zipfile.ZIP_DEFLATED)


def claim(rng, records):
    """Put a wrong size of one record into the directory at the end of the file."""
    data = bytearray(zipped(records))
    entries = [i for i in range(len(data)) if data[i : i + 4] == b'PK\x01\x02']
    size = rng.choice([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    data[(at := rng.choice(entries) + rng.choice([20, 24])) : at + 4] = struct.pack('<I', size)
    return bytes(data)


def reorder(rng, records):
    rng.shuffle(records)


RECORDS = [
    swap_tensors,
    swap_tensors,
    swap_names,
    rename,
    lose,
    double,
    stretch,
    alter,
    alter_pickle,
    compress,
    bomb,
    claim,
    reorder,
]


# ---- objects in a checkpoint, as other code could have saved them ----


def _weight(rng, checkpoint):
    return rng.choice(
        [name for name, v in checkpoint['model'].items() if v.ndim > 1 and v.is_floating_point()]
    )


def _meta(value):
    return value.to('meta')


def _quantized(value):
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)


def _huge(value):
    return torch.zeros(()).expand(1 << 20, 1 << 20)


TENSORS = {
    'int8': lambda v: v.to(torch.int8),
    'bool': lambda v: v > 0,
    'complex': lambda v: v.to(torch.complex64),
    'sparse': lambda v: v.to_sparse(),
    'meta': _meta,
    'quantized': _quantized,
    'huge': _huge,
    'transposed': lambda v: v[1:].T,
    'longer': lambda v: torch.cat([v, v]),
    'scalar': lambda v: v.sum(),
    'empty': lambda v: v[:0],
    'list': lambda v: v.tolist(),
    'None': lambda v: None,
    'text': lambda v: 'tensor',
    'nested': lambda v: {'a': v},
    'NumPy': lambda v: v.numpy(),
    # the same numbers in other forms, which are accepted
    'double': lambda v: v.double(),
    'parameter': torch.nn.Parameter,
    'window': lambda v: torch.cat([v, v])[len(v) :],
    'strided': lambda v: v.T.contiguous().T,
}
VALUES = [
    None,
    -1,
    10**400,
    2**63,
    float('nan'),
    float('inf'),
    1.5,
    True,
    'one',
    b'\xff',
    [],
    {},
    (1, 2),
    {'a': 1},
    [[]],
    {1},
    argparse.Namespace(a=1),
    OrderedDict(a=torch.zeros(2)),
    torch.zeros(3),
    torch.zeros(()),
    torch.tensor(5),
    torch.float32,
    torch.Size([2]),
    complex(1, 2),
    laughs(),
]


def change_tensor(rng, checkpoint, mark):
    kind, name = rng.choice(list(TENSORS)), _weight(rng, checkpoint)
    checkpoint['model'][name] = TENSORS[kind](checkpoint['model'][name])
    return kind


def change_moment(rng, checkpoint, mark):
    state = rng.choice(list(checkpoint['optimizer']['state'].values()))
    kind, name = rng.choice(list(TENSORS)), rng.choice(list(state))
    try:
        state[name] = TENSORS[kind](state[name])
    except (RuntimeError, IndexError, NotImplementedError):  # the step count is a scalar
        state[name] = 'x'
    return f'{name}: {kind}'


def change_value(rng, checkpoint, mark):
    """Replace one value, at any depth outside the weights."""
    group = rng.choice(checkpoint['optimizer']['param_groups'])
    state = rng.choice(list(checkpoint['optimizer']['state'].values()))
    place = rng.choice(
        [
            checkpoint,
            checkpoint,
            checkpoint['optimizer'],
            checkpoint['optimizer']['state'],
            group,
            group,
            state,
            checkpoint['scaler'],
            vars(checkpoint['args']),
        ]
    )
    name = rng.choice([*place, 'more', 'scale']) if place else 'scale'
    value = rng.choice(VALUES)
    if name == 'step' and isinstance(value, torch.Tensor):  # any other count would be valid
        value = -1.0
    place[name] = value
    return f'{name} = {type(value).__name__}'


def lose_value(rng, checkpoint, mark):
    group = rng.choice(checkpoint['optimizer']['param_groups'])
    state = rng.choice(list(checkpoint['optimizer']['state'].values()))
    place = rng.choice([checkpoint, checkpoint['optimizer'], group, state, checkpoint['model']])
    name = rng.choice(list(place))
    del place[name]
    return f'without {name}'


def change_name(rng, checkpoint, mark):
    weights, name = checkpoint['model'], _weight(rng, checkpoint)
    other = rng.choice(
        [
            name + 'x',
            'module.' + name,
            name + '\nerror: \x1b[2J',
            'x' * 100_000,
            '',
            7,
            None,
            b'',
            ('a',),
        ]
    )
    weights[other] = weights.pop(name)
    return f'{name} is called {str(other)[:20]!r}'


def plant(rng, checkpoint, mark):
    """Put a call somewhere inside."""
    name = rng.choice(list(CALLS))
    payload = CALLS[name](str(mark))
    group = checkpoint['optimizer']['param_groups'][0]
    place = rng.choice(
        [checkpoint, checkpoint['model'], checkpoint['optimizer'], group, vars(checkpoint['args'])]
    )
    place[rng.choice([*place, 'more'])] = payload
    return f'{name} inside'


OBJECTS = [change_tensor, change_moment, change_value, change_value, lose_value, change_name, plant]
