"""Command lines: a parser with one-line errors, flags into dataclasses, how a script ends."""

import argparse
import dataclasses
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from util.errors import UserError, one_line

T = TypeVar('T')


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors, and with defaults in --help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{'formatter_class': _Formatter, **kwargs})

    def parse_known_args(
        self, words: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, after refusing ``--flag=--``, which older Python reads as an empty list."""
        for word in sys.argv[1:] if words is None else words:
            if word.startswith('--') and word.endswith('=--'):
                self.error(f'{word}: -- is not a value')
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        self.exit(2, f'error: {one_line(message)} (--help lists the flags)\n')


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        if default in ('', argparse.SUPPRESS) or any(default is v for v in (None, True, False)):
            return action.help
        return action.help if 'default' in action.help else super()._get_help_string(action)


def bounded(
    kind: type, low: float | None = None, high: float | None = None, open_high: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type for a finite number of a range.

    Args:
        kind: int or float.
        low, high: bounds, both included. None: unbounded.
        open_high: exclude ``high``.
    """

    def convert(text: str) -> float:
        value = kind(text)
        below = high is None or (value < high if open_high else value <= high)
        if not (-math.inf < value < math.inf and (low is None or value >= low) and below):
            bounds = f'{"-inf" if low is None else low}, {"inf" if high is None else high}'
            raise argparse.ArgumentTypeError(
                f'{text} is outside [{bounds}{")" if open_high else "]"}'
            )
        return value

    convert.__name__ = kind.__name__  # argparse names the type if the text is not a number
    convert.range = low, high  # for tests, which try the bounds
    return convert


def add_flags(group: argparse._ActionsContainer, *tables: dict[str, dict[str, Any]]) -> None:
    """Add flags to a parser or a group of one.

    Args:
        tables: the names of a flag, separated by spaces -> the options of add_argument.
    """
    for names, options in (flag for table in tables for flag in table.items()):
        group.add_argument(*names.split(), **options)


def from_flags(cls: type[T], flags: argparse.Namespace, /, **values: Any) -> T:
    """Fill a dataclass from the flags that have its fields' names.

    Args:
        cls: the dataclass. A field without a flag or value keeps its default.
        flags: parsed flags.
        values: take precedence over flags, such as ``**vars(runtime)``.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in {**vars(flags), **values}.items() if k in names})


# ---- how a script ends ----


def run(main: Callable[[argparse.Namespace], None], flags: argparse.Namespace) -> None:
    """Run ``main(flags)`` and exit.

    An error that the user can fix becomes one line on stderr. Exit status: 0 on success,
    1 on errors, 75 if the run was preempted, 130 after Ctrl-C.
    """
    # PyTorch takes seconds to load; --help is faster
    from util import distributed, preemption, signals

    sys.stdout = sys.stdout or open(os.devnull, 'w')  # the caller may have closed it
    status = 0
    try:
        main(flags)
    except BrokenPipeError:
        os._exit(1)  # the reader of our output is gone; a normal exit would write the rest
    except preemption.Preempted as e:
        print(e, flush=True)
        status = preemption.EXIT_PREEMPTED
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)
    except (UserError, OSError, RuntimeError) as e:
        message = explain(e)
        if message is None:
            raise
        # Local rank 0 goes first: the launcher ends the others before they repeat its message.
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.write(f'error: {message}\n')
        sys.stderr.flush()
        if distributed.is_dist_avail_and_initialized():
            os._exit(1)  # an orderly shutdown would wait for ranks that hang in a collective
        sys.exit(1)
    finally:
        signals.restore_signals()
    distributed.shut_down()
    if status:
        sys.exit(status)


# The text of an error: what went wrong, and how to fix it.
_REMEDIES = {
    "can't allocate memory|out of memory": 'out of memory: lower --batch_size, and raise '
    '--accum_iter by the same factor to keep the effective batch',
    'DataLoader worker.*Bus error': 'a data-loader worker ran out of shared memory: enlarge '
    '/dev/shm, or lower --num_workers or --batch_size',
    'DataLoader worker.*killed by signal': 'a data-loader worker was killed, probably out of '
    'memory: lower --num_workers or --batch_size',
}


def explain(error: Exception) -> str | None:
    """Explain an error and its remedy in one line. None for a bug, which needs a traceback."""
    from util.distributed import describe_missing_ranks, is_dist_avail_and_initialized

    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        reason = {errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the disk quota is exceeded'}
        where = f': {error.filename}' if error.filename else ''
        full = reason.get(error.errno)
        return full and f'{full}{where}; free some space and resume with --resume auto'
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, text, re.DOTALL):
            return remedy
    if is_dist_avail_and_initialized():
        if re.search('closed by peer|reset by peer|roken pipe', text):
            return 'another process of this run failed; see its message'
        if re.search('imed out|imeout', text):
            return (
                f'timed out waiting for other processes{describe_missing_ranks()}; check them '
                'and their machines; --dist_timeout sets the limit'
            )
    return None
