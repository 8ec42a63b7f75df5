"""What a tokenizer loses and how it uses its codes, at every scale and several picture sizes, and the report that says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexvar.checkpoint import TOKENIZER, Model, load
from flexvar.evaluation.extractors import Extractor
from flexvar.evaluation.lpips import LPIPS, load_lpips
from flexvar.evaluation.lpips import SMALLEST as SMALLEST_FOR_LPIPS
from flexvar.evaluation.metrics import RunningMoments, frechet_distance
from flexvar.evaluation.reconstruction import ScaleQuality, rebuilt_by_scale, unmeasured, use_of_all
from flexvar.evaluation.report import FORMAT, PUBLISHED_COUNT, machine, write_json
from flexvar.evaluation.stored import PictureSet, chosen, open_pictures
from flexvar.models import model_folder
from flexvar.processes import without_tf32
from flexvar.progress import progress
from flexvar.schedule import Schedule, ScheduleLike, Size, parse_sizes
from flexvar.settings import Settings
from flexvar.sheet import to_uint8
from flexvar.tokenizer import Tokenizer
from flexvar.zoo import sha256

SMALLEST_FOR_RFID = 32  # px; extractors enlarge what they are given, and of fewer pixels they would see little but that

COLUMNS = (
    ("rFID", "rfid", ".3f"),
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".4f"),
    ("L1", "l1", ".4f"),
    ("LPIPS", "lpips", ".4f"),
    ("in use", "use", ".1%"),
    ("perplexity", "perplexity", ".1f"),
)
"""Of the table: title, name in the JSON, format."""


@dataclass(frozen=True)
class TokenizerReport:
    """The quality of every scale at every size, and everything that determines it."""

    tokenizer: Mapping[str, Any]
    pictures: Mapping[str, Any]
    sizes: Mapping[Size, list[ScaleQuality]]  # by (height, width) in pixels
    extractor: Mapping[str, Any] | None  # None: no rFID was asked for
    lpips: Mapping[str, Any] | None
    caveats: list[str]  # what keeps the rFIDs from being compared with published ones
    machine: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Writes the JSON; it appears when it is complete."""
        sizes = [
            {
                "height": height,
                "width": width,
                "use of all scales": use_of_all(scales),
                "scales": [{"codes": list(scale.size), **scale.means()} for scale in scales],
            }
            for (height, width), scales in self.sizes.items()
        ]
        write_json(path, {"format": FORMAT, **vars(self), "sizes": sizes})

    def table(self) -> str:
        """For each size a table with a row for each scale, and what must be known with it."""
        lines = []
        for (height, width), scales in self.sizes.items():
            total = f"all scales together use {use_of_all(scales):.1%} of {self.tokenizer['codebook size']} codes"
            lines += [f"{height} x {width} px: {total}", *self._rows(scales), ""]
        judge = "" if self.extractor is None else f", rFID by {self.extractor['name']}"
        what = f"{self.pictures['count']} pictures of {self.pictures['pictures']}"
        lines.append(f"{what}, through the tokenizer of {self.tokenizer['model']}{judge}")
        lines += ["rFID is NOT comparable with published scores:"] if self.caveats else []
        lines += [f"  - {caveat}" for caveat in self.caveats]
        return "\n".join(lines)

    def _rows(self, scales: Sequence[ScaleQuality]) -> list[str]:
        """The lines of one size's table."""
        unasked = {name for name, asked in (("rfid", self.extractor), ("lpips", self.lpips)) if asked is None}
        columns = [column for column in COLUMNS if column[1] not in unasked]
        rows = [["codes", "pixels", *(title for title, *_ in columns)]]
        for scale in scales:
            (h, w), f, means = scale.size, self.tokenizer["downsampling"], scale.means()
            figures = [format(means[name], figure) if name in means else "-" for _, name, figure in columns]
            rows.append([f"{h} x {w}", f"{h * f} x {w * f}", *figures])
        widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


