"""The commands that measure. Under torchrun `model` and `samples` share the pictures out; the others want a single process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flexvar.cli.commands import Words
from flexvar.cli.drawing import device_of, move, settings_of

if TYPE_CHECKING:
    from flexvar.evaluation.extractors import Extractor
    from flexvar.evaluation.stored import PictureSet

PATIENCE = timedelta(hours=4)  # the first process may have to make the features of a large reference while the others wait


def run_model(words: Words) -> None:
    from flexvar.evaluation.drawn import DrawnPictures
    from flexvar.pipeline import FlexVARPipeline

    pipe = FlexVARPipeline.from_pretrained(words.model)
    settings = {"height": words.height, "width": words.width, **settings_of(words)}
    move(pipe, words)
    pictures = DrawnPictures(pipe, words.model, words.per_class, seed=words.seed, batch=words.batch, **settings)
    _evaluate(pictures, words, npz=words.save_npz, pngs=words.save_png)


def run_samples(words: Words) -> None:
    from flexvar.evaluation.stored import open_pictures

    _evaluate(open_pictures(words.pictures), words)


def run_reference(words: Words) -> None:
    from flexvar.evaluation.references import write_reference

    _refuse_processes()
    if (words.height is None) != (words.width is None):
        raise ValueError("give both --height and --width, or neither")
    size = None if words.height is None else (words.height, words.width)
    extractor = _extractor(words)
    count = write_reference(words.pictures, words.out, extractor, size=size, keep=words.keep, overwrite=words.overwrite)
    print(f"{words.out}: moments of {count} pictures, by {extractor.name}")


def run_sweep(words: Words) -> None:
    from flexvar.evaluation.sweep import SWEPT, plot, sweep, table
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.writing import write_whole

    _refuse_processes()
    named = vars(words) | {"num_inference_steps": words.steps}
    grid = {name: named[name] for name in SWEPT if named[name] is not None}
    pipe = FlexVARPipeline.from_pretrained(words.model)
    move(pipe, words)
    extractor = _extractor(words)
    trials = sweep(
        pipe,
        words.model,
        grid,
        words.reference,
        extractor,
        words.out,
        per_class=words.per_class,
        seed=words.seed,
        batch=words.batch,
        overwrite=words.overwrite,
        **{name: side for name in ("height", "width") if (side := getattr(words, name)) is not None},
    )
    text = table(trials)
    write_whole(words.out / "table.txt", lambda beside: beside.write_text(text + "\n", encoding="utf-8"))
    print(text)
    print(words.out / "table.txt")
    plot(trials, words.out / "plot.png")
    print(words.out / "plot.png")


def run_tokenizer(words: Words) -> None:
    from flexvar.evaluation.tokenizers import evaluate_tokenizer, size_of

    _refuse_processes()
    if words.out.exists() and not words.overwrite:
        raise FileExistsError(f"{words.out} exists; choose another --out, or add --overwrite")
    if (words.lpips_vgg is None) != (words.lpips_linear is None):
        raise ValueError("LPIPS needs two files; give both --lpips-vgg and --lpips-linear, or neither")
    sizes = None if words.sizes is None else [size_of(size) for size in words.sizes]
    report = evaluate_tokenizer(
        words.model,
        words.pictures,
        sizes=sizes,
        steps=words.steps,
        schedule=words.schedule,
        count=words.count,
        batch=words.batch,
        extractor=None if words.extractor == "none" else _extractor(words),
        lpips=None if words.lpips_vgg is None else (words.lpips_vgg, words.lpips_linear),
        device=device_of(words.device),
    )
    report.write(words.out)
    print(report.table())
    print(words.out)


def _evaluate(pictures: PictureSet, words: Words, **kept: Path | None) -> None:
    """Scores pictures, by as many processes as there are."""
    import torch

    from flexvar.evaluation.runner import evaluate
    from flexvar.processes import processes

    extractor = _extractor(words)
    with processes(torch.device("cpu"), PATIENCE):  # they only wait for each other, which needs no accelerator
        report = evaluate(
            pictures, words.reference, extractor, words.out, intervals=words.intervals, overwrite=words.overwrite, **kept
        )
    if report is not None:
        print(report.table())
        print(words.out)


def _extractor(words: Words) -> Extractor:
    """The extractor asked for, on its device."""
    import torch

    from flexvar.evaluation.extractors import load_extractor

    torch.backends.cudnn.allow_tf32 = False  # which torch allows convolutions by default: features would be those of rounded pictures
    return load_extractor(words.extractor, words.weights).to(device_of(words.device))


def _refuse_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this command wants a single process; start it without torchrun")
