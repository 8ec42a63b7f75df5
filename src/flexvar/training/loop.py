"""The one training loop: steps, averaged weights, reports, measurements, sheets, checkpoints. The same command goes on where it stopped.

A workshop says what a loss is; the loop does the rest. Run it alone or under `torchrun`.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from flexvar.data.images import count_of_unreadable
from flexvar.memory import is_out_of_memory
from flexvar.processes import MOST_WORKERS, wait_for_all, world_size
from flexvar.rates import device_name, matrix_rate
from flexvar.training.meter import Meter, Work, nested, peak_memory
from flexvar.training.optimiser import learning_rate, parameter_groups, precision
from flexvar.training.order import Batch, shared
from flexvar.training.run_folder import RunFolder
from flexvar.training.settings import RunConfig
from flexvar.training.workshop import Workshop

ONCE = 5.0  # seconds within which several signals to stop are one

Batches = Callable[[int, int, int], "DataLoader[Batch]"]
"""The batches of this process from a step to another, and for a stream from a shard on: (first step, last step, first shard)."""


@dataclass(frozen=True)
class Data:
    """What a run learns from."""

    batches: Batches
    held_out: list[Batch]  # to measure on; empty on all processes but the first
    pictures: int = 0  # of an epoch; 0 where nobody knows
    class_names: tuple[str, ...] = ()  # of the labels, where these are learnt


def train(workshop: Workshop, data: Data, config: RunConfig, *, rank: int, world: int, device: torch.device) -> Path:
    """Trains until `config.steps`; gives the model folder. Goes on from the run folder's newest checkpoint when there is one."""
    return _Run(workshop, data, config, rank, world, device).train()


