"""Quality against time over a grid of settings: which number of steps, which guidance, which sampling suit a model."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexvar.evaluation.drawn import DrawnPictures
from flexvar.evaluation.extractors import Extractor
from flexvar.evaluation.references import read_reference
from flexvar.evaluation.report import machine, read_json, write_json
from flexvar.evaluation.runner import evaluate
from flexvar.pipeline import FlexVARPipeline
from flexvar.writing import make_folder, write_whole

TIMED = 3  # batches
SWEPT = {
    "num_inference_steps": "steps",
    "schedule": "schedule",
    "guidance_scale": "guidance",
    "guidance_stop": "guided scales",
    "top_k": "top-k",
    "top_p": "top-p",
}
"""What may be swept, by the pipeline's keywords, and what a table calls it."""


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    settings: Mapping[str, Any]
    scales: int  # that were drawn: fewer than the steps asked for, where equal ones merge
    fid: float
    interval: tuple[float, float]  # 95 %
    seconds: float  # a picture, median of TIMED batches
    scores: Mapping[str, float]

    @property
    def name(self) -> str:
        """The settings in a few words."""
        return name_of(self.settings)


def sweep(
    pipe: FlexVARPipeline,
    model: str,
    grid: Mapping[str, Sequence[Any]],
    reference: Path | str,
    extractor: Extractor,
    out: Path,
    *,
    per_class: int = 5,
    seed: int = 0,
    batch: int = 50,
    overwrite: bool = False,
    **settings: Any,
) -> list[Trial]:
    """Scores a model at every point of a grid of settings, all with the same seeds; goes on where it was interrupted.

    grid: values by keyword of `FlexVARPipeline.stream`, those of SWEPT. out: a folder that gets a report a point.
    Raises ValueError for an empty grid or a wrong setting before anything is drawn, and FileExistsError where `out` holds trials of
    something else and `overwrite` is not set.
    """
    if not grid or not all(grid.values()):
        raise ValueError("nothing is to be swept; give values of one or more settings, such as --steps 6 8 10")
    if "num_inference_steps" in grid and "schedule" in grid:
        raise ValueError("steps and schedules cannot both be swept; give one of the two")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*(dict.fromkeys(values) for values in grid.values()))]
    pictures = [DrawnPictures(pipe, model, per_class, seed=seed, batch=batch, **settings, **point) for point in points]
    against = read_reference(reference, extractor)
    make_folder(out)
    for earlier in out.glob("*.trial*.json") if overwrite else ():
        earlier.unlink()
    trials = []
    for point, drawn in zip(points, pictures, strict=True):
        path = out / f"{re.sub('[^0-9a-z.-]+', '-', name_of(point))}.trial.json"
        of = {"samples": drawn.about, "reference": against.sha256, "extractor": extractor.sha256, "machine": machine(extractor.device)}
        if path.is_file():
            trials.append(_read(path, of))
            continue
        report = evaluate(drawn, against, extractor, path.with_suffix(".scores.json"), intervals=True, overwrite=True)
        assert report is not None  # there is one process
        trial = Trial(
            point, len(drawn.recipe.schedule), report.scores["fid"], report.intervals["fid"], _seconds_a_picture(drawn), report.scores
        )
        write_json(path, {"of": of, **asdict(trial)})
        trials.append(trial)
    return trials


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings in a few words: "steps 8, guidance 2.5"."""
    return ", ".join(f"{SWEPT[name]} {value}" for name, value in settings.items())


def best(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """The trial with the lowest FID, and the fastest one whose FID lies within that one's interval."""
    lowest = min(trials, key=lambda trial: trial.fid)
    return lowest, min((trial for trial in trials if trial.fid <= lowest.interval[1]), key=lambda trial: trial.seconds)


def table(trials: Sequence[Trial]) -> str:
    """The trials from the best FID to the worst, each on a line, and which to take."""
    names = [trial.name for trial in trials]
    width = max(map(len, names))
    titles = f"{'scales':>6}  {'FID':>8}  {'95 %':>17}  {'IS':>7}  {'precision':>9}  {'recall':>6}  {'s a picture':>11}"
    lines = [f"{'settings':<{width}}  {titles}"]
    for trial in sorted(trials, key=lambda trial: trial.fid):
        low, high = trial.interval
        others = [trial.scores.get(name, float("nan")) for name in ("inception_score", "precision", "recall")]
        lines.append(
            f"{trial.name:<{width}}  {trial.scales:>6}  {trial.fid:>8.3f}  {f'{low:.3f} to {high:.3f}':>17}  "
            f"{others[0]:>7.2f}  {others[1]:>9.3f}  {others[2]:>6.3f}  {trial.seconds:>11.4f}"
        )
    lowest, fastest = best(trials)
    lines += [f"lowest FID: {lowest.name}", f"fastest within its interval: {fastest.name}"]
    return "\n".join(lines)


def check_plotting() -> None:
    """ModuleNotFoundError, which says how to get it, without matplotlib: before long work rather than after it."""
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the plot needs matplotlib; install it with `pip install 'flexvar[plots]'`")


def plot(trials: Sequence[Trial], path: Path) -> None:
    """A picture of FID, with its interval, against seconds a picture: a line for each combination of the settings other than the steps.

    Raises ModuleNotFoundError as `check_plotting`.
    """
    check_plotting()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    speed = ("num_inference_steps", "schedule")
    rest = [tuple((name, value) for name, value in trial.settings.items() if name not in speed) for trial in trials]
    for group in dict.fromkeys(rest):
        own = [trial for trial, other in zip(trials, rest, strict=True) if other == group]
        errors = [[trial.fid - trial.interval[0] for trial in own], [trial.interval[1] - trial.fid for trial in own]]
        times, values = [trial.seconds for trial in own], [trial.fid for trial in own]
        axis.errorbar(times, values, errors, marker="o", capsize=3, label=name_of(dict(group)) or None)
        for trial in own:
            axis.annotate(str(trial.scales), (trial.seconds, trial.fid), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axis.set_title("at each point the number of scales", fontsize=10)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("seconds a picture")
    axis.set_ylabel("FID and its 95 % interval (lower is better)")
    axis.grid(alpha=0.3)
    if any(rest):
        axis.legend(fontsize=8)
    write_whole(path, lambda beside: figure.savefig(beside, dpi=100, format="png"))
    plt.close(figure)


def _read(path: Path, of: Mapping[str, Any]) -> Trial:
    """A trial of an earlier run. FileExistsError where it is of something else, ValueError where it is damaged."""
    content = read_json(path)
    if content.pop("of", None) != json.loads(json.dumps(of)):
        raise FileExistsError(f"{path} is of another model, reference or settings; choose another --out, or add --overwrite")
    try:
        return Trial(**{**content, "interval": tuple(content["interval"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the command again") from error


def _seconds_a_picture(drawn: DrawnPictures) -> float:
    """The median over a few batches, after one that warms up."""
    part, taken = range(min(drawn.batch, len(drawn))), []
    for _ in range(TIMED + 1):
        begun = time.perf_counter()
        for _batch in drawn.batches(part):  # on the CPU when it is handed over
            pass
        taken.append((time.perf_counter() - begun) / len(part))
    return statistics.median(taken[1:])
