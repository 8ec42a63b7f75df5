"""The parser of the command line: every command with its options, help and an example."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import flexvar
from flexvar.cli.commands import run_cache, run_convert, run_data, run_info, run_plan, run_train
from flexvar.cli.drawing import run_app, run_edit, run_sample
from flexvar.cli.evaluating import add_evaluations
from flexvar.cli.options import Words, add_device, add_drawing, add_dtype, add_model, add_overwrite, add_schedule, add_size, path

EDITS = (
    ("refine", "Keep the coarse scales of pictures and draw the others again.", "photo.png --strength 0.6 --class octopus"),
    ("upscale", "Keep every scale of pictures and draw larger ones.", "photo.png --factor 2 --class pizza"),
    ("inpaint", "Draw anew what is white in a mask, or transparent.", "photo.png --mask mask.png --class panda --sheet"),
    ("outpaint", "Draw beyond the edges of pictures.", "photo.png --left 32 --right 32 --class frog"),
)


class OneLine(argparse.ArgumentParser):
    """A parser that says a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"flexvar: {message}; see {self.prog} --help\n")


def parsed(arguments: Sequence[str] | None = None) -> Words:
    """The words of a command. A list of them may go on behind options, which argparse alone takes for a mistake."""
    words, more = parser().parse_known_args(arguments)
    name, more = getattr(words, "list_of", ""), [word for word in more if word != "--"]
    unknown = [word for word in more if not name or word.startswith("-")]
    if unknown:
        words.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        setattr(words, name, [*getattr(words, name), *more])
    return words


