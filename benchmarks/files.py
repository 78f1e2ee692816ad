"""Mistakes of the caller, and files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class UserError(Exception):
    """Something the person at the command line can put right: shown as one line, exit code 2."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of `path` only once it is whole and on the disk.

    A kill at any moment leaves the old `path`, or the new one, never a part. The temporary name is fixed, so what a
    kill leaves behind is overwritten by the next attempt.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name has to reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
