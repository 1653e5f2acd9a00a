"""The short forms of tests/stress.py's kinds that run training; the long ones are commands in the README."""

import sys

import pytest
from conftest import ROOT, run


@pytest.mark.parametrize('kind, count', [('kills', 1), ('disk', 300), ('images', 1), ('nodes', 1)])
def test_nothing_goes_wrong(kind, count):
    result = run(sys.executable, ROOT / 'tests' / 'stress.py', kind, '--count', count, '--seed', 1, timeout=600)
    assert result.returncode == 0 and result.stdout.rstrip().endswith('; 0 wrong'), result.stdout + result.stderr
