"""Whole evaluations: from a model, or from pictures that others drew, to a report on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexvar.evaluation.extraction import FeatureStore, extract
from flexvar.evaluation.extractors import Extractor
from flexvar.evaluation.npz import CLASSES, write_npz
from flexvar.evaluation.references import Reference, read_reference
from flexvar.evaluation.report import machine
from flexvar.evaluation.scores import Report, check_all, score
from flexvar.evaluation.stored import PictureSet
from flexvar.processes import rank, wait_for_all, without_tf32, world_size
from flexvar.writing import check_writable, make_folder, refuse_file


@without_tf32()
def evaluate(
    pictures: PictureSet,
    reference: Reference | Path | str,
    extractor: Extractor,
    out: Path,
    *,
    intervals: bool = False,
    npz: Path | None = None,
    pngs: Path | None = None,
    overwrite: bool = False,
) -> Report | None:
    """Scores pictures and writes the report to `out`, a .json file; goes on where an interrupted evaluation of the same pictures stopped.

    npz: a file that also gets the pictures, in ADM's layout. pngs: a folder that also gets each as a file, numbered from 0.
    Of several processes (torch.distributed) each makes its share, and all but the first give None. What is unfinished lies in a folder
    beside `out`, which is removed at the end.
    Raises FileExistsError where something is there already and `overwrite` is not set; else see `read_reference` and `score`.
    """
    number, world = rank(), world_size()
    folder = out.parent / f"{out.name}.unfinished"
    about = {
        "samples": json.loads(json.dumps(pictures.about)),
        "extractor": extractor.sha256,
        "pictures kept": None if npz is None else str(npz.resolve()),
        "files": None if pngs is None else str(pngs.resolve()),
    }
    if number == 0:
        read = [] if isinstance(reference, Reference) else [reference]
        # An .npz may stand where the report found no room.
        check_writable(out, npz, overwrite=overwrite or folder.exists(), read=read)
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists; choose another file, or add --overwrite")
        against = reference if isinstance(reference, Reference) else read_reference(reference, extractor)
        check_all(pictures, against, extractor)
        own = {"machine": machine(extractor.device)}  # the others' may differ
        store = FeatureStore(folder, len(pictures), about | own, overwrite=overwrite)
        if pngs is not None and store.fresh:
            try:
                _clear(pngs, overwrite, read)
            except FileExistsError:
                store.remove()
                raise
    wait_for_all()
    if number > 0:
        store = FeatureStore(folder, len(pictures), about, begin=False)
    extract(pictures, extractor, store, rank=number, world=world, keep_pixels=npz is not None, pngs=pngs)
    wait_for_all()
    if number > 0:
        return None
    report = score(pictures, store.read(), against, extractor, intervals=intervals)
    if npz is not None:
        make_folder(npz.parent)
        write_npz(npz, _class_indices(pictures.labels), len(pictures), pictures.size, store.pixels())
    report.write(out)
    store.remove()
    return report


def _clear(folder: Path, overwrite: bool, read: Sequence[Path | str]) -> None:
    """Removes the numbered pictures of an earlier run. FileExistsError where there is something and it may not be overwritten."""
    refuse_file(folder)
    if any(Path(path).resolve() == folder.resolve() for path in read):
        raise FileExistsError(f"{folder} is also what is read; choose another folder for the pictures")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder, or add --overwrite")
    for path in folder.glob("[0-9]" * 6 + ".png"):
        path.unlink()


def _class_indices(labels: Sequence[str] | None) -> dict[str, np.ndarray]:
    """ADM's array of classes, numbered as they first come: as in the model, for pictures that one drew."""
    if labels is None:
        return {}
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return {CLASSES: np.array([numbers[label] for label in labels])}
