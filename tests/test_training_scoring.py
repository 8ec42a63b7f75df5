"""FID and its kin while training: the figures of `flexvar evaluate`, a training that they do not change, and what is told beforehand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexvar.checkpoint import Model
from flexvar.cli import main
from flexvar.training import scoring, start
from flexvar.training.transformer import TransformerWorkshop
from training_runs import assert_same_end, lines, tokenizer_config, transformer_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert main(["train", "tokenizer", str(tokenizer_config(folder))]) == 0
    return folder / "tokenizer" / "model"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "shapes"
    assert main(["data", "shapes", str(folder), "--count", "3", "--height", "32", "--width", "32"]) == 0
    return folder


def command(tokenizer: Path, folder: Path, name: str, *words: str) -> list[str]:
    return ["train", "transformer", str(transformer_config(folder, tokenizer, name=name)), "sizes=[[32,32]]", *words]


def scored(reference: Path, per_class: int = 2) -> list[str]:
    return [f"scores.reference={reference}", "scores.every=2", "scores.extractor=classifier", f"scores.per_class={per_class}"]


def scores_by_step(run: Path) -> dict[int, dict[str, float]]:
    found = [(line["step"], line["scores"]) for line in lines(run) if "scores" in line]
    assert len(found) == len(dict(found))  # each step once
    return dict(found)


def test_scores_are_those_of_the_command_and_change_no_training(tokenizer: Path, reference: Path, tmp_path: Path, capsys) -> None:
    assert main(command(tokenizer, tmp_path, "scored", *scored(reference))) == 0
    assert main(command(tokenizer, tmp_path, "plain")) == 0
    assert_same_end(tmp_path / "scored", tmp_path / "plain")
    capsys.readouterr()
    found = scores_by_step(tmp_path / "scored")
    assert list(found) == [2, 4]
    assert found[2] != found[4]
    report = tmp_path / "by-command.json"
    words = ["--reference", str(reference), "--extractor", "classifier", "--per-class", "2", "--out", str(report)]
    assert main(["evaluate", "model", str(tmp_path / "scored" / "model"), *words]) == 0
    assert found[4] == pytest.approx(json.loads(report.read_text())["scores"], rel=1e-5)
    kept = json.loads((tmp_path / "scored" / "scores" / "step-0000004.json").read_text())
    assert kept["scores"] == found[4]
    assert kept["samples"]["count"] == 20


def test_the_last_step_is_scored_whatever_its_number(tokenizer: Path, reference: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "odd"
    assert main(command(tokenizer, tmp_path, "odd", *scored(reference), "steps=3")) == 0
    assert list(scores_by_step(run)) == [2, 3]
    assert main(command(tokenizer, tmp_path, "odd", *scored(reference), "steps=3")) == 0  # it is finished, and scored
    assert list(scores_by_step(run)) == [2, 3]


def test_a_run_killed_while_it_scores_scores_first(tokenizer: Path, reference: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    evaluate = scoring.evaluate

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "evaluate", killed)
    assert main(command(tokenizer, tmp_path, "killed", *scored(reference))) == 130
    assert scores_by_step(tmp_path / "killed") == {}
    monkeypatch.setattr(scoring, "evaluate", evaluate)
    assert main(command(tokenizer, tmp_path, "killed", *scored(reference))) == 0
    assert list(scores_by_step(tmp_path / "killed")) == [2, 4]
    assert main(command(tokenizer, tmp_path, "whole", *scored(reference))) == 0
    assert scores_by_step(tmp_path / "killed") == scores_by_step(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["scores.reference=nowhere", "scores.every=2", "scores.extractor=classifier"], "nowhere"),
        (["scores.reference=x", "scores.every=3"], "scores.every is 3; it must be a multiple of save_every, which is 2"),
        (["scores.per_class=0"], "scores.per_class is 0"),
    ],
)
def test_what_cannot_be_scored_is_told_before_training(
    words: list[str], complaint: str, tokenizer: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(tokenizer, tmp_path, "wrong", *words)) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_too_few_pictures_and_another_size_are_told_before_training(tokenizer: Path, reference: Path, tmp_path: Path, capsys) -> None:
    larger = tmp_path / "larger"
    assert main(["data", "shapes", str(larger), "--count", "2", "--height", "48", "--width", "48"]) == 0
    assert main(command(tokenizer, tmp_path, "wrong", *scored(larger))) == 2
    assert "those of the reference 48 x 48" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_moments_of_another_extractor_are_told_before_training(tokenizer: Path, tmp_path: Path, capsys) -> None:
    moments = tmp_path / "moments.npz"
    np.savez(moments, mu=np.zeros(7), sigma=np.eye(7))
    assert main(command(tokenizer, tmp_path, "wrong", *scored(moments))) == 2
    assert "moments.npz is of 7 features" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_goes_on_on_a_device_of_its_own(tokenizer: Path, reference: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """What is compared with the run's files comes before the tokenizer is moved: "meta" stands in for a GPU."""
    assert main(command(tokenizer, tmp_path, "moved", *scored(reference), "steps=2")) == 0
    seen: list[str] = []

    class Elsewhere(scoring.Scoring):
        def __init__(self, config: object, folder: object, model: Model, **_: object) -> None:
            model.tokenizer.to("meta")
            seen.append("moved")
            raise ValueError("far enough")

    monkeypatch.setattr(start, "Scoring", Elsewhere)
    assert main(command(tokenizer, tmp_path, "moved", *scored(reference))) == 2
    assert seen == ["moved"]
    assert "far enough" in capsys.readouterr().err


def test_an_error_in_scoring_says_how_to_go_on_without(tokenizer: Path, reference: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for error, line in ((MemoryError("too large"), "too large"), (OSError("no room"), "no room"), (MemoryError(), "not enough memory")):

        def failing(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(scoring, "evaluate", failing)
        assert main(command(tokenizer, tmp_path, "failing", *scored(reference), "steps=3")) == 2
        told = capsys.readouterr().err
        assert f"flexvar: step 2 was not scored: {line}; the training is saved; scores.reference= goes on without scores" in told
    assert main(command(tokenizer, tmp_path, "failing", "scores.reference=", "scores.every=2", "steps=3")) == 0
    assert scores_by_step(tmp_path / "failing") == {}


def test_a_signal_begins_no_scoring(tokenizer: Path, reference: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def told_to_stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TransformerWorkshop, "after_step", lambda self, step, optimiser: told_to_stop() if step == 1 else None)
        assert main(command(tokenizer, tmp_path, "told", *scored(reference))) == 130
    assert scores_by_step(tmp_path / "told") == {}
    assert main(command(tokenizer, tmp_path, "told", *scored(reference))) == 0
    assert list(scores_by_step(tmp_path / "told")) == [2, 4]


@pytest.mark.slow
def test_two_processes_share_the_drawing(tokenizer: Path, reference: Path, tmp_path: Path, capsys) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flexvar"]
    words = command(tokenizer, tmp_path, "two", *scored(reference, per_class=60))
    done = subprocess.run([*launch, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main(command(tokenizer, tmp_path, "one", *scored(reference, per_class=60))) == 0
    two, one = scores_by_step(tmp_path / "two"), scores_by_step(tmp_path / "one")
    assert list(two) == list(one) == [2, 4]
    assert two[2]["fid"] == pytest.approx(one[2]["fid"], rel=0.05)  # the same training up to rounding
