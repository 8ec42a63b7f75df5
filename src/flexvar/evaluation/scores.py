"""Scores of pictures against a reference, what keeps them from being compared with published ones, and the report that says both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexvar.evaluation.extractors import Extractor, Features
from flexvar.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
)
from flexvar.evaluation.references import Reference, check_widths, moments_of
from flexvar.evaluation.report import FORMAT, PUBLISHED_COUNT, machine, write_json
from flexvar.evaluation.stored import PictureSet

FEWEST = 10  # pictures, below which nothing is worth computing
BLOCKS, FEWEST_BLOCKS = 20, 5  # of which intervals leave out one after the other

METHOD: dict[str, Any] = {
    "inception score split": 5000,
    "precision and recall k": 3,
    "density and coverage k": 5,
    "kid": {"subsets": 100, "size": 1000, "seed": 0},
}
"""What the numbers of a report follow from beside the features."""

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "density": "density",
    "coverage": "coverage",
}
"""The scores in the order of a report, by their names in the JSON."""


@dataclass(frozen=True)
class Report:
    """Scores, and everything that determines them. A score that could not be had is missing."""

    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95 %
    caveats: list[str]  # empty: the scores can be compared with published ones
    notes: list[str]
    samples: Mapping[str, Any]
    reference: Mapping[str, Any]
    extractor: Mapping[str, Any]
    machine: Mapping[str, str]

    @property
    def comparable(self) -> bool:
        """Whether these scores may stand beside published ones of the same reference."""
        return not self.caveats

    def write(self, path: Path) -> None:
        """Writes the JSON; it appears when it is complete."""
        write_json(path, {"format": FORMAT, "comparable with published scores": self.comparable, **vars(self), "method": METHOD})

    def table(self) -> str:
        """The scores to be read, each on a line, and what must be known with them."""
        lines = [f"{NAMES[name]:<16} {_figure(value)}{_interval(self.intervals.get(name))}" for name, value in self.scores.items()]
        lines.append(f"{self.samples['count']} pictures, against {self.reference['name']}, by {self.extractor['name']}")
        lines.append("comparable with published scores" if self.comparable else "NOT comparable with published scores:")
        lines += [f"  - {caveat}" for caveat in self.caveats]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def score(pictures: PictureSet, features: Features, reference: Reference, extractor: Extractor, *, intervals: bool = False) -> Report:
    """All scores that pictures' features, a reference and an extractor allow.

    intervals: also 95 % intervals of FID and sFID, by up to 20 further Fréchet distances each.
    Raises ValueError for fewer than 10 pictures, and for a reference whose pictures have another size.
    """
    check(pictures, reference)
    count, dimensions = features.pool.shape
    (height, width), counts = pictures.size, None if pictures.labels is None else dict(Counter(pictures.labels))
    return Report(
        scores=_scores(features, reference),
        intervals=_intervals(pictures.labels, features, reference) if intervals else {},
        caveats=[*caveats(pictures, features, extractor), *reference.caveats],
        notes=_notes(pictures, dimensions),
        samples={**pictures.about, "count": count, "height": height, "width": width, "class counts": counts},
        reference={
            "name": reference.name,
            "sha256": reference.sha256,
            "pictures": None if reference.pool is None else len(reference.pool),
            "stored moments": list(reference.stored),  # others were made of its pictures
        },
        extractor={"name": extractor.name, "sha256": extractor.sha256, "features": dimensions},
        machine=machine(extractor.device),
    )


def check_all(pictures: PictureSet, reference: Reference, extractor: Extractor) -> None:
    """Raises ValueError, before anything is drawn, for what `score` would not take, and for a reference of another extractor."""
    check(pictures, reference)
    moments = {"pool": reference.moments} | ({} if reference.spatial is None else {"spatial": reference.spatial})
    check_widths(reference.name, moments, extractor, pictures.size)


def check(pictures: PictureSet, reference: Reference) -> None:
    """Raises ValueError for too few pictures, and where they and the reference have different sizes."""
    if len(pictures) < FEWEST:
        raise ValueError(
            f"{len(pictures)} pictures are too few to be scored; give at least {FEWEST}, and {PUBLISHED_COUNT:,} to be comparable"
        )
    if reference.size not in (None, pictures.size):
        (height, width), (other_height, other_width) = pictures.size, reference.size
        raise ValueError(
            f"the pictures are {height} x {width} px, those of the reference {other_height} x {other_width}; "
            "take a reference of the pictures' size, or draw at the reference's"
        )


def caveats(pictures: PictureSet, features: Features, extractor: Extractor) -> list[str]:
    """Why scores may not be compared with published ones, one line each."""
    found = list(pictures.caveats)
    if len(pictures) != PUBLISHED_COUNT:
        found.append(f"{len(pictures):,} pictures instead of {PUBLISHED_COUNT:,}; FID depends on the number")
    if pictures.labels is not None:
        counts = Counter(pictures.labels).values()
        if min(counts) != max(counts):
            found.append(f"unbalanced classes: {min(counts)} to {max(counts)} pictures of each")
        if _come_sorted(pictures.labels, METHOD["inception score split"]):
            found.append("the pictures come class by class, and the Inception Score splits them in their order; shuffle them")
    if not extractor.published:
        found.append(f"the features are those of {extractor.name}, not of the Inception network behind published scores")
    copies = len(features.pool) - len({hash(row.tobytes()) for row in features.pool.numpy()})
    if copies:
        found.append(f"{copies} pictures are copies of others; were seeds repeated?")
    return found


def _come_sorted(labels: Sequence[str], split: int) -> bool:
    """Whether a whole split holds less than half of the classes that it could."""
    could = min(split, len(set(labels)))
    splits = (labels[start : start + split] for start in range(0, len(labels) - split + 1, split))
    return any(2 * len(set(part)) < could for part in splits)


def _scores(features: Features, reference: Reference) -> dict[str, float]:
    """By name, in the order of NAMES."""
    scores, made = {}, moments_of(features)
    scores["fid"] = frechet_distance(*made["pool"], *reference.moments)
    if "spatial" in made and reference.spatial is not None:
        scores["sfid"] = frechet_distance(*made["spatial"], *reference.spatial)
    if features.logits is not None:
        scores["inception_score"] = inception_score(features.logits, METHOD["inception score split"])
    if reference.pool is not None and len(reference.pool) >= FEWEST:
        both = reference.pool, features.pool
        scores["precision"], scores["recall"] = precision_recall(*both, METHOD["precision and recall k"])
        scores["kid"], _ = kernel_distance(*both, **METHOD["kid"])
        scores["density"], scores["coverage"] = density_coverage(*both, METHOD["density and coverage k"])
    return {name: scores[name] for name in NAMES if name in scores}


def _intervals(labels: Sequence[str] | None, features: Features, reference: Reference) -> dict[str, tuple[float, float]]:
    """Those of FID and sFID, from blocks with the same classes where these are known and there are enough of each."""
    count = len(features.pool)
    least = min(Counter(labels).values()) if labels is not None else 0
    if labels is not None and least >= FEWEST_BLOCKS:
        order, blocks = sorted(range(count), key=labels.__getitem__), min(BLOCKS, least, count // 2)
    else:
        chance = torch.Generator().manual_seed(0)
        order, blocks = torch.randperm(count, generator=chance, device="cpu").tolist(), min(BLOCKS, count // 2)
    found = {"fid": frechet_interval(features.pool[order], *reference.moments, blocks)}
    if features.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_interval(features.spatial[order], *reference.spatial, blocks)
    return found


def _notes(pictures: PictureSet, dimensions: int) -> list[str]:
    """What a reader should know of the pictures, one line each."""
    found = []
    if len(pictures) <= dimensions:
        found.append(
            f"{len(pictures)} pictures span no more than {len(pictures) - 1} of {dimensions} feature dimensions: the covariance is "
            "singular, and FID is far above what more pictures would give"
        )
    if pictures.labels is None or len(set(pictures.labels)) == 1:
        found.append("the classes of the pictures are not known, so that their balance and order could not be checked")
    return found


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"  (95 %: {_figure(interval[0])} to {_figure(interval[1])})"
