"""Hostile pickles: calls, in every form that pickle has, and objects that fill the memory."""

import builtins
import os
import pickle
import struct
import subprocess

RAN = []  # the calls of ``fire``


def fire(*args):
    RAN.append(args)
    return {}


class Reduced:
    """Pickle as a call of a function, then BUILD with ``state`` or APPENDS with ``items``."""

    def __init__(self, function, *args, state=None, items=None):
        self.parts = function, args, state, items and iter(items)

    def __reduce__(self):
        return self.parts


# name: a function and its arguments; the file ``mark`` appears if it is called
CALLS = {
    'os.system': lambda mark: Reduced(os.system, f'touch {mark}'),
    'os.mkdir': lambda mark: Reduced(os.mkdir, mark),
    'subprocess.Popen': lambda mark: Reduced(subprocess.Popen, ['touch', mark]),
    'eval': lambda mark: Reduced(eval, f"open({mark!r}, 'w')"),
    'exec': lambda mark: Reduced(exec, f"open({mark!r}, 'w')"),
    'open': lambda mark: Reduced(open, mark, 'w'),
    'import': lambda mark: Reduced(builtins.__import__, 'antigravity'),
    'a function': lambda mark: Reduced(fire, 'called'),
    'a function, then BUILD': lambda mark: Reduced(fire, state={'a': 1}),
    'a function, then APPENDS': lambda mark: Reduced(fire, items=[1, 2]),
    'pickle.loads': lambda mark: Reduced(pickle.loads, pickle.dumps(Reduced(fire, 'twice'))),
    'bytearray': lambda mark: Reduced(bytearray, 1 << 34),
    'exit': lambda mark: Reduced(os._exit, 3),
}

# The same as no Pickler writes it, and pickles that would fill the memory or the stack.
RAW = {
    'protocol 0': lambda mark: f'cos\nsystem\n(Vtouch {mark}\ntR.'.encode(),
    'INST': lambda mark: f'(Vtouch {mark}\nios\nsystem\n.'.encode(),
    'OBJ': lambda mark: f'(cos\nsystem\nVtouch {mark}\no.'.encode(),
    'getattr': lambda mark: (
        f'c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(Vtouch {mark}\ntR.'
    ).encode(),
    'a dotted name': lambda mark: (
        '\x80\x04ctorch\nserialization.os.system\nX\x01\x00\x00\x00x\x85R.'.encode('latin1')
    ),
    'a module of the repository': lambda mark: (
        f'\x80\x04cutil.misc\nos.system\n(Vtouch {mark}\ntR.'.encode('latin1')
    ),
    'STACK_GLOBAL': lambda mark: b'\x80\x04\x8c\x02os\x8c\x06getpid\x93)R.',
    'NEWOBJ': lambda mark: (
        b'\x80\x02ctests.stress.hostile\nReduced\nctests.stress.hostile\nfire\n\x85\x81.'
    ),
    'BUILD on a class': lambda mark: (
        b'\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__call__K\x01s\x86b0}.'
    ),
    'BUILD on a function': lambda mark: (
        b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x07\x00\x00\x00__doc__K\x01s\x86b0}.'
    ),
    'an extension': lambda mark: b'\x80\x02\x82\x01.',
    'a function by its persistent id': lambda mark: b'\x80\x02ctests.stress.hostile\nfire\nQ.',
    'a place in the memo': lambda mark: b'\x80\x02}r\xff\xff\xff\x0f.',
    'a long string': lambda mark: b'\x80\x04\x8d' + struct.pack('<Q', 1 << 40) + b'x.',
    'long bytes': lambda mark: b'\x80\x05\x8e' + struct.pack('<Q', 1 << 62) + b'x.',
    'a long integer': lambda mark: b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'\xff.',
    'a negative length': lambda mark: b'\x80\x02T' + struct.pack('<i', -5) + b'.',
    'many digits': lambda mark: b'I' + b'9' * 100_000 + b'\n.',
    'deep lists': lambda mark: b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
    'twice the list before, 60 times': lambda mark: (
        b'\x80\x02]' + b''.join(b'q%c](h%ch%ce' % (i, i, i) for i in range(60)) + b'.'
    ),
    'a list in itself': lambda mark: b'\x80\x02]q\x00h\x00a.',
    'an empty stack': lambda mark: b'\x80\x02R.',
    'no end': lambda mark: b'\x80\x02}',
}


def pickled(rng, mark):
    """Draw a hostile pickle; return its name and bytes."""
    if rng.random() < 0.5:
        name = rng.choice(list(RAW))
        return name, RAW[name](mark)
    name, protocol = rng.choice(list(CALLS)), rng.randrange(6)
    return f'{name}, protocol {protocol}', pickle.dumps(CALLS[name](mark), protocol)


def laughs(depth=60):
    """Return a list that contains one list twice, which contains one list twice, and so on.

    It is small in a file, and has 2**depth items for code that visits all of them.
    """
    value = ['ha']
    for _ in range(depth):
        value = [value, value]
    return value
