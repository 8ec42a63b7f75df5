"""Ships a trained model of emoji: `python -m examples.bundle RUN/model OUT_FOLDER [--tokenizer MODEL]`.

Half the size; data, licence, machine and trainings named.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from flexvar.checkpoint import load, save
from flexvar.data import aliases_of
from flexvar.models import model_folder
from flexvar.tokenizer.quantizer import same_codes

ABOUT = {
    "about": "48 well-known emoji on plain backgrounds, drawn scale by scale; trained from random weights with `flexvar train`",
    "data": "scenes composed from Noto Color Emoji (c) Google, SIL Open Font License 1.1, as `flexvar data emoji` draws them",
    "licence": "MIT for the weights; the emoji they can redraw are under the SIL Open Font License 1.1",
    "machine": "2 CPU cores (AMD EPYC), no GPU; the cores were shared with other work, so `seconds` is an upper bound",
}

EARLIER = "earlier runs of the {}"


def runs_of(part: str, name: str) -> list[Any]:
    """What a model says of the runs that made its "tokenizer" or "transformer", the first one first: those it began from, and its own."""
    provenance = load(model_folder(name)).provenance
    run, earlier = provenance[part], provenance.get(EARLIER.format(part))
    if earlier is None:
        begun_from = run["config"]["init_from"]
        earlier = runs_of(part, begun_from) if begun_from else []
    return [*earlier, run]


def all_runs(**models: str) -> dict[str, Any]:
    """For each part of a model, trained as the model of that name says: its own run, and those before."""
    told: dict[str, Any] = {}
    for part, name in models.items():
        *earlier, own = runs_of(part, name)
        told |= ({EARLIER.format(part): earlier} if earlier else {}) | {part: own}
    return told


def main() -> None:
    arguments = argparse.ArgumentParser(description="Writes a trained model in bfloat16 with its provenance.")
    arguments.add_argument("model", help="folder or name")
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--tokenizer", help="another model, whose tokenizer has the same codes and a decoder that learnt more")
    arguments.add_argument("--overwrite", action="store_true")
    words = arguments.parse_args()
    painted_by = words.tokenizer or words.model
    model, painter = load(model_folder(words.model)), load(model_folder(painted_by)).tokenizer
    if not same_codes(model.tokenizer.quantizer.codebook, painter.quantizer.codebook):
        arguments.error(f"{painted_by} has other codes than {words.model}; name a tokenizer that began from its own with learns=decoder")
    provenance = ABOUT | all_runs(tokenizer=painted_by, transformer=words.model)
    model = dataclasses.replace(model, tokenizer=painter, provenance=provenance, aliases=aliases_of(model.class_names))
    save(model, words.out, dtype=torch.bfloat16, overwrite=words.overwrite)
    for path in sorted(words.out.iterdir()):
        print(f"{path}  {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
