"""Files are written whole or not at all."""

from __future__ import annotations

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
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # some writers, safetensors' among them, keep others from reading their files
        with beside.open("r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
