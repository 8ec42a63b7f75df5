"""Arrays in .npz files, and ADM's layout of them, written without holding its pictures whole."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flexvar.schedule import Size
from flexvar.writing import write_whole

PICTURES, CLASSES = "arr_0", "arr_1"  # as ADM names them

DAMAGED = (ValueError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)
"""What reading a damaged .npz raises."""


def open_npz(path: Path) -> zipfile.ZipFile:
    """The archive that an .npz is. ValueError where it is none, or is truncated."""
    if path.suffix in (".pt", ".pth"):  # archives too, as torch-fidelity keeps its statistics
        raise ValueError(f"{path} is a file of torch; write what it holds as an .npz, numpy.savez(path, mu=..., sigma=...) for statistics")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .npz file, or a truncated one; copy or write it again") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of an .npz's arrays."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array of an .npz. ValueError where it is missing or damaged."""
    try:
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except KeyError as error:
        raise ValueError(f"{path} has no array {name}, but {', '.join(array_names(archive)) or 'nothing'}") from error
    except DAMAGED as error:
        raise ValueError(f"{name} of {path} is damaged ({error}); copy or write the file again") from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], count: int, size: Size, batches: Iterable[Tensor]) -> None:
    """Writes an .npz of ADM's layout: pictures, handed over as uint8 batches (B, 3, H, W), in arr_0, and other arrays beside them.

    It appears when it is complete. Nothing is compressed, as ADM's are not.
    """

    def write(beside: Path) -> None:
        with zipfile.ZipFile(beside, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
            with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in batches:
                    file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().data)

    write_whole(path, write)


def array_header(file: Any, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of the array that a .npy file begins with. Raises ValueError where it is damaged."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except DAMAGED as error:
        raise ValueError(f"{PICTURES} of {path} is damaged ({error}); copy or write the file again") from error
