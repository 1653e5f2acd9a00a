"""Run command lines one after the other in one process, which saves the imports: JSON in, JSON out.

Each runs under the name __main__, as `python FILE ARGUMENTS` or `python -m MODULE ARGUMENTS` does.
"""

import builtins
import contextlib
import gc
import io
import json
import os
import runpy
import sys
import traceback
import warnings

import torch

from tests.helpers import ROOT


def run(program, arguments):
    """Run ``program``, a script's file name or a module, and return (status, stdout, stderr)."""
    sys.argv = [program, *arguments]
    out, err = (  # with the encoding errors that Python sets for the two streams
        io.TextIOWrapper(io.BytesIO(), 'utf-8', errors, write_through=True)
        for errors in ('strict', 'backslashreplace')
    )
    status, builtin_print = 0, builtins.print
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            if program.endswith('.py'):
                runpy.run_path(str(ROOT / program), run_name='__main__')
            else:
                sys.modules.pop(program, None)  # Python would warn about it
                runpy.run_module(program, run_name='__main__', alter_sys=True)
        except SystemExit as e:
            status = e.code or 0
            if not isinstance(status, int):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            builtins.print = builtin_print  # the scripts replace it
    gc.collect()
    return status, *(stream.buffer.getvalue().decode('utf-8', 'replace') for stream in (out, err))


def main():
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), 'w')
    # Loader workers write to the real stdout and stderr: a file that is added to the answer.
    other_output = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    os.dup2(other_output, 1)
    os.dup2(other_output, 2)
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job['folder'])
        os.ftruncate(other_output, 0)
        status, out, err = run(job['program'], job['arguments'])
        os.lseek(other_output, 0, os.SEEK_SET)
        err += os.read(other_output, 1 << 20).decode('utf-8', 'replace')
        answers.write(json.dumps([status, out, err]) + '\n')
        answers.flush()


if __name__ == '__main__':
    main()
