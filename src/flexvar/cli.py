"""The command `flexvar`. Each verb is a function that is handed its words; torch is imported by the verbs that need it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from flexvar.generation import Step
    from flexvar.pipeline import FlexVARPipeline

Words = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit status: 0, 2 for a mistake that one line on stderr explains, 130 when interrupted."""
    words = parser().parse_args(arguments)
    if words.run is not run_train:  # large pages on Linux, for which torch asks when it first allocates: faster decoding, slower training
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"flexvar: {message}", file=sys.stderr)
        try:
            words.run(words)
        except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
            print(f"flexvar: {_one_line(error)}", file=sys.stderr)
            return 2
        except Exception as error:
            from flexvar.memory import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            line = str(error) if isinstance(error, MemoryError) else ""  # torch's own lines name no mend
            print(f"flexvar: {line or 'not enough memory; take smaller pictures or a smaller batch (see `flexvar plan`)'}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("flexvar: interrupted; nothing is half-written", file=sys.stderr)
            return 130
    return 0


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
    sample.add_argument("--steps", type=int, help="scales, at least 2 (default: the model's)")
    sample.add_argument("--schedule", metavar="SCALES", help="the scales themselves: 1,2,4,6 or 1x1,2x3,4x6, or a published name")
    sample.add_argument("--guidance-scale", type=float, help="1 switches guidance off, 0 the official ramp (default: the model's)")
    sample.add_argument("--guidance", choices=["ramp", "constant", "official-ramp"], help="how guidance grows over the scales")
    sample.add_argument("--split-guidance", action="store_true", help="draw with and without the class in turn: less memory, same pictures")
    sample.add_argument("--top-k", type=int, help="candidates kept, 0 for all")
    sample.add_argument("--top-p", type=float, help="probability that the candidates reach, 0 or 1 for no limit")
    sample.add_argument("--temperature", type=float, help="logits are divided by it")
    sample.add_argument("--greedy", help="none, official, or the scales that take the likeliest code: 7,9 or 4x6")
    sample.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on from it (default: 0)")
    sample.add_argument("--count", type=int, default=1, help="pictures of each class (default: 1)")
    sample.add_argument("--batch", type=int, default=8, help="pictures drawn at the same time; changes speed only (default: 8)")
    sample.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator, if there is one)")
    sample.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on CUDA, else float32)")
    sample.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    sample.add_argument("--grid", action="store_true", help="also one sheet with all pictures")
    sample.add_argument("--strip", action="store_true", help="also every scale of each picture, side by side")
    _add_overwrite(sample)

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


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="emoji", help="a bundled or released name, a folder or a Hub id (default: emoji)")


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


# -- the commands --


def run_sample(words: Words) -> None:
    import torch

    from flexvar.pipeline import FlexVARPipeline
    from flexvar.progress import progress
    from flexvar.schedule import Schedule, parse_sizes
    from flexvar.sheet import in_rows, sheet

    pipe = FlexVARPipeline.from_pretrained(words.model)
    for name in ("count", "batch"):
        if getattr(words, name) < 1:
            raise ValueError(f"--{name} is {getattr(words, name)}; it must be at least 1")
    asked = [word for word in words.classes or [None] for _ in range(words.count)]
    labels = pipe.labels_of(asked)
    seeds = [words.seed + i for i in range(len(labels))]
    stems = [f"{_file_name(pipe, label)}-seed{seed}" for label, seed in zip(labels, seeds, strict=True)]
    endings = [".png", *(["-strip.png"] if words.strip else [])]
    planned = [words.out / (stem + ending) for stem in stems for ending in endings] + ([words.out / "grid.png"] if words.grid else [])
    _refuse_existing(planned, words.overwrite)
    settings = {
        "height": words.height,
        "width": words.width,
        "num_inference_steps": words.steps,
        "schedule": None if words.schedule is None else Schedule.parse(words.schedule),
        "guidance_scale": words.guidance_scale,
        "guidance": words.guidance,
        "split_guidance": words.split_guidance or None,
        "top_k": words.top_k,
        "top_p": words.top_p,
        "temperature": words.temperature,
        "greedy": words.greedy if words.greedy in (None, "none", "official") else parse_sizes(words.greedy),
    }
    guidance, sampling = pipe.guidance_of(**settings), pipe.sampling_of(**settings)
    device = _device(words.device)
    dtype = getattr(torch, words.dtype) if words.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe.to(device, dtype)
    pictures: list[Image.Image] = []
    for start in progress(range(0, len(labels), words.batch), "drawing"):
        part = slice(start, start + words.batch)
        drawing = pipe.stream(asked[part], seed=seeds[part], **settings)  # complains of wrong settings at once
        _make_folder(words.out)
        steps = list(drawing)
        for i, picture in enumerate(_painted(steps[-1])):
            stem, seed = stems[start + i], seeds[start + i]
            facts = {"model": words.model, "class": pipe.class_name(labels[start + i]), "seed": seed, "dtype": str(dtype)}
            facts |= {"schedule": Schedule(tuple(step.size for step in steps)), "guidance": guidance, "sampling": sampling}
            _save_picture(picture, words.out / f"{stem}.png", facts)
            pictures.append(picture)
        if words.strip:
            for i, scales in enumerate(zip(*(_painted(step) for step in steps), strict=True)):
                row = [scale.resize(scales[-1].size, resample=0) for scale in scales]
                caption = [f"{h} x {w}" for h, w in (step.size for step in steps)]
                _save_picture(sheet([row], [caption]), words.out / f"{stems[start + i]}-strip.png")
    if words.grid:
        columns = words.count if words.count > 1 else max(1, round(len(pictures) ** 0.5))
        captions = in_rows([pipe.class_name(label) for label in labels], columns)
        _save_picture(sheet(in_rows(pictures, columns), captions), words.out / "grid.png")
    for path in planned:
        print(path)


