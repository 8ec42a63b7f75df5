"""The loop: parts of a step, precision, skipped steps, checkpoints kept, measurements, and what a report says."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.training.loop import _fetched, _Run
from flexvar.training.meter import Meter, nested
from flexvar.training.pictures import spare_cores
from flexvar.training.run_folder import RunFolder
from training_runs import assert_equal, assert_same_end, lines, measurements, newest_state, reports, tokenizer_config, transformer_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert main(["train", "tokenizer", str(tokenizer_config(folder))]) == 0
    return folder / "tokenizer" / "model"


def run(tokenizer: Path, folder: Path, name: str, *words: str) -> Path:
    assert main(["train", "transformer", str(transformer_config(folder, tokenizer, name=name)), *words]) == 0
    return folder / name


def assert_alike(one: Path, two: Path) -> None:
    for ours, theirs in zip(reports(one), reports(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    for ours, theirs in zip(measurements(one), measurements(two), strict=True):
        assert ours["measured"]["loss"] == pytest.approx(theirs["measured"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["accumulate=2"],
        ["accumulate=4"],
        ["recompute=true"],
        ["attention=mask"],
        ["attention=padded"],
        ["compile=eager"],
        ["workers=2"],
    ],
    ids=" ".join,
)
def test_the_same_training_another_way(words: list[str], tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert_alike(run(tokenizer, tmp_path, "one"), run(tokenizer, tmp_path, "two", *words))


@pytest.mark.slow
def test_compiled_by_inductor_it_is_the_same_training(tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert_alike(run(tokenizer, tmp_path, "one"), run(tokenizer, tmp_path, "two", "compile=inductor"))


def test_parts_of_a_tokenizer_step_are_the_step(tmp_path: Path, capsys) -> None:
    words = ["restart_every=0", "adversary.weight=0.1", "adversary.start=0", "adversary.channels=8", "adversary.layers=1", "smallest=8"]
    for name, parts in (("one", 1), ("two", 2)):
        assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, name=name)), f"accumulate={parts}", *words]) == 0
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str, tokenizer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("flexvar.training.loop.matrix_rate", lambda *_: 1e12)  # seconds a report where a processor has no such products
    whole = run(tokenizer, tmp_path, "whole", f"precision={precision}")
    run(tokenizer, tmp_path, "pieces", f"precision={precision}", "steps=2", "optimiser.flat=1")
    assert bool(newest_state(whole)["scaler"]) == (precision == "fp16")
    run(tokenizer, tmp_path, "pieces", f"precision={precision}", "optimiser.flat=1")
    run(tokenizer, tmp_path, "flat", f"precision={precision}", "optimiser.flat=1")
    assert_same_end(tmp_path / "pieces", tmp_path / "flat")
    full = run(tokenizer, tmp_path, "full")
    assert reports(whole)[0]["loss"] == pytest.approx(reports(full)[0]["loss"], rel=0.02)
    assert reports(whole)[0]["loss"] != reports(full)[0]["loss"]


def poison(monkeypatch, network_of, steps: set[int]) -> None:
    """Makes a gradient of a run's network not a number at these steps."""

    def step(self: _Run, batch) -> tuple[float, float]:
        hook = next(network_of(self).parameters()).register_hook(lambda g: g * math.nan) if self.step in steps else None
        result = original(self, batch)
        if hook:
            hook.remove()
        return result

    original = _Run._take_step
    monkeypatch.setattr(_Run, "_take_step", step)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tokenizer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    poisoned = {1}
    poison(monkeypatch, lambda run: run.network, poisoned)
    done = run(tokenizer, tmp_path, "skips")
    assert [report["skipped_steps"] for report in reports(done)] == [0, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in load(done / "model").transformer.state_dict().values())
    poisoned.update(range(1, 40))
    words = ["bad_steps=3", "steps=40", "save_every=100"]
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, name="stops")), *words]) == 2
    assert "3 steps in a row had no finite gradient; step 4 is saved" in capsys.readouterr().err
    assert newest_state(tmp_path / "stops")["step"] == 4
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "stops" / "model").transformer.state_dict().values())
    poisoned.clear()  # the same command goes on
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer, name="stops")), "steps=6"]) == 0
    assert [report["step"] for report in reports(tmp_path / "stops")] == [1, 2, 3, 4, 5, 6]


