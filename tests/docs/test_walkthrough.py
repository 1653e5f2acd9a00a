"""Test docs/walkthrough.md: its code blocks print the output shown on the page."""

import builtins
import contextlib
import io
import re

import pytest

from tests.docs.pages import page
from tests.helpers import ok, pretrain

PAGE = page('docs/walkthrough.md')


@pytest.mark.slow
def test_code_blocks_print_the_output_shown():
    blocks = re.findall(r'```python\n(.*?)```\n\n(?:```text\n(.*?)```)?', PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count('```python')
    assert sum(bool(shown) for _, shown in blocks) == PAGE.count('```text')
    names, builtin_print = {}, builtins.print
    try:
        for code, shown in blocks:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, 'docs/walkthrough.md', 'exec'), names)
            assert out.getvalue() == shown, code
    finally:
        builtins.print = builtin_print  # setup replaces it


def test_log_line_has_the_format_of_a_run(milan_flags):
    shown = re.search(r'```log\n(.*?)\n```', PAGE)[1]
    lines = ok(pretrain(*milan_flags, '--epochs', 1)).splitlines()
    line = next(line for line in lines if line.startswith('Epoch [0] [2/6]'))
    assert re.sub(r'\d+', '0', shown) == re.sub(r'\d+', '0', line)
