"""Files that are written whole or not at all, whatever interrupts the writing.

Not a lock: of two writers of one path, the last one wins.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new binary file that takes the place of `path` when the block ends without error.

    Until then the old file, if there is one, stays as it is; after an error or an interrupt
    nothing of the new one is left.

    Raises
    ------
    OSError
        If the folder does not exist or cannot be written to, or `path` is something other than a
        regular file.
    """
    target, temporary = _places(path)
    try:
        try:
            file = temporary.open("xb")
        except OSError as error:
            error.filename = str(path)  # nobody knows the temporary file's name
            raise
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave an empty file
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the OSError that `atomic_write` would raise after hours of work."""
    _, temporary = _places(path)
    try:
        temporary.open("xb").close()
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the file to write, links followed, and an unused name beside it."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        # Renaming onto a device such as /dev/null would replace the device.
        raise OSError(f"{path}: exists and is not a regular file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist")
    return target, target.with_name(f".{secrets.token_hex(8)}.part")