def test_an_adversary_without_a_finite_gradient_does_not_learn_from_it(tmp_path: Path, monkeypatch, capsys) -> None:
    poison(monkeypatch, lambda run: run.workshop.adversary, {1})
    words = ["adversary.weight=0.1", "adversary.start=0", "adversary.channels=8", "adversary.layers=1", "smallest=8"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0
    assert [report["skipped_steps"] for report in reports(tmp_path / "tokenizer")] == [0, 1, 1, 1]
    state = newest_state(tmp_path / "tokenizer")["workshop"]
    assert all(tensor.isfinite().all() for name, tensor in state.items() if name.startswith("adversary."))


def test_a_step_looks_at_its_device_once(tmp_path: Path, monkeypatch, capsys) -> None:
    """Every look waits for it: what network and adversary have to say is read together."""
    looks: list[int] = []

    class SingleNumbers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            looks[-1] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def lists(self: torch.Tensor) -> list:
        looks[-1] += 1
        return original_list(self)

    def step(self: _Run, batch) -> tuple[float, float]:
        looks.append(0)
        with SingleNumbers(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lists)
            return original(self, batch)

    original, original_list = _Run._take_step, torch.Tensor.tolist
    monkeypatch.setattr(_Run, "_take_step", step)
    words = ["adversary.weight=0.1", "adversary.start=1", "adversary.channels=8", "adversary.layers=1", "smallest=8", "restart_every=0"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0
    assert looks == [1, 1, 1, 1]


def test_what_a_run_cannot_do_is_said_in_one_line(tokenizer: Path, tmp_path: Path, capsys) -> None:
    for words, complaint in (
        (["sizes=[[4,4]]"], "sizes holds [4, 4], 1x1 codes, of which a step may have a single scale; take larger pictures, of 2 codes"),
        (["sizes=[[16,16],[8,8]]", "schedules=released"], "sizes holds [8, 8], 2x2 codes, of which a step may have a single scale"),
        (["data={kind: folder, path: nowhere}"], "there is no folder nowhere"),
        (["data={kind: shards, path: nowhere}"], "there is no shard nowhere"),
        (["compile=inducter"], "compile is 'inducter'; it must be one of cudagraphs, inductor"),
    ):
        assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), *words]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), "adversary.weight=1"]) == 2
    assert "adversary.start is 20000 of 4 steps" in capsys.readouterr().err


def test_an_error_in_a_worker_is_one_line_too(tokenizer: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "1", "--height", "20", "--width", "20"]) == 0
    for path in (tmp_path / "shapes").rglob("*.png"):
        path.write_bytes(b"no picture")
    capsys.readouterr()
    words = [f"data={{kind: folder, path: {tmp_path / 'shapes'}}}", "measure=0", "workers=1"]
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer)), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"flexvar: none of the 10 pictures in {tmp_path / 'shapes'} can be read: check the files"


def test_a_worker_that_was_killed_is_told_in_one_line() -> None:
    def batches(message: str) -> Iterator[int]:
        yield 1
        raise RuntimeError(message)

    with pytest.raises(OSError, match=r"most likely for want of memory; set fewer workers="):
        list(_fetched(batches("DataLoader worker (pid 7) is killed by signal: Killed.")))
    for message in ("something else", "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: stack expects equal sizes"):
        with pytest.raises(RuntimeError, match=message):
            list(_fetched(batches(message)))


def test_a_checkpoint_is_read_the_same_where_it_is_mapped(tokenizer: Path, tmp_path: Path) -> None:
    assert main(["train", "transformer", str(transformer_config(tmp_path, tokenizer))]) == 0
    folder = RunFolder(tmp_path / "transformer", 2)
    newest = folder.newest()
    assert_equal(folder.read(newest, mapped=True), folder.read(newest), "checkpoint")


