"""Runs command lines one after the other in one process, which spares each the start of an interpreter: JSON in, JSON out.

Each is the file itself under the name __main__, as python FILE ARGUMENTS runs it.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(program, arguments):
    """(exit status, stdout, stderr) of ``program``, a file below the repository or, with dots in it, a module."""
    sys.argv = [program, *arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors, write_through=True)
                for errors in ('strict', 'backslashreplace'))  # what Python has for the two
    status, builtin_print = 0, builtins.print
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            if program.endswith('.py'):
                runpy.run_path(str(ROOT / program), run_name='__main__')
            else:
                sys.modules.pop(program, None)  # of which Python would warn
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
            builtins.print = builtin_print  # the scripts put their own in its place
    gc.collect()
    return status, *(stream.buffer.getvalue().decode('utf-8', 'replace') for stream in (out, err))


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    answers = os.fdopen(os.dup(1), 'w')
    beside = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)  # for what workers of loaders say, which have these files
    os.dup2(beside, 1)
    os.dup2(beside, 2)
    import torch
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job['folder'])
        os.ftruncate(beside, 0)
        status, out, err = run(job['program'], job['arguments'])
        os.lseek(beside, 0, os.SEEK_SET)
        err += os.read(beside, 1 << 20).decode('utf-8', 'replace')
        answers.write(json.dumps([status, out, err]) + '\n')
        answers.flush()


if __name__ == '__main__':
    main()