@without_tf32()
def evaluate_tokenizer(
    name: str | Path,
    data: Path | str,
    *,
    sizes: Sequence[Size] | None = None,
    steps: int | None = None,
    schedule: ScheduleLike | None = None,
    count: int | None = None,
    batch: int = 16,
    extractor: Extractor | None = None,
    lpips: tuple[Path, Path] | None = None,
    device: torch.device | str = "cpu",
) -> TokenizerReport:
    """Rebuilds the pictures of a folder or an .npz from their codes at every scale that a drawing of their size has, and compares.

    name: as of `flexvar.models.model_folder`; a tokenizer alone will do. sizes: (height, width) in pixels, to which the pictures of a
    folder are resized and cropped; by default the model's own, and of an .npz the pictures'. steps, schedule: other scales than the
    model's. count: so many pictures, evenly chosen. batch: pictures at the same time; it changes memory and speed.
    extractor: whose features rFID compares; None leaves rFID out, as it is for scales below 32 px. lpips: the files of `load_lpips`.
    Raises FileNotFoundError or ValueError, in one line, for what is missing, damaged or impossible.
    """
    for what, number in (("count", count), ("batch", batch)):
        if number is not None and number < 1:
            raise ValueError(f"{what} is {number}; give at least 1")
    folder = model_folder(name)
    model = load(folder)
    tokenizer = model.tokenizer.to(device)
    if not all(weight.isfinite().all() for weight in tokenizer.parameters()):
        raise ValueError(f"the tokenizer of {name} has weights that are not finite; copy, fetch or train it again")
    sets = [open_pictures(data, size) for size in _sizes(model, data, sizes, schedule)]
    settings = Settings(model)
    schedules = [settings.schedule_of(*pictures.size, steps, schedule) for pictures in sets]  # complains of all before any work
    places = chosen(sets[0], len(sets[0]) if count is None else count)
    if extractor is not None and len(places) < 2:
        raise ValueError("rFID cannot be had of a single picture; give more, or leave it out with --extractor none")
    perceptual = None if lpips is None else load_lpips(*lpips).to(device)
    measured = {
        pictures.size: _quality(tokenizer, pictures, places, own, batch, extractor, perceptual)
        for pictures, own in zip(sets, schedules, strict=True)
    }
    config, about = tokenizer.config, sets[0].about
    return TokenizerReport(
        tokenizer={
            "model": str(name),
            "sha256": sha256(folder / TOKENIZER),
            "downsampling": config.downsample,
            "codebook size": config.codebook_size,
        },
        pictures={"pictures": about["pictures"], "sha256": about["sha256"], "count": len(places), "pictures at a time": batch},
        sizes=measured,
        extractor=None if extractor is None else {"name": extractor.name, "sha256": extractor.sha256},
        lpips=None if lpips is None else {"vgg sha256": sha256(lpips[0]), "linear sha256": sha256(lpips[1])},
        caveats=[] if extractor is None else _caveats(extractor, len(places)),
        machine=machine(torch.device(device)),
    )


def size_of(text: str) -> Size:
    """(height, width) as people type it: 256, or 384x512. ValueError for anything else."""
    try:
        (size,) = parse_sizes(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a size; write pixels as 256, or height x width as 384x512") from error
    return size


def _sizes(model: Model, data: Path | str, asked: Sequence[Size] | None, schedule: ScheduleLike | None) -> Sequence[Size | None]:
    """The sizes to open the data at; None is the pictures' own."""
    if asked is not None:
        return list(dict.fromkeys(asked))
    if Path(data).is_file():
        return [None]
    if schedule is not None:
        (h, w), f = Schedule.of(schedule)[-1], model.tokenizer.config.downsample
        return [(h * f, w * f)]
    return [(model.defaults.height, model.defaults.width)]


def _quality(
    tokenizer: Tokenizer,
    pictures: PictureSet,
    places: Sequence[int],
    schedule: Schedule,
    batch: int,
    extractor: Extractor | None,
    perceptual: LPIPS | None,
) -> list[ScaleQuality]:
    """The quality of every scale of a schedule, over the pictures at some places."""
    scales, device = unmeasured(schedule, tokenizer.config.codebook_size), tokenizer.quantizer.codebook.device
    moments = [(RunningMoments(), RunningMoments()) for _ in schedule]  # of what is rebuilt and of what should be
    parts = [places[start : start + batch] for start in range(0, len(places), batch)]
    height, width = pictures.size
    for part in progress(parts, f"{height} x {width} px, {batch} pictures at a time"):
        images = _read(pictures, part).to(device).float() / 127.5 - 1  # (B, 3, H, W)
        for scale, of_scale, (codes, rebuilt, target) in zip(scales, moments, rebuilt_by_scale(tokenizer, images, schedule), strict=True):
            if not rebuilt.isfinite().all():
                raise ValueError("the tokenizer rebuilds pictures that are not finite; check its weights")
            scale.add(codes, rebuilt, target)
            shorter = min(target.shape[-2:])
            if perceptual is not None and shorter >= SMALLEST_FOR_LPIPS:
                scale.lpips += perceptual(rebuilt.clamp(-1, 1), target).tolist()
            if extractor is not None and shorter >= SMALLEST_FOR_RFID:
                for side, shown in zip(of_scale, (rebuilt, target), strict=True):
                    side.add(extractor(to_uint8(shown)).pool)
    for scale, (ours, theirs) in zip(scales, moments, strict=True):
        scale.rfid = frechet_distance(*ours.moments(), *theirs.moments()) if ours.count else None
    return scales


def _read(pictures: PictureSet, places: Sequence[int]) -> Tensor:
    """The pictures at some places in growing order: uint8 (B, 3, H, W)."""
    return torch.cat([batch for place in places for batch in pictures.batches(range(place, place + 1))])


def _caveats(extractor: Extractor, count: int) -> list[str]:
    """Why rFIDs may not be compared with published ones, one line each. JPEG is none: the pictures behind those are JPEG files."""
    found = [] if count == PUBLISHED_COUNT else [f"{count:,} pictures instead of {PUBLISHED_COUNT:,}; rFID depends on the number"]
    if not extractor.published:
        found.append(f"the features are those of {extractor.name}, not of the Inception network behind published scores")
    return found
