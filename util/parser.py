"""Command lines whose errors are one line. It loads no PyTorch, which not every tool needs."""

import argparse
import math
import sys

from util.errors import one_line


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, and whose help tells the defaults."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{'formatter_class': _Formatter, **kwargs})

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith('--') and word.endswith('=--'):  # of which older Python makes an empty list
                self.error(f'{word}: -- is no value')
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f'error: {one_line(message)} (--help lists the flags)\n')


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, True, False, argparse.SUPPRESS)) or action.default == ''
        return action.help if nothing or 'default' in action.help else super()._get_help_string(action)


def bounded(kind, low=None, high=None, open_high=False):
    """An argparse type: a finite ``kind`` within [low, high], or [low, high) with ``open_high``."""
    def convert(text):
        value = kind(text)
        below = high is None or (value < high if open_high else value <= high)
        inside = -math.inf < value < math.inf and (low is None or value >= low) and below
        if not inside:
            low_text, high_text = ('-inf' if low is None else low), ('inf' if high is None else high)
            raise argparse.ArgumentTypeError(f'{text} is outside [{low_text}, {high_text}{")" if open_high else "]"}')
        return value
    convert.__name__ = kind.__name__  # argparse names the type in its message for text that is no number
    convert.range = low, high  # for tests, which try what is at the ends
    return convert
