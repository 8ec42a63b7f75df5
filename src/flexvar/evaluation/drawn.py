"""Pictures that a model draws to be measured: as many of each class, with seeds by position, so that any process can draw any of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from flexvar.arguments import seeds_of
from flexvar.evaluation.extraction import PIECE
from flexvar.evaluation.stored import AT_ONCE
from flexvar.models import model_folder
from flexvar.pipeline import FlexVARPipeline
from flexvar.sheet import to_uint8
from flexvar.zoo import MODEL_FILES, sha256


class DrawnPictures:
    """`per_class` pictures of each class: picture i is of class i % classes and has seed `seed` + i, wherever it is drawn.

    Without a seed, one is drawn. Neighbours are of different classes, so that every part of them is balanced; the splits of the Inception
    Score want that.
    pipe, name: a pipeline, and the name or folder from which it was loaded unchanged. settings: the keywords of `FlexVARPipeline.stream`
    for size, schedule, guidance and sampling.
    """

    def __init__(
        self, pipe: FlexVARPipeline, name: str, per_class: int = 50, *, seed: int | None = 0, batch: int = AT_ONCE, **settings: Any
    ) -> None:
        if per_class < 1 or batch < 1:
            raise ValueError(f"{per_class} pictures of each class, {batch} at a time, cannot be drawn; give at least 1 of both")
        self.pipe, self.name, self.per_class, self.batch = pipe, name, per_class, min(batch, PIECE)
        self._classes, self._settings = pipe.transformer.config.classes, settings
        self.caveats: list[str] = []
        self._seeds = seeds_of(seed, len(self))
        # Complains of wrong settings now, before anything is drawn.
        self.recipe = pipe.settings.recipe(**settings)
        if not all(weight.isfinite().all() for network in (pipe.tokenizer, pipe.transformer) for weight in network.parameters()):
            raise ValueError(f"{name} has weights that are not finite; copy, fetch or train it again")
        f = pipe.tokenizer.config.downsample
        self.size = self.recipe.schedule[-1][0] * f, self.recipe.schedule[-1][1] * f
        self.labels: list[str] | None = [pipe.class_name(place % self._classes) for place in range(len(self))]

    def __len__(self) -> int:
        return self.per_class * self._classes

    def batches(self, part: range) -> Iterator[Tensor]:
        for start in range(part.start, part.stop, self.batch):
            places = range(start, min(start + self.batch, part.stop))
            labels, seeds = [place % self._classes for place in places], [self._seeds[place] for place in places]
            *_, last = self.pipe.stream(labels, seed=seeds, **self._settings)
            try:
                images = last.images
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
            yield to_uint8(images).cpu()

    @cached_property
    def about(self) -> dict[str, Any]:
        folder = model_folder(self.name)
        return {
            "model": self.name,
            "sha256": {file: sha256(folder / file) for file in MODEL_FILES},
            "size": list(self.size),
            "schedule": str(self.recipe.schedule),
            "guidance": str(self.recipe.guidance),
            "sampling": str(self.recipe.sampling),
            "pictures of each class": self.per_class,
            "classes": self._classes,
            "seeds": [self._seeds[0], self._seeds[-1]],
            "dtype": self.pipe.precision,
            "compiled": "compiled" in self.pipe.made_faster,
        }
