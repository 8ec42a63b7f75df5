"""What the commands do that draw nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flexvar.cli.options import Words

if TYPE_CHECKING:
    import torch

    from flexvar.accounting import Plan


def run_train(words: Words) -> None:
    from flexvar.training.config import read_config
    from flexvar.training.settings import TokenizerRun, TransformerRun

    kind = TokenizerRun if words.stage == "tokenizer" else TransformerRun
    config = read_config(kind, words.config, words.settings)
    from flexvar.training.start import start  # torch comes with it, after the config is known to be right

    _print_once(start(config))  # type: ignore[arg-type]


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

    _print_once(cache_features(config, words.overwrite))


def _print_once(folder: Path) -> None:
    """Not by every process that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(folder)


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
    from flexvar.writing import write_whole_folder

    for name in ("count", "height", "width"):
        if getattr(words, name) < 1:
            raise ValueError(f"--{name} is {getattr(words, name)}; it must be at least 1")
    if words.seed < 0:
        raise ValueError(f"--seed is {words.seed}; it must be at least 0")
    _check_replaceable(words.out, words.overwrite)
    source = Shapes(views=words.count) if words.kind == "shapes" else EmojiScenes(words.classes, words.font, views=words.count)

    def write(folder: Path) -> int:
        return write_pictures(source, folder, count_per_class=words.count, size=(words.height, words.width), seed=words.seed)

    count = write_whole_folder(words.out, write)
    print(f"{words.out}: {count} pictures of {len(source.class_names)} classes")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless the folder is free, or a data set of ours that may be replaced as a whole."""
    from flexvar.writing import refuse_file

    refuse_file(out)
    if out.is_dir() and any(out.iterdir()):
        about = out / "README.txt"
        if not about.is_file() or "Source: flexvar" not in about.read_text(encoding="utf-8", errors="replace"):
            raise FileExistsError(f"{out} holds what `flexvar data` has not made, and does not remove; choose another folder")
        if not overwrite:
            raise FileExistsError(f"{out} holds a data set; choose another folder, or replace all of it with --overwrite")


def run_info(words: Words) -> None:
    from flexvar.checkpoint import load_empty
    from flexvar.counting import parameters_of
    from flexvar.models import model_folder

    model = load_empty(model_folder(words.model))
    for name, network in (("tokenizer", model.tokenizer), ("transformer", model.transformer)):
        if network is None:
            print(f"{name}: none yet")
            continue
        print(f"{name}: {parameters_of(network) / 1e6:.2f} M parameters")
        print(f"  {network.config}")
    print(f"defaults: {model.defaults}")
    print("provenance:")
    for line in json.dumps(dict(model.provenance), indent=2, ensure_ascii=False).splitlines()[1:-1]:
        print(line)
    print(f"classes ({len(model.class_names)}): {', '.join(model.class_names)}")
    if model.aliases:
        print(f"other names: {', '.join(f'{alias} ({name})' for alias, name in model.aliases.items())}")


def run_plan(words: Words) -> None:
    import torch

    from flexvar.accounting import plan
    from flexvar.checkpoint import Model, load_empty
    from flexvar.cli.drawing import device_of, dtype_of, kind_of
    from flexvar.models import model_folder
    from flexvar.schedule import Schedule
    from flexvar.settings import Settings
    from flexvar.tokenizer import Tokenizer, TokenizerConfig
    from flexvar.transformer import TransformerConfig

    if words.model:
        model = load_empty(model_folder(words.model))
        if model.transformer is None:
            raise ValueError(f"{words.model} holds a tokenizer only; train a transformer on it first")
        transformer = model.transformer.config
    else:
        with torch.device("meta"):
            model = Model(Tokenizer(TokenizerConfig()))  # with the defaults of the released models
        transformer = TransformerConfig(depth=16 if words.depth is None else words.depth)
    asked = None if words.schedule is None else Schedule.parse(words.schedule)
    schedule = Settings(model).schedule_of(words.height, words.width, words.steps, asked)
    if words.measure and words.split_guidance:
        raise ValueError("--measure draws with and without the class together; leave --split-guidance out, or --measure")
    device = device_of(words.device) if words.measure else None
    dtype = dtype_of(words.dtype, kind_of(words.device or "cpu") if device is None else device.type)
    guided, int8 = not words.no_guidance, words.dtype == "int8"
    how = {"guided": guided, "split": words.split_guidance, "dtype": dtype, "int8": int8}
    cost = plan(transformer, model.tokenizer.config, schedule, batch=words.batch, **how)
    print(cost, flush=True)
    if device is not None:
        _measure(cost, device)


def _measure(cost: Plan, device: torch.device) -> None:
    """Prints what drawing takes here. MemoryError, after the least that it could take, where there is no room for it."""
    from flexvar.measuring import Measured, measure_drawing, random_networks, rates_for
    from flexvar.memory import free_memory
    from flexvar.processes import keep_memory
    from flexvar.rates import MEMORY_TAKEN, device_name

    if device.type == "cpu":
        keep_memory()  # as every command that draws
    float32 = cost.memory.peak - cost.memory.transformer_weights + 4 * cost.transformer_parameters  # how weights are made
    needed, free = max(cost.memory.peak, float32) + MEMORY_TAKEN, free_memory(device)
    fits = free is None or needed <= free
    if fits:
        measured = measure_drawing(cost, *random_networks(cost, device))
    else:
        rates = rates_for(cost, device)
        measured = Measured(cost, device_name(device), rates, rates, ())
    print("", *measured.lines(), sep="\n")
    if not fits:
        room = f"takes {needed / 2**30:.1f} GiB where {(free or 0) / 2**30:.1f} are free"
        raise MemoryError(f"it was not drawn, which {room}; take smaller pictures or a smaller batch")
