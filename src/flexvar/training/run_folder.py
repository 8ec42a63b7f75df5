"""What lies in the folder of a run: checkpoints to go on from, the log, sheets, models. Nothing is ever half-written.

config.yaml             all settings, defaults included
log.jsonl               a line a report, a line a measurement, a line of scores
sheets/                 pictures to look at
scores/                 of a transformer, if it is told so: a report of FID and its kin
checkpoints/            step-0000500.pt and so on: the latest ones and the best one
model/  best/           the averaged weights of the latest and of the best checkpoint, ready for `flexvar sample`
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flexvar.checkpoint import Model, save
from flexvar.memory import is_out_of_memory
from flexvar.training.config import write_config
from flexvar.training.settings import RunConfig
from flexvar.writing import make_folder, write_whole

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


PATIENCE = 10.0  # seconds with the workers of a run that was killed, which end a moment after it


class RunFolder:
    """Reads and writes one run; only the first process writes."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.log, self.config, self.model, self.best = path / "log.jsonl", path / "config.yaml", path / "model", path / "best"
        self.sheets, self.scores, self.checkpoints = path / "sheets", path / "scores", path / "checkpoints"

    def newest(self) -> Path | None:
        """The checkpoint to go on from."""
        found = self._found()
        return found[-1] if found else None

    def read(self, path: Path, mapped: bool = False) -> dict[str, Any]:
        """A checkpoint's state. ValueError when the file is damaged.

        mapped: all processes of a machine share what they read, and none of it may be kept, since the file will be removed.
        """
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
        except Exception as error:  # torch raises anything on damaged files
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{path} is damaged; remove it to go on from the one before, or choose another run= folder") from error

    def begin(self, config: RunConfig, step: int) -> list[str]:
        """Readies the folder for going on at a step; names the settings that differ from those before.

        Of a finished run only the log is made whole. Raises FileExistsError where the folder holds what a run would replace, but no
        checkpoints: they were removed, or it is something else.
        """
        dear = [path for path in (self.model, self.best, self.log, self.config) if path.exists()]
        logged = max((line["step"] for line in self._lines()), default=0)  # a run that was killed before its first checkpoint goes on
        if step == 0 and dear and (not self.checkpoints.is_dir() or logged > config.save_every):
            raise FileExistsError(f"{dear[0]} is there, but no checkpoints to go on from; choose another run= folder, or move it away")
        for folder in (self.path, self.sheets, self.checkpoints):
            make_folder(folder)
        for folder in (self.path, self.sheets, self.checkpoints, self.scores, self.model, self.best):
            for left in folder.glob(".*.unfinished"):  # of a process that was killed while writing
                left.unlink()
        if self.log.is_file():  # what was reported after the checkpoint will be reported again
            text = "".join(json.dumps(line) + "\n" for line in self._lines() if line["step"] <= step)
            write_whole(self.log, lambda path: path.write_text(text, encoding="utf-8"))
        return write_config(config, self.config) if step < config.steps else []

    def write_checkpoint(self, step: int, state: dict[str, Any], best_step: int | None) -> None:
        """Writes a checkpoint, then removes those that are neither among the latest nor the best."""
        write_whole(self._checkpoint(step), lambda path: torch.save(state, path))
        latest = self._found()
        best = None if best_step is None else self._checkpoint(best_step)
        for path in latest[: -self.keep]:
            if path != best:
                path.unlink()

    def write_model(self, model: Model, is_best: bool) -> None:
        """Writes the model so far, and once more when it is the best one."""
        save(model, self.model, overwrite=True)
        if is_best:
            save(model, self.best, overwrite=True)

    def write_sheet(self, step: int, draw: Callable[[BinaryIO], Any]) -> None:
        """Lets `draw` write the sheet of a step; into memory, where what goes wrong is not taken for a full disk."""
        drawn = io.BytesIO()
        draw(drawn)
        write_whole(self.sheets / f"step-{step:07d}.png", lambda path: path.write_bytes(drawn.getvalue()))

    def report(self, line: dict[str, Any]) -> None:
        """Adds a line to the log; what is not finite is null in it. OSError, in one line, where it cannot be written."""
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.log} could not be written ({reason}); make room, and the same command goes on from its checkpoint"
            ) from error

    def has(self, what: str, step: int) -> bool:
        """Whether the log has a line of a step that tells this."""
        return any(line["step"] == step and what in line for line in self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Those of the log that are whole."""
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else ():
            with suppress(json.JSONDecodeError):
                read = json.loads(line)
                if isinstance(read, dict) and "step" in read:
                    yield read

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder, where the system can; ValueError, in one line, while one is in it."""
        make_folder(self.path)
        if fcntl is None:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            deadline = time.monotonic() + PATIENCE
            while not _locked(folder):
                if time.monotonic() > deadline:
                    raise ValueError(f"another training is writing into {self.path}; stop it, or choose another run= folder")
                time.sleep(0.1)
            try:
                yield
            finally:
                with suppress(OSError):  # a run that was refused before its first file leaves no folder
                    self.path.rmdir()
        finally:
            os.close(folder)

    def _found(self) -> list[Path]:
        """The checkpoints, by their steps."""
        return sorted(self.checkpoints.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:07d}.pt"


def _locked(folder: int) -> bool:
    """Whether an open folder is now this process's; False while it is another's."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _finite(value: Any) -> Any:
    """A report without the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
