"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a file beside `path` and puts it in place when it is complete: a full disk or a kill leaves the old file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        try:
            write(beside)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that the disk is full
            raise OSError(f"{path} could not be written ({error}); make room or choose another folder") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            raise OSError(f"{path} could not be written ({error.strerror or error}); make room or choose another folder") from error
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # some writers, safetensors' among them, keep others from reading their files
        with beside.open("r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(*paths: Path | None, overwrite: bool = False) -> None:
    """Raises OSError, in one line, where files could not be written in the end: before long work rather than after it."""
    given = [path for path in paths if path is not None]
    if len({path.resolve() for path in given}) < len(given):
        raise FileExistsError(f"{given[0]} is to be written twice; give different files")
    for path in given:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another file, or add --overwrite")
        parent = next(folder for folder in path.resolve().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OSError(f"{path} cannot be written: {parent} is no folder that takes files; choose another")
