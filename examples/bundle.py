"""Ships a trained model: `python -m examples.bundle RUN/model OUT_FOLDER`. Half the size; data, licence, machine and trainings named."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexvar.checkpoint import load, save
from flexvar.data import aliases_of

ABOUT = {
    "about": "48 well-known emoji on plain backgrounds, drawn scale by scale; trained from random weights with `flexvar train`",
    "data": "scenes composed from Noto Color Emoji (c) Google, SIL Open Font License 1.1, as `flexvar data emoji` draws them",
    "licence": "MIT for the weights; the emoji they can redraw are under the SIL Open Font License 1.1",
    "machine": "2 CPU cores (AMD EPYC), no GPU; the cores were shared with other work, so `seconds` is an upper bound",
}


def with_earlier_runs(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says of itself, and beside its transformer's run those that this one began from, the first one first."""
    if "earlier runs of the transformer" in provenance:
        return dict(provenance)
    earlier: list[Any] = []
    begun_from = provenance["transformer"]["config"]["init_from"]
    while begun_from:
        run = load(begun_from).provenance["transformer"]
        earlier.insert(0, run)
        begun_from = run["config"]["init_from"]
    return ({"earlier runs of the transformer": earlier} if earlier else {}) | dict(provenance)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Writes a trained model in bfloat16 with its provenance.")
    arguments.add_argument("model", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--overwrite", action="store_true")
    words = arguments.parse_args()
    model = load(words.model)
    provenance = ABOUT | with_earlier_runs(model.provenance) | ABOUT  # first in the file, whatever the tokenizer's folder said
    model = dataclasses.replace(model, provenance=provenance, aliases=aliases_of(model.class_names))
    save(model, words.out, dtype=torch.bfloat16, overwrite=words.overwrite)
    for path in sorted(words.out.iterdir()):
        print(f"{path}  {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
