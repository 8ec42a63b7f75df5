"""Pictures that a model draws to be measured: as many of each class, with seeds by position, so that any process can draw any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flexvar.evaluation.stored import AT_ONCE
from flexvar.models import model_folder
from flexvar.pipeline import FlexVARPipeline
from flexvar.schedule import Schedule
from flexvar.sheet import to_pil, to_uint8
from flexvar.writing import write_whole
from flexvar.zoo import MODEL_FILES, sha256


class DrawnPictures:
    """`per_class` pictures of each class: picture i is of class i % classes and has seed `seed` + i, wherever it is drawn.

    Neighbours are of different classes, so that every part of them is balanced; the splits of the Inception Score want that.
    settings: the keywords of `FlexVARPipeline.stream` for size, schedule, guidance and sampling. pngs: a folder that also gets each picture
    as a file, numbered from 0.
    """

    def __init__(
        self,
        pipe: FlexVARPipeline,
        name: str,
        per_class: int = 50,
        *,
        seed: int = 0,
        batch: int = AT_ONCE,
        pngs: Path | None = None,
        **settings: Any,
    ) -> None:
        if per_class < 1 or batch < 1:
            raise ValueError(f"{per_class} pictures of each class, {batch} at a time, cannot be drawn; give at least 1 of both")
        self.pipe, self.name, self.per_class, self.seed, self.batch, self.pngs = pipe, name, per_class, seed, batch, pngs
        classes, f = pipe.transformer.config.classes, pipe.tokenizer.config.downsample
        self._classes, self._settings = classes, settings
        self.caveats: list[str] = []
        self.schedule: Schedule = pipe.schedule_of(
            settings.get("height"), settings.get("width"), settings.get("num_inference_steps"), settings.get("schedule")
        )
        self.size = self.schedule[-1][0] * f, self.schedule[-1][1] * f
        self.class_counts: Mapping[str, int] = {pipe.class_name(label): per_class for label in range(classes)}
        # Complains of wrong settings now, before anything is drawn.
        self._guidance, self._sampling = pipe.guidance_of(**settings), pipe.sampling_of(**settings)

    def __len__(self) -> int:
        return self.per_class * self._classes

    def batches(self, part: range) -> Iterator[Tensor]:
        for start in range(part.start, part.stop, self.batch):
            places = range(start, min(start + self.batch, part.stop))
            labels, seeds = [place % self._classes for place in places], [self.seed + place for place in places]
            *_, last = self.pipe.stream(labels, seed=seeds, **self._settings)
            images = last.images
            if not images.isfinite().all():
                raise ValueError(f"{self.name} drew pictures that are not finite; check its weights, or draw with --dtype float32")
            if self.pngs is not None:
                self._save(images, places)
            yield to_uint8(images).cpu()

    def about(self) -> dict[str, Any]:
        folder = model_folder(self.name)
        weight = self.pipe.transformer.head.weight
        return {
            "model": self.name,
            "sha256": {file: sha256(folder / file) for file in MODEL_FILES},
            "size": list(self.size),
            "schedule": str(self.schedule),
            "guidance": str(self._guidance),
            "sampling": str(self._sampling),
            "pictures of each class": self.per_class,
            "classes": self._classes,
            "seeds": [self.seed, self.seed + len(self) - 1],
            "dtype": str(weight.dtype).removeprefix("torch."),
        }

    def _save(self, images: Tensor, places: range) -> None:
        assert self.pngs is not None
        self.pngs.mkdir(parents=True, exist_ok=True)
        for place, picture in zip(places, to_pil(images), strict=True):
            write_whole(self.pngs / f"{place:06d}.png", partial(picture.save, format="PNG"))
