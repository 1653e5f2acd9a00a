"""Errors that the user can fix. They end a script with one line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Error that the user can fix.

    The message is one line: what is wrong (flag or file), and how to fix it. It may quote
    untrusted text, such as a name inside a file: control characters, which could overwrite
    the terminal, are escaped, and long text is truncated.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def refuse(*rules: tuple[object, str]) -> None:
    """Raise UserError with the message of the first rule whose condition is true.

    Args:
        rules: pairs of a condition and a message.
    """
    for condition, message in rules:
        if condition:
            raise UserError(message)


def one_line(text: str) -> str:
    """Escape line ends and control characters, and truncate after 2,000 characters."""
    text = text if len(text) <= 2000 else f'{text[:2000]} ...'
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


@contextmanager
def as_user_error(context: str, *exceptions: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into a UserError that begins with ``context``, a flag or file."""
    try:
        yield
    except exceptions as e:
        raise UserError(f'{context}: {first_line(e)}') from e


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