def test_workers_fit_the_cores_that_a_process_may_use(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert spare_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert spare_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert spare_cores() == 8


def test_sheets_of_classes_that_are_not_there_and_a_finest_grid(tokenizer: Path, tmp_path: Path, capsys) -> None:
    """Labels for more classes than there are draw without a class; a finest grid holds for training, sheets and defaults alike."""
    done = run(tokenizer, tmp_path, "finest", "sheet_labels=[50]", "finest=3", "sizes=[[32,32]]")
    assert all(max(map(int, scale.split("x"))) <= 3 for report in reports(done) for scale in report["loss_by_scale"])
    model = load(done / "model")
    assert (model.transformer.config.trained_grid, model.defaults.height, model.defaults.width) == (3, 12, 12)
    assert list((done / "sheets").glob("*.png"))


def test_the_latest_checkpoints_and_the_best_are_kept(tokenizer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(_Run, "_measure", lambda self: {"loss": next(losses)})
    done = run(tokenizer, tmp_path, "kept", "steps=5", "save_every=1", "keep=2")
    assert [path.name for path in sorted((done / "checkpoints").iterdir())] == [f"step-000000{step}.pt" for step in (2, 4, 5)]
    assert [line["best"] for line in measurements(done)] == [True, True, False, False, False]
    best, last = (load(done / name) for name in ("best", "model"))
    assert best.provenance["transformer"]["trained"]["steps"] == 2
    assert last.provenance["transformer"]["trained"]["steps"] == 5


def test_measuring_is_repeatable_and_can_be_switched_off(tokenizer: Path, tmp_path: Path, capsys) -> None:
    still = ["optimiser.learning_rate=1e-12", "optimiser.weight_decay=0", "measure=2"]
    first, second = measurements(run(tokenizer, tmp_path, "still", *still))
    assert first["measured"]["loss"] == pytest.approx(second["measured"]["loss"], rel=1e-6)  # no label or path is dropped
    assert first["measured"]["loss"] == pytest.approx(math.log(16), rel=0.1)
    assert next(iter(first["measured"]["loss_by_scale"])) == "1x1"
    none = run(tokenizer, tmp_path, "none", "measure=0")
    assert not measurements(none)
    assert not (none / "best").exists()


def test_what_a_report_says(tokenizer: Path, tmp_path: Path, capsys) -> None:
    report = reports(run(tokenizer, tmp_path, "said", "report_every=4"))[-1]
    assert report["loss_of_guessing"] == pytest.approx(math.log(16))
    assert {"step", "loss", "accuracy", "gradient_norm", "learning_rate", "seconds", "skipped_steps"} <= set(report)
    assert 0 < report["share_of_matrix_rate"] < 1
    assert report["tokens_per_second"] > report["pictures_per_second"] > 0
    assert list(report["loss_by_scale"]) == list(report["accuracy_by_scale"])
    sides = [tuple(map(int, scale.split("x"))) for scale in report["loss_by_scale"]]
    assert sides == sorted(sides)
    assert sides[0] == (1, 1)


def test_a_meter_averages_what_not_all_steps_have() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "loss/2x2": torch.tensor(4.0)})
    meter.add({"loss": torch.tensor(3.0), "loss/10x1": torch.tensor(5.0)})
    averages = meter.averages()
    assert averages == {"loss": 2.0, "loss/10x1": 5.0, "loss/2x2": 4.0}
    assert nested(averages) == {"loss": 2.0, "loss_by_scale": {"2x2": 4.0, "10x1": 5.0}}
    assert meter.averages() == {}


def flexvar(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "flexvar", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_with_workers_it_saves_and_goes_on(number: signal.Signals, tokenizer: Path, tmp_path: Path, capsys) -> None:
    """The signal reaches the workers too, as Ctrl-C in a terminal and the end of a job do."""
    config = transformer_config(tmp_path, tokenizer, steps=2000, name="stopped")
    running = flexvar("train", "transformer", str(config), "workers=2", start_new_session=True)
    wait_for(tmp_path / "stopped" / "log.jsonl", running)
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) >= 2
    for process in [*map(int, workers), running.pid]:
        os.kill(process, number)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    step = newest_state(tmp_path / "stopped")["step"]
    assert 0 < step < 2000
    assert main(["train", "transformer", str(config), f"steps={step + 2}"]) == 0
    assert [report["step"] for report in reports(tmp_path / "stopped")] == list(range(1, step + 3))


