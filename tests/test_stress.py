"""Short forms of tests/stress.py, which says what each is."""

import pytest
from stress import WRONG, stress


@pytest.mark.parametrize('kind, count', [('checkpoints', 60), ('commands', 40)])
def test_stress(kind, count, tmp_path, capsys):
    outcomes = stress(kind, range(count), 0, tmp_path)
    assert outcomes.total() == count and not outcomes[WRONG], capsys.readouterr().out
    assert min(outcomes.values()) >= (5 if kind == 'commands' else 1)  # all that can come of it has come
