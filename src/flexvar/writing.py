"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

Write = Callable[[Path], Any]
T = TypeVar("T")

BESIDE = 32
"""How many letters of a name its hidden one has: a letter takes up to 4 bytes, and a name on most disks 255."""

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def write_whole(path: Path, write: Write) -> None:
    """Lets `write` fill a file beside `path` and puts it in place when it is complete: a full disk or a kill leaves the old file."""
    write_together({path: write})


def write_together(writes: Mapping[Path, Write]) -> None:
    """`write_whole` for files that belong together: they are put in place, in this order, when all of them are complete."""
    beside = {path: _beside(path) for path in writes}
    try:
        for path, write in writes.items():
            _fill(beside[path], write, path)
        for path, complete in beside.items():
            with _told_of(path):
                complete.replace(path)
    finally:
        for unfinished in beside.values():
            with suppress(OSError):  # where nothing can be removed either, the error before says more
                unfinished.unlink()


def write_whole_folder(folder: Path, write: Callable[[Path], T]) -> T:
    """Lets `write` fill a folder beside `folder` and puts it in the place of what is there when it is complete; gives what `write` gives.

    Raises OSError where the folder cannot be replaced (it is a file, the current folder, one above it, or the root of a file system), and
    where it cannot be written; what `write` raises of another place is left as it is.
    """
    folder = folder.resolve()
    refuse_file(folder)
    if folder.is_mount() or Path.cwd().is_relative_to(folder):
        raise OSError(f"{folder} is in use and cannot be replaced as a whole; name a folder in it")
    make_folder(folder.parent)
    beside, before = _beside(folder), _beside(folder)
    try:
        result = write(beside)
        if folder.exists():
            folder.rename(before)
        beside.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        if str(beside) not in str(error.filename or error):
            raise
        if error.strerror:
            raise _unwritable(folder, error) from error
        raise OSError(str(error).replace(str(beside), str(folder))) from error  # `write` has said it well, but of the hidden folder
    finally:
        if before.exists() and not folder.exists():  # interrupted between the two
            before.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
    return result


def refuse_file(folder: Path) -> None:
    """FileExistsError where a file is in a folder's place."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, unless they are there; OSError, in one line, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the folder {folder} could not be made ({error.strerror}); choose another") from error


def check_writable(*paths: Path | None, overwrite: bool = False, read: Iterable[Path | str] = ()) -> None:
    """Raises OSError, in one line, where files could not be written in the end: before long work rather than after it.

    read: what the work reads, and so must not replace, whatever `overwrite` says.
    """
    inputs = {Path(path).resolve() for path in read}
    given = [path for path in paths if path is not None]
    if len({path.resolve() for path in given}) < len(given):
        raise FileExistsError(f"{given[0]} is to be written twice; give different files")
    for path in given:
        if path.resolve() in inputs:
            raise FileExistsError(f"{path} is also what is read; choose another file")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another file, or add --overwrite")
        parent = next(folder for folder in path.resolve().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OSError(f"{path} cannot be written: {parent} is no folder that takes files; choose another")


def _beside(path: Path) -> Path:
    """A hidden name that no process on any machine chooses twice, short enough wherever the name itself is."""
    return path.with_name(f".{path.name[:BESIDE]}.{secrets.token_hex(6)}.unfinished")


def _unwritable(path: Path, error: Exception) -> OSError:
    return OSError(f"{path} could not be written ({getattr(error, 'strerror', None) or error}); make room or choose another folder")


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Errors of what lies beside `path` name `path`."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _fill(beside: Path, write: Write, path: Path) -> None:
    """Writes a file down to the disk, readable by whom it should be; errors name `path`, for which it is meant."""
    with _told_of(path):
        beside.touch()
        mode = beside.stat().st_mode  # some writers, safetensors' among them, then keep others from reading their files
    try:
        write(beside)
        beside.chmod(mode)
        with beside.open("r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that the disk is full
        raise _unwritable(path, error) from error
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise _unwritable(path, error) from error
