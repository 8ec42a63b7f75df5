"""The commands that measure. Under torchrun `model` and `samples` share the pictures out; the others want a single process."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexvar.cli.drawing import device_of, move, settings_of
from flexvar.cli.options import (
    DEVICES,
    Parser,
    Words,
    add_batch,
    add_device,
    add_extractor,
    add_overwrite,
    add_seed,
    add_settings,
    add_size,
    path,
)

if TYPE_CHECKING:
    from flexvar.evaluation.extractors import Extractor
    from flexvar.evaluation.stored import PictureSet

PATIENCE = timedelta(hours=4)  # the first process may have to make the features of a large reference while the others wait


def add_evaluations(kinds: Any, command: Callable[..., Parser]) -> None:
    """What can be measured, under `flexvar evaluate`; `command` adds one."""
    model = command(
        "model", run_model, "Draw as many pictures of each class and score them against a reference. Works under torchrun too.",
        "evaluate model flexvar-d20 --reference VIRTUAL_imagenet256_labeled.npz --guidance-scale 2.5", kinds,
    )  # fmt: skip
    model.add_argument("model", metavar="MODEL", help="a bundled or released name, a folder or a Hub id")
    _add_reference(model)
    model.add_argument("--per-class", type=int, default=50, help="pictures of each class (default: 50)")
    add_size(model)
    add_settings(model)
    add_seed(model)
    add_batch(model, 50)
    add_device(model)
    model.add_argument("--save-npz", type=path, metavar="FILE", help="also the pictures, in ADM's layout")
    model.add_argument("--save-png", type=path, metavar="FOLDER", help="also each picture as a file")
    _add_report(model)

    samples = command(
        "samples", run_samples, "Score pictures that were drawn elsewhere against a reference.",
        "evaluate samples drawn.npz --reference VIRTUAL_imagenet256_labeled.npz", kinds,
    )  # fmt: skip
    samples.add_argument("pictures", type=path, metavar="PICTURES", help="an .npz with arr_0, or a folder of PNG files")
    _add_reference(samples)
    samples.add_argument("--device", help=DEVICES)
    _add_report(samples)

    reference = command(
        "reference", run_reference, "Make a reference of ADM's layout from a folder of pictures.",
        "evaluate reference data/mine reference.npz --height 256 --width 256", kinds,
    )  # fmt: skip
    reference.add_argument("pictures", type=path, metavar="FOLDER", help="pictures, in folders below it or not")
    reference.add_argument("out", type=path, metavar="OUT.npz")
    add_size(reference, "pixels to which the pictures are resized and cropped (default: as they are)")
    reference.add_argument("--keep", type=int, default=10_000, help="pictures in the file, for precision and recall (default: 10000)")
    add_extractor(reference)
    reference.add_argument("--device", help=DEVICES)
    add_overwrite(reference)

    sweep = command(
        "sweep", run_sweep, "Score every combination of settings on few pictures: a table and a plot of quality against time.",
        "evaluate sweep emoji --reference data/emoji --extractor classifier --steps 4 6 8 --guidance-scale 1.5 2.5 4", kinds,
    )  # fmt: skip
    sweep.add_argument("model", metavar="MODEL", help="a bundled or released name, a folder or a Hub id")
    _add_reference(sweep)
    sweep.add_argument("--steps", type=int, nargs="+", help="numbers of scales")
    sweep.add_argument("--schedule", nargs="+", metavar="SCALES", help="instead: the scales themselves, 1,2,4,6 or a published name")
    sweep.add_argument("--guidance-scale", type=float, nargs="+", help="guidance scales")
    sweep.add_argument("--guidance-stop", type=int, nargs="+", help="numbers of guided scales")
    sweep.add_argument("--top-k", type=int, nargs="+", help="candidates kept")
    sweep.add_argument("--top-p", type=float, nargs="+", help="probabilities that the candidates reach")
    add_size(sweep)
    sweep.add_argument("--per-class", type=int, default=5, help="pictures of each class (default: 5)")
    add_seed(sweep)
    add_batch(sweep, 50)
    add_device(sweep)
    sweep.add_argument("--out", type=path, default=Path("sweep"), help="folder for reports, table and plot (default: sweep)")
    add_overwrite(sweep)

    tokenizer = command(
        "tokenizer", run_tokenizer, "Measure a tokenizer at every scale: rFID, PSNR, SSIM, L1, LPIPS if its files are given, use of codes.",
        "evaluate tokenizer emoji data/emoji --sizes 64 64x128 --extractor classifier", kinds,
    )  # fmt: skip
    tokenizer.add_argument("model", metavar="MODEL", help="a bundled or released name, a folder (a tokenizer alone will do) or a Hub id")
    tokenizer.add_argument("pictures", type=path, metavar="PICTURES", help="a folder of pictures, or an .npz with arr_0")
    sizes_help = "pixels to which a folder's pictures are resized and cropped: 256, or height x width as 384x512 (default: the model's)"
    tokenizer.add_argument("--sizes", nargs="+", metavar="SIZE", help=sizes_help)
    tokenizer.add_argument("--steps", type=int, help="scales, at least 2 (default: the model's)")
    tokenizer.add_argument("--schedule", metavar="SCALES", help="for a single size, the scales themselves: 1,2,4,6 or 1x1,2x3,4x6")
    tokenizer.add_argument("--count", type=int, help="pictures, evenly chosen (default: all)")
    tokenizer.add_argument("--batch", type=int, default=16, help="pictures rebuilt at the same time; changes speed only (default: 16)")
    add_extractor(tokenizer, ", or none to leave rFID out")
    tokenizer.add_argument("--lpips-vgg", type=path, metavar="FILE", help="torchvision's VGG-16, for LPIPS")
    tokenizer.add_argument("--lpips-linear", type=path, metavar="FILE", help="lpips' own weights, for LPIPS")
    tokenizer.add_argument("--device", help=DEVICES)
    tokenizer.add_argument("--out", type=path, default=Path("scores.json"), help="the report (default: scores.json)")
    add_overwrite(tokenizer)


def _add_reference(command: Parser) -> None:
    command.add_argument("--reference", required=True, metavar="R", help="an .npz of ADM, pytorch-fid or clean-fid, or a folder")
    add_extractor(command)


def _add_report(command: Parser) -> None:
    command.add_argument("--intervals", action="store_true", help="also 95 %% intervals of FID and sFID; takes a minute")
    command.add_argument("--out", type=path, default=Path("scores.json"), help="the report (default: scores.json)")
    add_overwrite(command)


def run_model(words: Words) -> None:
    from flexvar.evaluation.drawn import DrawnPictures
    from flexvar.pipeline import FlexVARPipeline

    pipe = FlexVARPipeline.from_pretrained(words.model)
    settings = {"height": words.height, "width": words.width, **settings_of(words)}
    pictures = DrawnPictures(pipe, words.model, words.per_class, seed=words.seed, batch=words.batch, **settings)
    move(pipe, words)
    _evaluate(pictures, words, npz=words.save_npz, pngs=words.save_png)


def run_samples(words: Words) -> None:
    from flexvar.evaluation.stored import open_pictures
    from flexvar.writing import check_writable

    check_writable(words.out, overwrite=True, read=[words.pictures])  # whether it is there already is asked later
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
    from flexvar.evaluation.sweep import SWEPT, check_plotting, plot, sweep, table
    from flexvar.pipeline import FlexVARPipeline
    from flexvar.writing import check_writable, write_whole

    _refuse_processes()
    named = vars(words) | {"num_inference_steps": words.steps}
    check_plotting()
    grid = {name: named[name] for name in SWEPT if named[name] is not None}
    if not any(words.out.glob("*.trial.json")):  # what stands there is not of an earlier sweep
        check_writable(words.out / "table.txt", words.out / "plot.png", overwrite=words.overwrite)
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
    from flexvar.writing import check_writable

    _refuse_processes()
    check_writable(words.out, overwrite=words.overwrite, read=[words.pictures])
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
        report = evaluate(pictures, words.reference, extractor, words.out, intervals=words.intervals, overwrite=words.overwrite, **kept)
    if report is not None:
        print(report.table())
        print(words.out)


def _extractor(words: Words) -> Extractor:
    """The extractor asked for, on its device."""
    from flexvar.evaluation.extractors import load_extractor

    return load_extractor(words.extractor, words.weights).to(device_of(words.device))


def _refuse_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this command wants a single process; start it without torchrun")
