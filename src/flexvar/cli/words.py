"""The words of every command, with their help and an example each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexvar.cli.commands import Words, run_cache, run_convert, run_data, run_info, run_plan, run_train
from flexvar.cli.drawing import run_edit, run_sample
from flexvar.cli.evaluating import run_model, run_reference, run_samples, run_sweep, run_tokenizer

EDITS = (
    ("refine", "Keep the coarse scales of pictures and draw the others again.", "photo.png --strength 0.6 --class octopus"),
    ("upscale", "Keep every scale of pictures and draw larger ones.", "photo.png --factor 2 --class pizza"),
    ("inpaint", "Draw anew what is white in a mask, or transparent.", "photo.png --mask mask.png --class panda --sheet"),
    ("outpaint", "Draw beyond the edges of pictures.", "photo.png --left 32 --right 32 --class frog"),
)


DEVICES = "cpu, cuda, cuda:1, mps (default: the accelerator, if there is one)"


def parser() -> argparse.ArgumentParser:
    """All commands with their words, help and an example each."""
    top = argparse.ArgumentParser(
        prog="flexvar", description="Visual autoregressive modelling at any size, aspect ratio and number of steps."
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Words], None], about: str, example: str, under: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = under.add_parser(name, help=about, description=about, epilog=f"example: flexvar {example}")
        added.set_defaults(run=run)
        return added

    sample = command(
        "sample", run_sample, "Draw pictures of classes.", 'sample pizza "cat face" --height 64 --width 128 --seed 7 --out out/'
    )
    sample.add_argument("classes", nargs="*", metavar="CLASS", help="class names or indices; none draws without a class")
    _add_model(sample)
    sample.add_argument("--height", type=int, help="pixels (default: the model's)")
    sample.add_argument("--width", type=int, help="pixels (default: the model's)")
    _add_drawing(sample)
    sample.add_argument("--grid", action="store_true", help="also one sheet with all pictures")
    sample.add_argument("--strip", action="store_true", help="also every scale of each picture, side by side")

    edit = commands.add_parser("edit", help="Change given pictures, without any fine-tuning.")
    edits = edit.add_subparsers(title="edits", metavar="EDIT", required=True)
    for name, about, example in EDITS:
        added = command(name, run_edit, about, f"edit {name} {example}", edits)
        added.set_defaults(command_name=name)
        _add_edit(added, name)

    train = commands.add_parser("train", help="Train a tokenizer or a transformer.")
    stages = train.add_subparsers(title="what to train", metavar="STAGE", required=True)
    for stage in ("tokenizer", "transformer"):
        about = f"Train a {stage} as a config says, or go on where its run stopped. Works under torchrun too."
        added = command(stage, run_train, about, f"train {stage} configs/emoji/{stage}.yaml steps=500 run=runs/try", stages)
        added.add_argument("config", type=Path, metavar="CONFIG.yaml")
        added.add_argument("settings", nargs="*", metavar="key=value", help="settings that take the place of the config's")
        added.set_defaults(stage=stage)

    cache = command(
        "cache", run_cache, "Store the features of a data set, for the training of transformers. Works under torchrun too.",
        "cache configs/imagenet/cache.yaml tokenizer=runs/tokenizer/model out=data/features",
    )  # fmt: skip
    cache.add_argument("config", type=Path, metavar="CONFIG.yaml")
    cache.add_argument("settings", nargs="*", metavar="key=value", help="settings that take the place of the config's")
    cache.add_argument("--check", action="store_true", help="instead: read the whole cache again and name what is damaged")
    _add_overwrite(cache)

    evaluate = commands.add_parser("evaluate", help="Measure models, pictures and tokenizers.")
    _add_evaluations(evaluate.add_subparsers(title="what to measure", metavar="WHAT", required=True), command)

    convert = command(
        "convert", run_convert, "Turn released .pth files into a model folder, or a folder back into them.",
        "convert --tokenizer FlexVAE.pth --transformer FlexVARd20-epo249.pth models/d20",
    )  # fmt: skip
    convert.add_argument("out", type=Path, metavar="OUT_FOLDER")
    convert.add_argument("--tokenizer", type=Path, help="released file, for example FlexVAE.pth")
    convert.add_argument("--transformer", type=Path, help="released file, for example FlexVARd20-epo249.pth")
    convert.add_argument("--back", metavar="MODEL", help="instead: write this model as files that the released code loads")
    _add_overwrite(convert)

    data = commands.add_parser("data", help="Make a data set that anyone can make.")
    kinds = data.add_subparsers(title="data sets", metavar="KIND", required=True)
    for kind, about in (("emoji", "Emoji of the Noto Color Emoji font on plain backgrounds."), ("shapes", "Drawn shapes.")):
        added = command(kind, run_data, f"{about} One folder of PNG files a class.", f"data {kind} data/{kind} --count 20", kinds)
        added.add_argument("out", type=Path, metavar="OUT_FOLDER")
        added.add_argument("--count", type=int, default=50, help="pictures of each class (default: 50)")
        added.add_argument("--height", type=int, default=64, help="pixels (default: 64)")
        added.add_argument("--width", type=int, default=64, help="pixels (default: 64)")
        added.add_argument("--seed", type=int, default=0, help="(default: 0)")
        if kind == "emoji":
            added.add_argument("--classes", nargs="+", metavar="NAME", help="emoji by name (default: every one of the font, about 1,400)")
            added.add_argument("--font", type=Path, help="a NotoColorEmoji.ttf (default: the installed one)")
        _add_overwrite(added)
        added.set_defaults(kind=kind)

    info = command("info", run_info, "Say what a model is: sizes, classes, defaults, how it came to be.", "info emoji")
    info.add_argument("model", nargs="?", default="emoji", metavar="MODEL", help="a bundled name, a folder or a Hub id (default: emoji)")

    plan = command(
        "plan",
        run_plan,
        "Say what drawing costs before it runs: tokens, memory, FLOPs.",
        "plan --depth 24 --height 512 --width 512 --batch 8",
    )
    which = plan.add_mutually_exclusive_group()
    which.add_argument("--depth", type=int, default=16, help="of a released model (default: 16)")
    which.add_argument("--model", help="instead of a depth: a model's name or folder")
    plan.add_argument("--height", type=int, default=256, help="pixels (default: 256)")
    plan.add_argument("--width", type=int, default=256, help="pixels (default: 256)")
    plan.add_argument("--steps", type=int, default=10, help="scales (default: 10)")
    plan.add_argument("--schedule", metavar="SCALES", help="instead of size and steps: 1,2,4 or 1x1,2x3, or a published name")
    plan.add_argument("--batch", type=int, default=1, help="pictures drawn at the same time (default: 1)")
    plan.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: float32)")
    plan.add_argument("--no-guidance", action="store_true", help="without classifier-free guidance")
    return top


def _add_edit(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("images", nargs="+", metavar="PICTURE", help="picture files")
    command.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="class names or indices (default: no class)")
    _add_model(command)
    if name == "refine":
        command.add_argument("--strength", type=float, default=0.5, help="share of scales drawn anew, from 0 to 1 (default: 0.5)")
    if name == "upscale":
        command.add_argument("--factor", type=float, help="how many times larger on a side")
    if name == "inpaint":
        command.add_argument("--mask", type=Path, help="picture file, white where to draw (default: where the picture is transparent)")
    if name == "outpaint":
        for side in ("left", "right", "top", "bottom"):
            command.add_argument(f"--{side}", type=int, default=0, help=f"pixels to add ({side}; default: 0)")
        command.add_argument("--anchor", help="where it stays in --height x --width: centre, left, top-right, ... (default: centre)")
    if name != "inpaint":
        command.add_argument("--height", type=int, help="pixels of the result")
        command.add_argument("--width", type=int, help="pixels of the result")
    if name in ("inpaint", "outpaint"):
        command.add_argument("--feather", type=int, help="pixels over which the drawing meets its border, 0 for none (default: a code's)")
        command.add_argument("--no-paste", action="store_false", dest="paste", help="leave the picture as the tokenizer gives it back")
        command.add_argument("--mask-rule", choices=["any", "majority", "all"], help="coarse cells drawn (default: all white)")
    command.add_argument("--max-pixels", type=int, help="above so many, a reduced copy is drawn (default: 4 times the trained size)")
    command.add_argument("--sheet", action="store_true", help="also one picture of before, mask and after")
    _add_drawing(command)


def _add_evaluations(kinds: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    model = command(
        "model", run_model, "Draw as many pictures of each class and score them against a reference. Works under torchrun too.",
        "evaluate model flexvar-d20 --reference VIRTUAL_imagenet256_labeled.npz --guidance-scale 2.5", kinds,
    )  # fmt: skip
    model.add_argument("model", metavar="MODEL", help="a bundled or released name, a folder or a Hub id")
    _add_reference(model)
    model.add_argument("--per-class", type=int, default=50, help="pictures of each class (default: 50)")
    model.add_argument("--height", type=int, help="pixels (default: the model's)")
    model.add_argument("--width", type=int, help="pixels (default: the model's)")
    _add_settings(model)
    model.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on from it (default: 0)")
    model.add_argument("--batch", type=int, default=50, help="pictures drawn at the same time; changes speed only (default: 50)")
    _add_device(model)
    model.add_argument("--save-npz", type=Path, metavar="FILE", help="also the pictures, in ADM's layout")
    model.add_argument("--save-png", type=Path, metavar="FOLDER", help="also each picture as a file")
    _add_report(model)

    samples = command(
        "samples", run_samples, "Score pictures that were drawn elsewhere against a reference.",
        "evaluate samples drawn.npz --reference VIRTUAL_imagenet256_labeled.npz", kinds,
    )  # fmt: skip
    samples.add_argument("pictures", type=Path, metavar="PICTURES", help="an .npz with arr_0, or a folder of PNG files")
    _add_reference(samples)
    samples.add_argument("--device", help=DEVICES)
    _add_report(samples)

    reference = command(
        "reference", run_reference, "Make a reference of ADM's layout from a folder of pictures.",
        "evaluate reference data/mine reference.npz --height 256 --width 256", kinds,
    )  # fmt: skip
    reference.add_argument("pictures", type=Path, metavar="FOLDER", help="pictures, in folders below it or not")
    reference.add_argument("out", type=Path, metavar="OUT.npz")
    reference.add_argument("--height", type=int, help="pixels to which the pictures are resized and cropped (default: as they are)")
    reference.add_argument("--width", type=int, help="pixels")
    reference.add_argument("--keep", type=int, default=10_000, help="pictures in the file, for precision and recall (default: 10000)")
    _add_extractor(reference)
    reference.add_argument("--device", help=DEVICES)
    _add_overwrite(reference)

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
    sweep.add_argument("--height", type=int, help="pixels (default: the model's)")
    sweep.add_argument("--width", type=int, help="pixels (default: the model's)")
    sweep.add_argument("--per-class", type=int, default=5, help="pictures of each class (default: 5)")
    sweep.add_argument("--seed", type=int, default=0, help="of the first picture of each combination (default: 0)")
    sweep.add_argument("--batch", type=int, default=50, help="pictures drawn at the same time (default: 50)")
    _add_device(sweep)
    sweep.add_argument("--out", type=Path, default=Path("sweep"), help="folder for reports, table and plot (default: sweep)")
    _add_overwrite(sweep)

    tokenizer = command(
        "tokenizer", run_tokenizer, "Measure a tokenizer at every scale: rFID, PSNR, SSIM, L1, LPIPS if its files are given, use of codes.",
        "evaluate tokenizer emoji data/emoji --sizes 64 64x128 --extractor classifier", kinds,
    )  # fmt: skip
    tokenizer.add_argument("model", metavar="MODEL", help="a bundled or released name, a folder (a tokenizer alone will do) or a Hub id")
    tokenizer.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder of pictures, or an .npz with arr_0")
    sizes_help = "pixels to which a folder's pictures are resized and cropped: 256, or height x width as 384x512 (default: the model's)"
    tokenizer.add_argument("--sizes", nargs="+", metavar="SIZE", help=sizes_help)
    tokenizer.add_argument("--steps", type=int, help="scales, at least 2 (default: the model's)")
    tokenizer.add_argument("--schedule", metavar="SCALES", help="for a single size, the scales themselves: 1,2,4,6 or 1x1,2x3,4x6")
    tokenizer.add_argument("--count", type=int, help="pictures, evenly chosen (default: all)")
    tokenizer.add_argument("--batch", type=int, default=16, help="pictures rebuilt at the same time; changes speed only (default: 16)")
    extractor_help = "of rFID: inception, classifier (built in, for relative numbers), a file, or none (default: inception)"
    tokenizer.add_argument("--extractor", default="inception", help=extractor_help)
    tokenizer.add_argument("--weights", type=Path, help="the Inception weights (default: fetched once)")
    tokenizer.add_argument("--lpips-vgg", type=Path, metavar="FILE", help="torchvision's VGG-16, for LPIPS")
    tokenizer.add_argument("--lpips-linear", type=Path, metavar="FILE", help="lpips' own weights, for LPIPS")
    tokenizer.add_argument("--device", help=DEVICES)
    tokenizer.add_argument("--out", type=Path, default=Path("scores.json"), help="the report (default: scores.json)")
    _add_overwrite(tokenizer)


def _add_reference(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reference", required=True, metavar="R", help="an .npz of ADM, pytorch-fid or clean-fid, or a folder")
    _add_extractor(command)


def _add_extractor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--extractor", default="inception", help="inception, classifier (built in, for relative numbers), or a file (default: inception)"
    )
    command.add_argument("--weights", type=Path, help="the Inception weights (default: fetched once)")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("--intervals", action="store_true", help="also 95 %% intervals of FID and sFID; takes a minute")
    command.add_argument("--out", type=Path, default=Path("scores.json"), help="the report (default: scores.json)")
    _add_overwrite(command)


def _add_drawing(command: argparse.ArgumentParser) -> None:
    _add_settings(command)
    command.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on from it (default: 0)")
    command.add_argument("--count", type=int, default=1, help="pictures of each class (default: 1)")
    command.add_argument("--batch", type=int, default=8, help="pictures drawn at the same time; changes speed only (default: 8)")
    _add_device(command)
    command.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    _add_overwrite(command)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, help="scales, at least 2 (default: the model's)")
    command.add_argument("--schedule", metavar="SCALES", help="the scales themselves: 1,2,4,6 or 1x1,2x3,4x6, or a published name")
    command.add_argument("--guidance-scale", type=float, help="1 switches guidance off, 0 the official ramp (default: the model's)")
    command.add_argument("--guidance", choices=["ramp", "constant", "official-ramp"], help="how guidance grows over the scales")
    command.add_argument("--split-guidance", action="store_true", help="draw with and without the class in turn: less memory")
    command.add_argument("--guidance-stop", type=int, metavar="N", help="guide the first N scales only: the others cost half")
    command.add_argument("--top-k", type=int, help="candidates kept, 0 for all")
    command.add_argument("--top-p", type=float, help="probability that the candidates reach, 0 or 1 for no limit")
    command.add_argument("--temperature", type=float, help="logits are divided by it")
    command.add_argument("--greedy", help="none, official, or the scales that take the likeliest code: 7,9 or 4x6")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help=DEVICES)
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on CUDA, else float32)")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="emoji", help="a bundled or released name, a folder or a Hub id (default: emoji)")


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
