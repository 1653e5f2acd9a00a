"""docs/walkthrough.md says what the code does."""

import builtins
import contextlib
import io
import re

from conftest import ROOT, pretrain

PAGE = (ROOT / 'docs' / 'walkthrough.md').read_text()


def test_every_code_block_prints_what_stands_below_it():
    blocks = re.findall(r'```python\n(.*?)```\n\n(?:```text\n(.*?)```)?', PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count('```python') and sum(bool(shown) for _, shown in blocks) == PAGE.count('```text')
    names, builtin_print = {}, builtins.print
    try:
        for code, shown in blocks:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, 'docs/walkthrough.md', 'exec'), names)
            assert out.getvalue() == shown, code
    finally:
        builtins.print = builtin_print  # setup puts its own in its place


def test_the_log_line_is_one_of_a_run(milan_flags):
    shown = re.search(r'```log\n(.*?)\n```', PAGE)[1]
    result = pretrain(*milan_flags, '--epochs', 1)
    line = next(line for line in result.stdout.splitlines() if line.startswith('Epoch [0] [2/6]'))
    assert re.sub(r'\d+', '0', shown) == re.sub(r'\d+', '0', line)
