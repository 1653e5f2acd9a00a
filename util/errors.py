from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do.

    It may quote what a file says of itself. In that, line ends and control characters, which could draw over the terminal,
    appear escaped, and what is endless is cut.
    """

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text):
    text = text if len(text) <= 2000 else f'{text[:2000]} ...'
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


@contextmanager
def as_user_error(where, *kinds):
    """Exceptions of these ``kinds`` inside become a UserError that begins with ``where``: the flag or file at fault."""
    try:
        yield
    except kinds as e:
        raise UserError(f'{where}: {first_line(e)}') from e


def first_line(error):
    """First line of an exception's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
