"""Ships a trained model: `python -m examples.bundle RUN/model OUT_FOLDER`. Half the size, with its data, licence and machine named."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from flexvar.checkpoint import load, save
from flexvar.data import aliases_of

ABOUT = {
    "about": "48 well-known emoji on plain backgrounds, drawn scale by scale; trained from random weights with `flexvar train`",
    "data": "scenes composed from Noto Color Emoji (c) Google, SIL Open Font License 1.1, as `flexvar data emoji` draws them",
    "licence": "MIT for the weights; the emoji they can redraw are under the SIL Open Font License 1.1",
    "machine": "2 CPU cores (AMD EPYC), no GPU, float32; the cores were shared with other work, so `seconds` is an upper bound",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description="Writes a trained model in bfloat16 with its provenance.")
    arguments.add_argument("model", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--overwrite", action="store_true")
    words = arguments.parse_args()
    model = load(words.model)
    model = dataclasses.replace(model, provenance={**ABOUT, **model.provenance}, aliases=aliases_of(model.class_names))
    save(model, words.out, dtype=torch.bfloat16, overwrite=words.overwrite)
    for path in sorted(words.out.iterdir()):
        print(f"{path}  {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