def test_told_to_stop_once_more_it_ends_at_once(tokenizer: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def step(self: _Run, batch) -> tuple[float, float]:
        if self.step == 2:
            for at in seconds:
                monkeypatch.setattr("flexvar.training.loop.time.monotonic", lambda at=at: at)
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    original = _Run._take_step
    monkeypatch.setattr(_Run, "_take_step", step)
    command = ["train", "transformer", str(transformer_config(tmp_path, tokenizer, steps=2000)), "save_every=1000"]
    seconds = [100.0, 101.0]  # told once, by two
    assert main(command) == 130
    assert newest_state(tmp_path / "transformer")["step"] == 3
    seconds = [100.0, 106.0]
    assert main([*command, f"run={tmp_path / 'again'}"]) == 130
    assert not list((tmp_path / "again" / "checkpoints").iterdir())


ONE_IS_TOLD_TO_STOP = """
import os, signal, sys
from flexvar.training.loop import _fetched, _Run
step = _Run._take_step
def told(self, batch):
    if (self.step, self.rank) == (2, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch)
_Run._take_step = told
from flexvar.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_with_other_pictures_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    """As on two machines with copies of their own, of which one is not whole."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os, sys\nfrom flexvar.cli import main\n"
        "sys.exit(main(sys.argv[1:] + (['data.views=3'] if os.environ['RANK'] == '1' else [])))\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "train", "transformer"]
    words += [str(transformer_config(tmp_path, tokenizer))]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode != 0
    assert "flexvar: not all processes see the same pictures and classes; give all machines the same data" in done.stderr


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop_and_both_do(tokenizer: Path, tmp_path: Path) -> None:
    script, config = tmp_path / "told.py", transformer_config(tmp_path, tokenizer, steps=2000, name="told")
    script.write_text(ONE_IS_TOLD_TO_STOP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), "train", "transformer", str(config), "save_every=1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "stopped at step 3 and saved" in done.stdout + done.stderr
    assert newest_state(tmp_path / "told")["step"] == 3


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
save = torch.save
def half(state, path):
    if state.get("step", 0) >= 4:
        save(state, path)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
torch.save = half
from flexvar.cli import main
main(sys.argv[1:])
"""

# Threads of a group of processes that are there when the interpreter ends abort it now and then.
RUN_WHOLE = """
import os, sys
from flexvar.cli import main
status = main(sys.argv[1:])
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")] if sys.platform == "linux" else []
assert not [name for name in names if "gloo" in name], names
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_killed_in_the_middle_of_a_checkpoint(stage: str, processes: int, tokenizer: Path, tmp_path: Path, capsys) -> None:
    """10 steps equal 5 + kill -9 while the next checkpoint is written + the rest, bit for bit; with 2 processes too."""

    def command(name: str, script: str) -> list[str]:
        config = tokenizer_config(tmp_path, 10, name) if stage == "tokenizer" else transformer_config(tmp_path, tokenizer, 10, name)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        return [sys.executable, *launch, script, "train", stage, str(config)]

    killing, whole = tmp_path / "killing.py", tmp_path / "whole.py"
    killing.write_text(KILLED_WHILE_SAVING)
    whole.write_text(RUN_WHOLE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def finish(words: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)

    assert finish(command("pieces", str(killing))).returncode != 0
    assert [path.name for path in (tmp_path / "pieces" / "checkpoints").glob("*.pt")] == ["step-0000002.pt"]
    assert list((tmp_path / "pieces" / "checkpoints").glob(".*.unfinished"))
    for name in ("pieces", "in-one-piece"):
        done = finish(command(name, str(whole)))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{tmp_path / name / 'model'}\n") == 1
    assert_same_end(tmp_path / "pieces", tmp_path / "in-one-piece")
    assert not list((tmp_path / "pieces" / "checkpoints").glob(".*.unfinished"))
    assert len(lines(tmp_path / "pieces")) == len(lines(tmp_path / "in-one-piece"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_is_gone_on_from_by_another_number_of_processes(before: int, after: int, tokenizer: Path, tmp_path: Path) -> None:
    """The same training up to rounding, since the pictures of a step are the same ones."""

    def trained(name: str, steps: int, processes: int) -> None:
        config = transformer_config(tmp_path, tokenizer, 8, name)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        # A flat learning rate, since its course is over all steps that are asked for.
        command = [sys.executable, *launch, "-m", "flexvar", "train", "transformer", str(config), f"steps={steps}", "optimiser.flat=1"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        assert done.returncode == 0, done.stderr

    trained("one", 8, 1)
    trained("other", 4, before)
    trained("other", 8, after)
    assert [report["step"] for report in reports(tmp_path / "other")] == list(range(1, 9))
    for ours, theirs in zip(reports(tmp_path / "one"), reports(tmp_path / "other"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
