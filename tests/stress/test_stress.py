"""A few cases of each kind of tests/stress; the long forms are commands in the README."""

import sys

import pytest

from tests.helpers import ROOT, ok, run
from tests.stress.__main__ import WRONG, stress


@pytest.mark.slow
@pytest.mark.parametrize('kind, count, least', [('checkpoints', 60, 1), ('commands', 40, 5)])
def test_cases_in_this_process(kind, count, least, tmp_path, capsys):
    outcomes = stress(kind, range(count), 0, tmp_path)
    assert outcomes.total() == count and not outcomes[WRONG], capsys.readouterr().out
    assert min(outcomes.values()) >= least  # of every possible outcome


@pytest.mark.slow
@pytest.mark.parametrize('kind, count', [('kills', 1), ('disk', 300), ('images', 1), ('nodes', 1)])
def test_command(kind, count):
    # The folder and the module are the same command.
    target = [ROOT / 'tests' / 'stress'] if kind == 'disk' else ['-m', 'tests.stress']
    out = ok(run(sys.executable, *target, kind, '--count', count, '--seed', 1, timeout=600))
    assert out.rstrip().endswith('; 0 wrong')
