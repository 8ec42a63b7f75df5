"""What the commands do that draw nothing."""

from __future__ import annotations

import argparse
import json

Words = argparse.Namespace


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
    if model.aliases:
        print(f"other names: {', '.join(f'{alias} ({name})' for alias, name in model.aliases.items())}")


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