def run_train(words: Words) -> None:
    from flexvar.training.config import read_config
    from flexvar.training.settings import TokenizerRun, TransformerRun

    kind = TokenizerRun if words.stage == "tokenizer" else TransformerRun
    config = read_config(kind, words.config, words.settings)
    from flexvar.training.start import start  # torch comes with it, after the config is known to be right

    print(start(config))  # type: ignore[arg-type]


def run_cache(words: Words) -> None:
    from flexvar.training.config import read_config
    from flexvar.training.settings import CacheRun

    config = read_config(CacheRun, words.config, words.settings)
    if words.check:
        from flexvar.data.features import verify

        if complaints := verify(config.out):
            raise ValueError("; ".join(complaints))
        print(f"{config.out} is whole")
        return
    from flexvar.training.caching import cache_features  # torch comes with it, after the config is known to be right

    print(cache_features(config, words.overwrite))


def run_convert(words: Words) -> None:
    from flexvar.pipeline import FlexVARPipeline

    if words.back and (words.tokenizer or words.transformer):
        raise ValueError("--back writes released files and reads none; leave out --tokenizer and --transformer")
    if words.back:
        for path in FlexVARPipeline.from_pretrained(words.back).save_released(words.out, overwrite=words.overwrite):
            print(path)
        return
    if not (words.tokenizer and words.transformer):
        raise ValueError("give both released files, --tokenizer and --transformer, or --back MODEL")
    pipe = FlexVARPipeline.from_released(words.tokenizer, words.transformer)
    pipe.save_pretrained(words.out, overwrite=words.overwrite)
    print(words.out)


def run_data(words: Words) -> None:
    from flexvar.data import EmojiScenes, Shapes, write_pictures

    if words.count < 1:
        raise ValueError(f"--count is {words.count}; it must be at least 1")
    source = Shapes(views=words.count) if words.kind == "shapes" else EmojiScenes(words.classes, words.font, views=words.count)
    size = (words.height, words.width)
    count = write_pictures(source, words.out, count_per_class=words.count, size=size, seed=words.seed, overwrite=words.overwrite)
    print(f"{words.out}: {count} pictures of {len(source.class_names)} classes")


def run_info(words: Words) -> None:
    from flexvar.checkpoint import load
    from flexvar.models import model_folder

    model = load(model_folder(words.model))
    for name, network in (("tokenizer", model.tokenizer), ("transformer", model.transformer)):
        if network is None:
            print(f"{name}: none yet")
            continue
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(f"{name}: {millions:.2f} M parameters")
        print(f"  {network.config}")
    print(f"defaults: {model.defaults}")
    print("provenance:")
    for line in json.dumps(dict(model.provenance), indent=2, ensure_ascii=False).splitlines()[1:-1]:
        print(line)
    print(f"classes ({len(model.class_names)}): {', '.join(model.class_names)}")


def run_plan(words: Words) -> None:
    import torch

    from flexvar.accounting import plan
    from flexvar.checkpoint import load_configs
    from flexvar.models import model_folder
    from flexvar.schedule import Schedule
    from flexvar.tokenizer import TokenizerConfig
    from flexvar.transformer import TransformerConfig

    tokenizer, transformer = TokenizerConfig(), TransformerConfig(depth=words.depth)
    if words.model:
        tokenizer, transformer = load_configs(model_folder(words.model))
    schedule = (
        Schedule.parse(words.schedule)
        if words.schedule
        else Schedule.for_size(words.height, words.width, words.steps, tokenizer.downsample, transformer.trained_grid)
    )
    print(plan(transformer, tokenizer, schedule, batch=words.batch, guided=not words.no_guidance, dtype=getattr(torch, words.dtype)))


# -- what the commands share --


def _one_line(error: Exception) -> str:
    """What an error says, without the traceback that a data loader's process puts before it."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
    return " ".join(text.split())


def _device(name: str | None) -> Any:
    """The device asked for, or the accelerator, or the CPU; ValueError when there is none of that name."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here; give cpu, or leave --device out") from error
    return device


def _painted(step: Step) -> list[Image.Image]:
    from flexvar.sheet import to_pil

    return to_pil(step.images)


def _file_name(pipe: FlexVARPipeline, label: int) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in pipe.class_name(label))


def _refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists; choose another --out or --seed, or add --overwrite")


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)


def _save_picture(picture: Image.Image, path: Path, facts: dict[str, Any] | None = None) -> None:
    from PIL.PngImagePlugin import PngInfo

    from flexvar.writing import write_whole

    text = PngInfo()
    for name, value in (facts or {}).items():
        text.add_itxt(name, str(value))
    write_whole(path, lambda beside: picture.save(beside, "PNG", pnginfo=text))
