"""Whole evaluations: from a model, or from pictures that others drew, to a report on disk."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from flexvar.evaluation.extraction import FeatureStore, extract
from flexvar.evaluation.extractors import Extractor
from flexvar.evaluation.references import read_reference
from flexvar.evaluation.scores import Report, check_sizes, score
from flexvar.evaluation.stored import PictureSet, write_npz


def evaluate(
    pictures: PictureSet,
    reference: Path | str,
    extractor: Extractor,
    out: Path,
    *,
    intervals: bool = False,
    npz: Path | None = None,
    overwrite: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Report | None:
    """Scores pictures and writes the report to `out`, a .json file; goes on where an interrupted evaluation of the same pictures stopped.

    npz: a file that also gets the pictures, in ADM's layout. share: this process's number and how many there are; every one but the
    first gives None. What is unfinished lies in a folder beside `out`, which is removed at the end.
    Raises FileExistsError where `out` or `npz` exists and `overwrite` is not set; else see `read_reference` and `score`.
    """
    first = share[0] == 0
    if first:
        for path in (out, npz):
            if path is not None and path.exists() and not overwrite:
                raise FileExistsError(f"{path} exists; choose another file, or add --overwrite")
        against = read_reference(reference, extractor)
        check_sizes(pictures, against)
    about = {"samples": pictures.about(), "extractor": extractor.sha256, "pictures kept": npz is not None}
    folder = unfinished(out)
    if first:
        store = FeatureStore(folder, len(pictures), about, overwrite=overwrite)
    _wait()
    if not first:
        store = FeatureStore(folder, len(pictures), about)
    extract(pictures, extractor, store, share=share, keep_pixels=npz is not None)
    _wait()
    if not first:
        return None
    report = score(pictures, store.read(), against, extractor, intervals=intervals)
    if npz is not None:
        npz.parent.mkdir(parents=True, exist_ok=True)
        write_npz(npz, {}, len(pictures), pictures.size, store.pixels())
    report.write(out)
    store.remove()
    return report


def unfinished(out: Path) -> Path:
    """The folder in which the work on a report lies until it is written."""
    return out.with_name(f"{out.name}.unfinished")


def _wait() -> None:
    """Until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()
