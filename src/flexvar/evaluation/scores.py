"""Scores of pictures against a reference, what keeps them from being compared with published ones, and the report that says both."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexvar.evaluation.extractors import Extractor, Features
from flexvar.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
)
from flexvar.evaluation.references import Reference, moments_of
from flexvar.evaluation.stored import PictureSet
from flexvar.writing import write_whole

FORMAT = 1
PUBLISHED_COUNT = 50_000  # pictures behind published scores
FEWEST = 10  # pictures, below which nothing is worth computing
BLOCKS = 20  # of which intervals leave out one after the other

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

    @property
    def comparable(self) -> bool:
        """Whether these scores may stand beside published ones of the same reference."""
        return not self.caveats

    def as_json(self) -> str:
        """The text of the report's file."""
        versions = {name: version(name) for name in ("flexvar", "torch", "numpy", "pillow")} | {"python": platform.python_version()}
        content = {"format": FORMAT, "comparable with published scores": self.comparable, **vars(self), "versions": versions}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes the JSON; it appears when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda beside: beside.write_text(self.as_json(), encoding="utf-8"))

    def table(self) -> str:
        """The scores to be read, each on a line, and what must be known with them."""
        lines = [f"{NAMES[name]:<16} {_figure(value)}{_interval(self.intervals.get(name))}" for name, value in self.scores.items()]
        lines.append(f"{self.samples['count']} pictures, against {self.reference['name']}, by {self.extractor['name']}")
        lines += [] if self.comparable else ["NOT comparable with published scores:"]
        lines += [f"  - {caveat}" for caveat in self.caveats]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def score(pictures: PictureSet, features: Features, reference: Reference, extractor: Extractor, *, intervals: bool = False) -> Report:
    """All scores that pictures' features, a reference and an extractor allow.

    intervals: also 95 % intervals of FID and sFID, by 20 further Frechet distances each.
    Raises ValueError for fewer than 10 pictures, and for a reference whose pictures have another size.
    """
    count, dimensions = features.pool.shape
    if count < FEWEST:
        raise ValueError(f"{count} pictures are too few to be scored; give at least {FEWEST}, and {PUBLISHED_COUNT:,} to be comparable")
    check_sizes(pictures, reference)
    scores, reached = {}, {}
    made, theirs = moments_of(features), {"pool": reference.moments, "spatial": reference.spatial}
    for name, kind, own in (("fid", "pool", features.pool), ("sfid", "spatial", features.spatial)):
        against = theirs[kind]
        if own is None or against is None:
            continue
        if len(made[kind][0]) != len(against[0]):
            raise ValueError(
                f"{reference.name} is of {len(against[0])} features, {extractor.name} gives {len(made[kind][0])}; "
                "take the extractor that made it"
            )
        scores[name] = frechet_distance(*made[kind], *against)
        if intervals:
            reached[name] = frechet_interval(own, *against, blocks=min(BLOCKS, count // 2))
    if features.logits is not None:
        scores["inception_score"] = inception_score(features.logits)
    if reference.pool is not None and len(reference.pool) >= FEWEST:
        scores["precision"], scores["recall"] = precision_recall(reference.pool, features.pool)
        scores["kid"], _ = kernel_distance(reference.pool, features.pool)
        scores["density"], scores["coverage"] = density_coverage(reference.pool, features.pool)
    notes = list(reference.notes)
    if count <= dimensions:
        notes.append(
            f"{count} pictures span no more than {count - 1} of {dimensions} feature dimensions: the covariance is singular, "
            "and FID is far above what more pictures would give"
        )
    if pictures.class_counts is None:
        notes.append("the classes of the pictures are not known, so that their balance could not be checked")
    height, width = pictures.size
    samples = {**pictures.about(), "count": count, "height": height, "width": width, "class counts": pictures.class_counts}
    return Report(
        {name: scores[name] for name in NAMES if name in scores},
        reached,
        caveats(pictures, features, extractor),
        notes,
        samples,
        {"name": reference.name, "sha256": reference.sha256, "pictures": None if reference.pool is None else len(reference.pool)},
        {"name": extractor.name, "sha256": extractor.sha256, "features": dimensions},
    )


def check_sizes(pictures: PictureSet, reference: Reference) -> None:
    """Raises ValueError where pictures and reference have different sizes."""
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
    if pictures.class_counts is not None and len(set(pictures.class_counts.values())) > 1:
        least, most = min(pictures.class_counts.values()), max(pictures.class_counts.values())
        found.append(f"unbalanced classes: {least} to {most} pictures of each")
    if not extractor.published:
        found.append(f"the features are those of {extractor.name}, not of the Inception network behind published scores")
    copies = len(features.pool) - len({row.tobytes() for row in features.pool.numpy()})
    if copies:
        found.append(f"{copies} pictures are copies of others; were seeds repeated?")
    return found


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"  (95 %: {_figure(interval[0])} to {_figure(interval[1])})"
