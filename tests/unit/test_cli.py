"""How scripts end, and flags into dataclasses."""

import argparse
import errno
from dataclasses import dataclass

import pytest
import torch

from util import cli
from util.errors import UserError


def end_of(error, capsys):
    """Run a script that raises ``error``; return its exit status and its stderr."""

    def main(args):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main, None)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    'error, words',
    [
        (UserError('--flag 3: two\nlines'), ['--flag 3', '\\n']),
        (OSError(errno.ENOSPC, 'no space', 'out/file.pth'), ['disk', 'out/file.pth', '--resume']),
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), ['--num_workers']),
        (RuntimeError('DataLoader worker (pid 7): Bus error'), ['/dev/shm']),
    ],
    ids=['user error', 'disk full', 'worker killed', 'shared memory'],
)
def test_error_is_one_line(error, words, capsys):
    status, err = end_of(error, capsys)
    (line,) = err.splitlines()
    assert status == 1 and line.startswith('error: ') and all(word in line for word in words)


def test_out_of_memory_is_one_line(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    status, err = end_of(caught.value, capsys)
    (line,) = err.splitlines()
    assert status == 1 and line.startswith('error: ') and '--batch_size' in line


def test_bug_keeps_its_traceback():
    def main(args):
        raise RuntimeError('a bug')

    with pytest.raises(RuntimeError, match='a bug'):
        cli.run(main, None)


def test_interrupt(capsys):
    status, err = end_of(KeyboardInterrupt(), capsys)
    assert status == 130 and len(err.splitlines()) == 1


def test_from_flags():
    @dataclass
    class Config:
        size: int
        seed: int = 0
        rank: int = 0

    args = argparse.Namespace(size=3, seed=5, other='x')
    assert cli.from_flags(Config, args, rank=1) == Config(3, 5, 1)
    assert cli.from_flags(Config, args, seed=7) == Config(3, 7, 0)
