"""Writing files such that a crash, a kill or a full disk never leaves half a file."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from util.errors import UserError, as_user_error, first_line


def atomic_write(
    path: str | os.PathLike,
    write: Callable[[BinaryIO], None],
    links: Iterable[str | os.PathLike] = (),
) -> None:
    """Write a file that appears under its name only when it is complete and on the disk.

    Args:
        path: the file. Until the new content is complete, the old content stays.
        write: called with the open binary file, which can be read as well.
        links: other names for the same file. They appear first: whoever finds the new
            ``path`` can rely on them.

    Raises:
        UserError: if the file cannot be written. The previous file is intact.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'w+b') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        for link in links:
            _link(temporary, link)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        Path(temporary).unlink(missing_ok=True)
        raise UserError(f'{path} could not be written (disk full?): {first_line(e)}') from e


# Give the file a second name: a hard link, or a copy on file systems without hard links.
def _link(path: str, link: str | os.PathLike) -> None:
    temporary = f'{link}.tmp'
    try:
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, link)
    except OSError as e:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f'{link}: {first_line(e)}') from e


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the content of a text file. It has the old text or the new one, never a part."""
    atomic_write(path, lambda f: f.write(text.encode()))


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append a line to a text file. Raises UserError if it cannot be written."""
    with as_user_error(f'{path} could not be written', OSError):
        with open(path, 'a', encoding='utf-8') as f:
            f.write(line + '\n')