def parser() -> argparse.ArgumentParser:
    """All commands with their options, help and an example each."""
    top = OneLine(
        prog="flexvar",
        description="Visual autoregressive modelling at any size, aspect ratio and number of steps.",
        epilog="example: flexvar sample pizza --seed 7. Exit status: 0; 2 after a mistake, which one line on stderr explains (and a "
        "traceback with FLEXVAR_TRACEBACK=1 in the environment); 130 after Ctrl-C; 141 when nobody reads what it prints",
    )
    top.add_argument("--version", action="version", version=f"flexvar {flexvar.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Words], None], about: str, example: str, under: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = under.add_parser(name, help=about, description=about, epilog=f"example: flexvar {example}")
        added.set_defaults(run=run, parser=added)
        return added

    def group(name: str, about: str, example: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about, epilog=f"example: flexvar {example}")
        return added

    sample = command(
        "sample", run_sample, "Draw pictures of classes.", 'sample pizza "cat face" --height 64 --width 128 --seed 7 --out out/'
    )
    sample.add_argument("classes", nargs="*", metavar="CLASS", help="class names or indices; none draws without a class")
    sample.set_defaults(list_of="classes")
    add_model(sample)
    add_size(sample)
    add_drawing(sample)
    sample.add_argument("--grid", action="store_true", help="also one sheet with all pictures")
    sample.add_argument("--strip", action="store_true", help="also every scale of each picture, side by side")

    edit = group("edit", "Change given pictures, without any fine-tuning.", "edit inpaint photo.png --mask mask.png --class panda")
    edits = edit.add_subparsers(title="edits", metavar="EDIT", required=True)
    for name, about, example in EDITS:
        added = command(name, run_edit, about, f"edit {name} {example}", edits)
        added.set_defaults(command_name=name)
        _add_edit(added, name)

    train = group("train", "Train a tokenizer or a transformer.", "train tokenizer configs/own/tokenizer.yaml")
    stages = train.add_subparsers(title="what to train", metavar="STAGE", required=True)
    for stage in ("tokenizer", "transformer"):
        about = f"Train a {stage} as a config says, or go on where its run stopped. Works under torchrun too."
        added = command(stage, run_train, about, f"train {stage} configs/emoji/{stage}.yaml steps=500 run=runs/try", stages)
        added.add_argument("config", type=path, metavar="CONFIG.yaml")
        added.add_argument("settings", nargs="*", metavar="key=value", help="settings that take the place of the config's")
        added.set_defaults(stage=stage, list_of="settings")

    cache = command(
        "cache", run_cache, "Store the features of a data set, for the training of transformers. Works under torchrun too.",
        "cache configs/imagenet/cache.yaml tokenizer=runs/tokenizer/model out=data/features",
    )  # fmt: skip
    cache.add_argument("config", type=path, metavar="CONFIG.yaml")
    cache.add_argument("settings", nargs="*", metavar="key=value", help="settings that take the place of the config's")
    cache.set_defaults(list_of="settings")
    cache.add_argument("--check", action="store_true", help="instead: read the whole cache again and name what is damaged")
    add_overwrite(cache)

    evaluate = group("evaluate", "Measure models, pictures and tokenizers.", "evaluate samples drawn.npz --reference reference.npz")
    add_evaluations(evaluate.add_subparsers(title="what to measure", metavar="WHAT", required=True), command)

    convert = command(
        "convert", run_convert, "Turn released .pth files into a model folder, or a folder back into them.",
        "convert --tokenizer FlexVAE.pth --transformer FlexVARd20-epo249.pth models/d20",
    )  # fmt: skip
    convert.add_argument("out", type=path, metavar="OUT_FOLDER")
    convert.add_argument("--tokenizer", type=path, help="released file, for example FlexVAE.pth")
    convert.add_argument("--transformer", type=path, help="released file, for example FlexVARd20-epo249.pth")
    convert.add_argument("--back", metavar="MODEL", help="instead: write this model as files that the released code loads")
    add_overwrite(convert)

    data = group("data", "Make a data set that anyone can make.", "data shapes pictures --count 50")
    kinds = data.add_subparsers(title="data sets", metavar="KIND", required=True)
    for kind, about in (("emoji", "Emoji of the Noto Color Emoji font on plain backgrounds."), ("shapes", "Drawn shapes.")):
        added = command(kind, run_data, f"{about} One folder of PNG files a class.", f"data {kind} data/{kind} --count 20", kinds)
        added.add_argument("out", type=path, metavar="OUT_FOLDER")
        added.add_argument("--count", type=int, default=50, help="pictures of each class (default: 50)")
        added.add_argument("--height", type=int, default=64, help="pixels (default: 64)")
        added.add_argument("--width", type=int, default=64, help="pixels (default: 64)")
        added.add_argument("--seed", type=int, default=0, help="(default: 0)")
        if kind == "emoji":
            names_help = "emoji by name, as red heart or heart (default: every one of the font, about 1,400)"
            added.add_argument("--classes", nargs="+", metavar="NAME", help=names_help)
            added.add_argument("--font", type=path, help="a NotoColorEmoji.ttf (default: the installed one)")
        add_overwrite(added)
        added.set_defaults(kind=kind)

    app = command("app", run_app, "Draw and edit in a browser, and watch every scale come.", "app --model emoji --open")
    add_model(app)
    add_device(app)
    app.add_argument(
        "--host", default="127.0.0.1", help="who can reach it: 127.0.0.1 for this machine, 0.0.0.0 for all (default: 127.0.0.1)"
    )
    app.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    app.add_argument("--open", action="store_true", help="also open it in the browser")

    info = command("info", run_info, "Say what a model is: sizes, the names of its classes, defaults, how it came to be.", "info emoji")
    info.add_argument("model", nargs="?", default="emoji", metavar="MODEL", help="a bundled name, a folder or a Hub id (default: emoji)")

    plan = command(
        "plan",
        run_plan,
        "Say what drawing costs before it runs: tokens, FLOPs, bytes moved, memory.",
        "plan --depth 24 --height 512 --width 512 --batch 8",
    )
    which = plan.add_mutually_exclusive_group()
    which.add_argument("--depth", type=int, help="of a released model (default: 16)")
    which.add_argument("--model", help="instead of a depth: a model's name or folder")
    add_size(plan)
    add_schedule(plan)
    plan.add_argument("--batch", type=int, default=1, help="pictures drawn at the same time (default: 1)")
    guided = plan.add_mutually_exclusive_group()
    guided.add_argument("--no-guidance", action="store_true", help="without classifier-free guidance")
    guided.add_argument("--split-guidance", action="store_true", help="with and without the class one after the other, for less memory")
    plan.add_argument(
        "--device", help="a name as cpu or cuda, which need not be here (default: cpu; with --measure: the accelerator, if any)"
    )
    add_dtype(plan)
    measure_help = (
        "then draw here with random weights: the device's rates, the least time that they allow each part, the time that it takes, and "
        "the share. Four drawings, the making of the networks and about 15 s; beside the memory of the plan 1 GiB"
    )
    plan.add_argument("--measure", action="store_true", help=measure_help)
    return top


def _add_edit(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("images", nargs="+", metavar="PICTURE", help="picture files")
    command.set_defaults(list_of="images")
    command.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="class names or indices (default: no class)")
    add_model(command)
    if name == "refine":
        command.add_argument("--strength", type=float, default=0.5, help="share of scales drawn anew, from 0 to 1 (default: 0.5)")
    if name == "upscale":
        command.add_argument("--factor", type=float, help="how many times larger on a side")
    if name == "inpaint":
        command.add_argument("--mask", type=path, help="picture file, white where to draw (default: where the picture is transparent)")
    if name == "outpaint":
        for side in ("left", "right", "top", "bottom"):
            command.add_argument(f"--{side}", type=int, default=0, help=f"pixels to add ({side}; default: 0)")
        command.add_argument("--anchor", help="where it stays in --height x --width: centre, left, top-right, ... (default: centre)")
    if name != "inpaint":
        add_size(command, "pixels of the result")
    if name in ("inpaint", "outpaint"):
        command.add_argument("--feather", type=int, help="pixels over which the drawing meets its border, 0 for none (default: a code's)")
        command.add_argument("--no-paste", action="store_false", dest="paste", help="leave the picture as the tokenizer gives it back")
        rule_help = "which cells of coarse scales are drawn: those with any white, with mostly white, or all white (default: all)"
        command.add_argument("--mask-rule", choices=["any", "majority", "all"], help=rule_help)
    command.add_argument("--max-pixels", type=int, help="above so many, a reduced copy is drawn (default: 4 times the trained size)")
    command.add_argument("--sheet", action="store_true", help="also one picture of before, mask and after")
    add_drawing(command)
