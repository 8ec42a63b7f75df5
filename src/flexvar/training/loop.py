"""The one training loop: steps, averaged weights, reports, sheets, checkpoints; stopped at any time, the same command goes on.

A workshop says what a loss is; the loop does the rest. Run it alone or under `torchrun`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from flexvar.checkpoint import Model, save
from flexvar.data.source import PictureSource
from flexvar.training.config import OptimiserConfig, RunConfig, write_config
from flexvar.training.order import Batch, Steps
from flexvar.writing import write_whole

STATE, LOG, CONFIG, MODEL, SHEETS = "state.pt", "log.jsonl", "config.yaml", "model", "sheets"


class Workshop(nn.Module):
    """What is trained: a module whose forward takes a batch and gives the loss and the figures to report."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The part whose weights are learnt, averaged and kept."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and figures by name, scalars or one a scale."""

    def after_step(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        """Runs when a step is done, for what is not learnt by gradients."""

    @abstractmethod
    def sheet(self, network: nn.Module, path: Path) -> None:
        """Draws a picture to look at, with the averaged weights."""

    @abstractmethod
    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        """The model to keep, with the averaged weights."""


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """Linear from 0.5 % over the warm-up, flat, then linear to the end (released code; paper, section 4.1)."""
    progress = step / steps
    if progress < config.warm_up:
        return config.learning_rate * (0.005 + 0.995 * progress / config.warm_up)
    decline = max(0.0, (progress - config.warm_up - config.flat) / max(1e-9, 1 - config.warm_up - config.flat))
    return config.learning_rate * (1 - (1 - config.end) * min(1.0, decline))


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that decay, and those that do not: anything with one axis, and what a network names in `WITHOUT_DECAY`."""
    named: set[str] = set()
    for prefix, module in network.named_modules():
        named |= {f"{prefix}.{name}".lstrip(".") for name in getattr(module, "WITHOUT_DECAY", ())}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (others if parameter.ndim <= 1 or name in named else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def pick_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Joins the other processes when started by `torchrun`; gives (rank, number of processes)."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def train(workshop: Workshop, source: PictureSource, config: RunConfig, *, rank: int, world: int, device: torch.device) -> Path:
    """Trains until `config.steps`; gives the model folder. Goes on from the run folder's checkpoint when there is one."""
    return _Run(workshop, source, config, rank, world, device).train()


class _Run:
    """The state of one run on one process."""

    def __init__(self, workshop: Workshop, source: PictureSource, config: RunConfig, rank: int, world: int, device: torch.device) -> None:
        self.config, self.rank, self.device, self.folder = config, rank, device, Path(config.run)
        self.workshop = workshop.to(device)
        self.network = workshop.network
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.network, config.optimiser.weight_decay),
            lr=config.optimiser.learning_rate,
            betas=(config.optimiser.betas[0], config.optimiser.betas[1]),
        )
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.data = Steps(source, config.seed, config.batch, config.sizes, rank, world)
        self.step = 0
        self.seconds = 0.0  # spent training, over all pieces of the run
        self.stopping = False
        self._resume()
        self.wrapped = DistributedDataParallel(self.workshop) if world > 1 else self.workshop

    def train(self) -> Path:
        if self.step >= self.config.steps:
            self._say(f"{self.folder} is finished ({self.step} steps); raise steps= to go on")
            return self.folder / MODEL
        workers = self.config.workers
        loader = DataLoader(
            self.data, batch_size=None, sampler=range(self.step, self.config.steps), num_workers=workers,
            persistent_workers=workers > 0, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None if self.rank == 0 else True)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run(iter(loader), bar)
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        unreadable = getattr(self.data.source, "unreadable", [])
        if unreadable:
            names = ", ".join(path.name for path in unreadable[:3])
            self._say(f"{len(unreadable)} pictures could not be read and were skipped: {names}{' ...' if len(unreadable) > 3 else ''}")
        if self.stopping:
            self._say(f"stopped at step {self.step} and saved; the same command goes on")
            raise KeyboardInterrupt
        return self.folder / MODEL

    def _run(self, batches: Iterator[Batch], bar: tqdm[Any]) -> None:
        config, began, pictures = self.config, time.perf_counter(), 0
        rates: list[tuple[int, float]] = []  # pictures and seconds since the last report
        self.workshop.train()
        for batch in batches:
            loss, figures, norm, rate = self._one(batch.to(self.device))
            self.step += 1
            pictures += config.batch
            bar.update()
            last = self.step == config.steps or self._all_stopping()
            reporting, saving = (last or self.step % every == 0 for every in (config.report_every, config.save_every))
            if reporting or saving:
                for figure in (loss, *figures.values()):
                    self._average_over_processes(figure)
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {self.step}; lower the learning rate, the last checkpoint is whole"
                    )
                passed, began = time.perf_counter() - began, time.perf_counter()
                self.seconds += passed
                rates.append((pictures, passed))
                pictures = 0
            if reporting:
                report: dict[str, Any] = {"step": self.step, "loss": loss.item(), "gradient_norm": norm, "learning_rate": rate}
                report |= {name: value.tolist() for name, value in figures.items()}
                drawn, took = (sum(column) for column in zip(*rates, strict=True))
                report |= {"pictures_per_second": drawn / took, "seconds": self.seconds}
                self._report(report)
                rates.clear()
            if saving:
                self._save()
                began = time.perf_counter()
            if self.rank == 0 and (self.step % config.sheet_every == 0 or self.step == config.steps):
                (self.folder / SHEETS).mkdir(exist_ok=True)
                self.workshop.sheet(self.average, self.folder / SHEETS / f"step-{self.step:07d}.png")
            if last:
                return

    def _one(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], float, float]:
        """One step of the optimiser and of the average."""
        options = self.config.optimiser
        rate = learning_rate(self.step, self.config.steps, options)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, figures = self.wrapped(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), options.clip or math.inf)
        self.optimiser.step()
        self.workshop.after_step(self.step + 1, self.optimiser)
        decay = min(options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.detach(), figures, norm.item(), rate

    @staticmethod
    def _average_over_processes(figure: Tensor) -> None:
        if dist.is_initialized() and figure.is_floating_point():
            dist.all_reduce(figure)
            figure /= dist.get_world_size()

    # -- what lies in the run folder --

    def _save(self) -> None:
        workshop = self.workshop.state_dict()  # on all processes, as some of it may be gathered from them
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "workshop": workshop,
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_whole(self.folder / STATE, lambda path: torch.save(state, path))
        provenance = {
            "trained": {"steps": self.step, "pictures": self.step * self.config.batch, "seconds": round(self.seconds)},
            "config": OmegaConf.to_container(OmegaConf.structured(self.config)),
        }
        save(self.workshop.finished(self.average, provenance), self.folder / MODEL, overwrite=True)

    def _resume(self) -> None:
        path = self.folder / STATE
        if path.is_file():
            self._load(path)
        if self.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / LOG).is_file():  # what was reported after the checkpoint will be reported again
            lines = [line for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines() if self._reported(line)]
            write_whole(self.folder / LOG, lambda path: path.write_text("".join(line + "\n" for line in lines), encoding="utf-8"))
        changed = write_config(self.config, self.folder / CONFIG)
        if changed and self.step:
            self._say(f"{self.folder} goes on at step {self.step} with other settings than before: {', '.join(changed)}")

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises anything on damaged files
            raise ValueError(f"{path} is damaged; remove it to begin anew, or choose another run= folder") from error
        try:
            self.workshop.load_state_dict(state["workshop"])
        except RuntimeError as error:
            raise ValueError(f"{path} is of another model than the config; choose another run= folder") from error
        self.average.load_state_dict(state["average"])
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, settings in zip(self.optimiser.param_groups, groups, strict=True):
            group.update(settings)  # the config's settings, not those of the checkpoint
        self.step, self.seconds = state["step"], state["seconds"]

    def _reported(self, line: str) -> bool:
        """Whether a line of the log is whole and from before the checkpoint."""
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except (json.JSONDecodeError, KeyError, TypeError):
            return False

    def _report(self, report: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        short = {name: f"{value:.4g}" for name, value in report.items() if isinstance(value, float | int) and name != "seconds"}
        tqdm.write("  ".join(f"{name} {value}" for name, value in short.items()))

    def _say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def _stop(self, *_: Any) -> None:
        self.stopping = True  # the step in hand is finished and saved first

    def _all_stopping(self) -> bool:
        """Whether any process was asked to stop: then all of them do, after the same step."""
        if dist.is_initialized():
            flag = torch.tensor(int(self.stopping), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.stopping = bool(flag.item())
        return self.stopping
