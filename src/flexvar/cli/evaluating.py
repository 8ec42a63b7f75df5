"""The commands that measure. Under torchrun each process takes its share of the pictures."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from flexvar.cli.commands import Words
from flexvar.cli.drawing import device_of, move, settings_of

if TYPE_CHECKING:
    from flexvar.evaluation.stored import PictureSet

PATIENCE = timedelta(hours=4)  # the first process may have to make the features of a large reference while the others wait


def run_model(words: Words) -> None:
    from flexvar.evaluation.drawn import DrawnPictures
    from flexvar.evaluation.runner import unfinished
    from flexvar.pipeline import FlexVARPipeline

    pngs = words.save_png
    if pngs is not None and pngs.exists() and any(pngs.iterdir()) and not (words.overwrite or unfinished(words.out).exists()):
        raise FileExistsError(f"{pngs} is not empty; choose another folder, or add --overwrite")
    pipe = FlexVARPipeline.from_pretrained(words.model)
    settings = {"height": words.height, "width": words.width, **settings_of(words)}
    move(pipe, words)
    pictures = DrawnPictures(
        pipe, words.model, words.per_class, seed=words.seed, batch=words.batch, pngs=pngs, **settings
    )  # complains of wrong settings at once
    _evaluate(pictures, words)


def run_samples(words: Words) -> None:
    from flexvar.evaluation.stored import open_pictures

    _evaluate(open_pictures(words.pictures), words)


def run_reference(words: Words) -> None:
    from flexvar.evaluation.extractors import load_extractor
    from flexvar.evaluation.references import write_reference

    if (words.height is None) != (words.width is None):
        raise ValueError("give both --height and --width, or neither")
    size = None if words.height is None else (words.height, words.width)
    extractor = load_extractor(words.extractor, words.weights).to(device_of(words.device))
    count = write_reference(words.pictures, words.out, extractor, size=size, keep=words.keep, overwrite=words.overwrite)
    print(f"{words.out}: moments of {count} pictures, by {extractor.name}")


def run_sweep(words: Words) -> None:
    from flexvar.evaluation.extractors import load_extractor
    from flexvar.evaluation.sweep import SWEPT, plot, sweep, table
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.writing import write_whole

    named = vars(words) | {"num_inference_steps": words.steps}
    grid = {name: named[name] for name in SWEPT if named[name] is not None}
    pipe = FlexVARPipeline.from_pretrained(words.model)
    move(pipe, words)
    extractor = load_extractor(words.extractor, words.weights).to(device_of(words.device))
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


def _evaluate(pictures: PictureSet, words: Words) -> None:
    from flexvar.evaluation.extractors import load_extractor
    from flexvar.evaluation.runner import evaluate
    from flexvar.processes import processes

    device = device_of(words.device)
    extractor = load_extractor(words.extractor, words.weights).to(device)
    with processes(device, PATIENCE) as share:
        report = evaluate(
            pictures,
            words.reference,
            extractor,
            words.out,
            intervals=words.intervals,
            npz=getattr(words, "save_npz", None),
            overwrite=words.overwrite,
            share=share,
        )
    if report is not None:
        print(report.table())
        print(words.out)


def run_tokenizer(words: Words) -> None:
    from flexvar.evaluation.extractors import load_extractor
    from flexvar.evaluation.tokenizers import evaluate_tokenizer, size_of

    if words.out.exists() and not words.overwrite:
        raise FileExistsError(f"{words.out} exists; choose another --out, or add --overwrite")
    if (words.lpips_vgg is None) != (words.lpips_linear is None):
        raise ValueError("LPIPS needs two files; give both --lpips-vgg and --lpips-linear, or neither")
    sizes = None if words.sizes is None else [size_of(size) for size in words.sizes]
    device = device_of(words.device)
    report = evaluate_tokenizer(
        words.model,
        words.pictures,
        sizes=sizes,
        steps=words.steps,
        schedule=words.schedule,
        count=words.count,
        batch=words.batch,
        extractor=None if words.extractor == "none" else load_extractor(words.extractor, words.weights).to(device),
        lpips=None if words.lpips_vgg is None else (words.lpips_vgg, words.lpips_linear),
        device=device,
    )
    report.write(words.out)
    print(report.table())
    print(words.out)