def _fetched(batches: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches; OSError, in one line, where a process that prepares them was killed."""
    try:
        yield from batches
    except RuntimeError as error:
        if not any(how in str(error) for how in ("is killed by signal", "exited unexpectedly")):
            raise  # what went wrong within a process is told as it is
        raise OSError(
            "a process that prepares pictures was killed, most likely for want of memory; "
            "set fewer workers=, or give the container more shared memory, and the same command goes on"
        ) from error


class _Run:
    """The state of one run on one process."""

    def __init__(self, workshop: Workshop, data: Data, config: RunConfig, rank: int, world: int, device: torch.device) -> None:
        self.share = shared(config.batch, world)
        if self.share % config.accumulate:
            what = f"a process's share of {self.share} pictures cannot be worked off in {config.accumulate} parts"
            raise ValueError(f"{what}; make it a multiple")
        self.config, self.rank, self.device = config, rank, device
        self.folder = RunFolder(Path(config.run), config.keep)
        self.workshop, self.network = workshop.to(device), workshop.network
        self.data = data
        self.dtype = precision(config.precision, device)
        self.made = {"device": device_name(device), "precision": str(self.dtype).removeprefix("torch."), "processes": world}
        self.optimiser = torch.optim.AdamW(
            parameter_groups(workshop, config.optimiser.weight_decay),
            lr=config.optimiser.learning_rate,
            betas=(config.optimiser.betas[0], config.optimiser.betas[1]),
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.meter, self.work, self.matrix_rate = Meter(), Work(), 0.0
        self.step = 0
        self.seconds = 0.0  # spent training, over all pieces of the run
        self.skipped = self.skipped_in_a_row = 0
        self.best: tuple[int, float] | None = None  # step and loss of the best measurement
        self.shards: dict[int, int] = {}  # of a stream: the shard that each lane is at
        self.first_shard = 0
        self.unreadable: set[str] = set()
        self.told_to_stop = 0.0  # when, by a signal to this process
        self.stopping = False  # all of them
        self._resume()
        self.first_step = self.step  # of this piece of the run
        workshop.speed_up()
        self.wrapped: nn.Module = self.workshop
        if world > 1:  # an adversary learns nothing until its first step
            self.wrapped = DistributedDataParallel(
                self.workshop,
                find_unused_parameters=workshop.adversary is not None,
                gradient_as_bucket_view=True,  # no second copy of all gradients
            )

    def train(self) -> Path:
        if self.step:
            self._score(again=False)  # the run may have been killed while it did
        if self.step >= self.config.steps:
            self._say(f"{self.folder.path} is finished ({self.step} steps); raise steps= to go on")
            return self.folder.model
        world = world_size()
        self._say(f"training on {self.device} in {self.made['precision']}, {world} process{'es' * (world > 1)}")
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None if self.rank == 0 else True)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._take_steps(_fetched(self.data.batches(self.step, self.config.steps, self.first_shard)), bar)
        except Exception as error:
            if not is_out_of_memory(error) or (type(error) is MemoryError and str(error)):  # one that explains itself
                raise
            raise MemoryError(
                f"not enough memory for {self.share} pictures in accumulate={self.config.accumulate} parts: take more, smaller sizes or, "
                "for a transformer, recompute=true; the same command goes on from its last checkpoint"
            ) from error
        finally:
            bar.close()
            self.wrapped = self.workshop  # with nothing that holds the group of processes, even where an error holds this run
            for number, handler in previous.items():
                signal.signal(number, handler)
        wait_for_all()  # for the first one, which is still saving, whatever comes next
        if self.unreadable:
            self._say(count_of_unreadable(self.unreadable))
        if self.skipped_in_a_row >= self.config.bad_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row had no finite gradient; step {self.step} is saved as it was before them: "
                "lower the learning rate, or ask for precision=fp32"
            )
        if self.stopping:
            self._say(f"stopped at step {self.step} and saved; the same command goes on")
            raise KeyboardInterrupt
        return self.folder.model

    def _take_steps(self, batches: Iterator[Batch], bar: tqdm[Any]) -> None:
        config, began, reported_at, seconds = self.config, time.perf_counter(), self.step, 0.0
        self.workshop.train()
        for batch in batches:
            norm, rate = self._take_step(batch)
            self.step += 1
            bar.update()
            self.shards[batch.lane] = batch.shard
            self.unreadable.update(batch.unreadable)
            last = self.step == config.steps or self.skipped_in_a_row >= config.bad_steps or self.stopping
            reporting, saving = (last or self.step % every == 0 for every in (config.report_every, config.save_every))
            if reporting or saving:
                averages = self.meter.averages() if reporting else {}  # waits for the device
                passed, began = time.perf_counter() - began, time.perf_counter()
                self.seconds, seconds = self.seconds + passed, seconds + passed
                self.unreadable = self._anywhere(self.unreadable)
            if reporting:
                figures: dict[str, Any] = {"loss": averages.pop("loss", None), "gradient_norm": norm, "learning_rate": rate}
                self._report(figures | nested(averages) | self._speed(self.step - reported_at, seconds))
                reported_at, seconds = self.step, 0.0
            if saving:
                self._save()
            if self.step % config.sheet_every == 0 or self.step == config.steps:
                paused = time.perf_counter()
                if self.rank == 0:
                    self.folder.write_sheet(self.step, partial(self.workshop.sheet, self.average))
                began += time.perf_counter() - paused
            if saving and not self.stopping:
                self._score()
            if reporting or saving:
                began = time.perf_counter()
            if last:
                return

    def _take_step(self, batch: Batch) -> tuple[float, float]:
        """One step of the optimiser and of the average; gives the norm of the gradient and the learning rate."""
        config, options = self.config, self.config.optimiser
        rate = learning_rate(self.step, config.steps, options)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimiser.zero_grad(set_to_none=True)
        added, figures_of_parts = self.workshop.work(batch), []
        self.work = Work(self.work.tokens + added.tokens, self.work.flops + added.flops)
        parts = batch.to(self.device).parts(config.accumulate)
        for i, part in enumerate(parts):
            with self._gradients_stay_here(i + 1 < len(parts)), self._autocast():
                loss, figures = self.wrapped(part)
            self.scaler.scale(loss / len(parts)).backward()
            figures_of_parts.append(figures)
        self.scaler.unscale_(self.optimiser)
        learning = [part for part in (self.network, self.workshop.adversary) if part is not None]
        clipped = [nn.utils.clip_grad_norm_(part.parameters(), options.clip or math.inf) for part in learning]
        norms, self.stopping = self._waited_for(clipped)
        if all(map(math.isfinite, norms)):
            self.scaler.step(self.optimiser)
            self.workshop.after_step(self.step + 1, self.optimiser)
            decay = min(options.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
            for figures in figures_of_parts:
                self.meter.add(figures)
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()
        return norms[0], rate

    def _waited_for(self, norms: list[Tensor]) -> tuple[list[float], bool]:
        """The norms of a step's gradients; whether any process was told to stop, as then all of them do, after the same step.

        The one place where a usual step waits for the device. It has to: without finite gradients there is no step.
        """
        told = torch.full((), float(self.told_to_stop > 0), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        *read, stop = torch.stack([scalar.to(self.device) for scalar in (*norms, told)]).tolist()  # of no gradients it is on the CPU
        return read, bool(stop)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _gradients_stay_here(self, yes: bool) -> AbstractContextManager[None]:
        """Whether the gradients of a part of a step wait for the other parts before they are averaged over the processes."""
        return self.wrapped.no_sync() if yes and isinstance(self.wrapped, DistributedDataParallel) else nullcontext()

    # -- what is said and kept --

    def _speed(self, steps: int, seconds: float) -> dict[str, Any]:
        """Pictures, tokens and the share of the device's matrix rate, all processes together; memory on CUDA."""
        speed: dict[str, Any] = {"pictures_per_second": steps * self.config.batch / seconds} | peak_memory(self.device)
        if self.work.tokens:
            self.matrix_rate = max(self.matrix_rate, matrix_rate(self.device, self.dtype))  # the best so far: other work slows it
            speed["tokens_per_second"] = world_size() * self.work.tokens / seconds
            speed["share_of_matrix_rate"] = self.work.flops / seconds / self.matrix_rate
            peak_memory(self.device)  # that of measuring the rate is not to be the next one
        self.work = Work()
        return speed | {"skipped_steps": self.skipped, "unreadable_pictures": len(self.unreadable), "seconds": self.seconds}

    def _report(self, figures: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        self.folder.report({"step": self.step} | figures)
        short = {"step": self.step} | {name: value for name, value in figures.items() if isinstance(value, float)}
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in short.items() if name != "seconds"))

    def _save(self) -> None:
        workshop = self.workshop.state_dict()  # on all processes, as some of it may be gathered from them
        first_shard = self._earliest_shard()
        if self.rank != 0:
            return
        measured = self._measure()
        loss = measured.get("loss", math.inf)
        is_best = loss < (self.best[1] if self.best else math.inf)
        if is_best:
            self.best = (self.step, loss)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "unreadable": sorted(self.unreadable),
            "first_shard": first_shard,
            "best": self.best,
            "pictures": self.data.pictures,
            "class_names": list(self.data.class_names),
            "workshop": workshop,
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        provenance = {
            "trained": {"steps": self.step, "pictures": self.step * self.config.batch, "seconds": round(self.seconds), **self.made},
            "config": OmegaConf.to_container(OmegaConf.structured(self.config)),
        }
        self.folder.write_model(self.workshop.finished(self.average, provenance), is_best)
        if measured:
            self.folder.report({"step": self.step, "measured": measured, "best": is_best})
        # Last, so that a run that was killed in between does all of this again.
        self.folder.write_checkpoint(self.step, state, self.best[0] if self.best else None)

    def _score(self, again: bool = True) -> None:
        wait_for_all()  # for the first one, which has just saved the model
        if scores := self.workshop.scored(self.average, self.step, again=again):
            self.folder.report({"step": self.step, "scores": scores})
            self._say(f"step {self.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
            peak_memory(self.device)  # nor is that of drawing

    def _measure(self) -> dict[str, Any]:
        with torch.no_grad(), self._autocast():
            held_out = [batch.to(self.device) for batch in self.data.held_out]
            return self.workshop.measured(self.average, held_out) if held_out else {}

    def _anywhere(self, names: set[str]) -> set[str]:
        """The names that this process or another one has."""
        if not dist.is_initialized():
            return names
        shares: list[set[str]] = [set() for _ in range(world_size())]
        dist.all_gather_object(shares, names)
        return set().union(*shares)

    def _earliest_shard(self) -> int:
        """Of a stream: the earliest shard that any lane still reads; until all lanes have given a batch, the one this piece began at."""
        all_heard = self.step - self.first_step >= max(self.config.workers, MOST_WORKERS)
        earliest = torch.tensor(min(self.shards.values(), default=0) if all_heard else self.first_shard, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(earliest, dist.ReduceOp.MIN)
        return int(earliest)

    def _resume(self) -> None:
        newest = self.folder.newest()
        if newest:
            self._load(newest)
        if dist.is_initialized():
            seen: list[Any] = [None] * world_size()
            dist.all_gather_object(seen, (self.step, (self.data.pictures, self.data.class_names)))
            steps, data = zip(*seen, strict=True)
            if len(set(steps)) > 1:
                raise ValueError(f"not all processes see the same checkpoint in {self.folder.path}; put run= where all machines read it")
            if len(set(data)) > 1:
                raise ValueError("not all processes see the same pictures and classes; give all machines the same data")
        if self.rank == 0:
            changed = self.folder.begin(self.config, self.step)
            if changed and self.step:
                self._say(f"{self.folder.path} goes on at step {self.step} with other settings than before: {', '.join(changed)}")
                if "batch" in changed:  # since the place in the data is the step times the batch
                    self._say(f"with another batch it goes on at another place in the data, picture {self.step * self.config.batch}")

    def _load(self, path: Path) -> None:
        state = self.folder.read(path, mapped=self.device.type != "cpu")
        if not {name.partition(".")[0] for name in state["workshop"]} & {name.partition(".")[0] for name in self.workshop.state_dict()}:
            raise ValueError(f"{self.folder.path} is a run of another kind of network; choose another run= folder")
        for label, (then, now) in enumerate(zip_longest(state["class_names"], self.data.class_names, fillvalue="no class")):
            if then != now:
                what = f"class {label} of {self.folder.path} was {then!r}, and is {now!r} in the data"
                raise ValueError(f"{what}; give it the data that it had, or another run= folder with init_from={self.folder.model}")
        if state["pictures"] != self.data.pictures:
            self._say(
                f"the data holds {self.data.pictures} pictures, not {state['pictures']} as before: from here on they come in another order"
            )
        try:
            self.workshop.load_state_dict(state["workshop"])
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            mend = f"set the config's model and adversary as they were, or begin another run= folder with init_from={self.folder.model}"
            raise ValueError(f"{path} is of another model than the config ({first}); {mend}") from error
        self.average.load_state_dict(state["average"])
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, settings in zip(self.optimiser.param_groups, groups, strict=True):
            group.update(settings)  # the config's settings, not those of the checkpoint
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self.best, self.first_shard, self.unreadable = state["best"], state["first_shard"], set(state["unreadable"])

    def _say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def _stop(self, *_: Any) -> None:
        """Has the step in hand finished and saved first; told so once more, ends at once.

        Ctrl-C reaches a process from the terminal and, a moment later, from torchrun: that is told once.
        """
        now = time.monotonic()
        if self.told_to_stop and now - self.told_to_stop > ONCE:
            raise KeyboardInterrupt
        self.told_to_stop = self.told_to_stop or now
