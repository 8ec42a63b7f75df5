from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flexvar import Tokenizer, TokenizerConfig, Transformer, TransformerConfig
from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.data import Shapes
from flexvar.training.config import read_config
from flexvar.training.optimiser import learning_rate, parameter_groups
from flexvar.training.order import Steps, position_random, step_random
from flexvar.training.pictures import examples
from flexvar.training.settings import CacheRun, OptimiserConfig, TokenizerRun, TransformerRun
from flexvar.training.tokenizer import TokenizerWorkshop, random_scales
from training_runs import assert_same_end, measurements, newest_state, reports, tokenizer_config, transformer_config


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", "tokenizer", str(tokenizer_config(folder))]) == 0
    return folder / "tokenizer" / "model"


def test_from_pictures_to_pictures(trained_tokenizer: Path, tmp_path: Path, capsys) -> None:
    """Tokenizer, transformer, samples: through the command line, in seconds."""
    run = trained_tokenizer.parent
    assert sorted(path.name for path in run.iterdir()) == ["best", "checkpoints", "config.yaml", "log.jsonl", "model", "sheets"]
    assert [report["step"] for report in reports(run)] == [1, 2, 3, 4]
    assert load(trained_tokenizer).tokenizer.config.codebook_size == 16
    assert main(["train", "transformer", str(transformer_config(tmp_path, trained_tokenizer))]) == 0
    last = reports(tmp_path / "transformer")[-1]
    assert measurements(tmp_path / "transformer")[-1]["measured"]["loss_of_guessing"] == pytest.approx(np.log(16))
    assert list(last["loss_by_scale"]) == list(last["accuracy_by_scale"])
    assert list((tmp_path / "transformer" / "sheets").glob("*.png"))
    model = load(tmp_path / "transformer" / "model")
    assert model.class_names == Shapes().class_names
    assert model.transformer.config.trained_grid == 4  # 4x6 codes are the most of a size, 16x24 px
    assert model.provenance["transformer"]["trained"]["pictures"] == 16
    words = [
        "sample",
        "circle",
        "--model",
        str(tmp_path / "transformer" / "model"),
        "--height",
        "8",
        "--width",
        "24",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0


def test_training_learns(tmp_path: Path, capsys) -> None:
    words = ["steps=80", "report_every=10", "save_every=80", "batch=8"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words, "continuous=1.0"]) == 0
    psnr = [report["psnr"] for report in reports(tmp_path / "tokenizer")]
    assert sum(psnr[-3:]) / 3 > psnr[0] + 2
    assert main(["train", "transformer", str(transformer_config(tmp_path, tmp_path / "tokenizer" / "model")), *words]) == 0
    losses = [report["loss"] for report in reports(tmp_path / "transformer")]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]


def test_the_same_command_goes_on_and_ends_the_same(trained_tokenizer: Path, tmp_path: Path, capsys) -> None:
    """Stopped after 2 of 4 steps and started again: weights equal to those of a run in one piece."""
    whole, pieces = (transformer_config(tmp_path, trained_tokenizer, name=name) for name in ("whole", "pieces"))
    assert main(["train", "transformer", str(whole)]) == 0
    code = (
        "import os, signal\n"
        "from flexvar.training.loop import _Run\n"
        "step = _Run._take_step\n"
        "def stop(self, batch):\n"
        "    if self.step == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self, batch)\n"
        "_Run._take_step = stop\n"
        "import sys; from flexvar.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    stopped = subprocess.run([sys.executable, "-c", code, "train", "transformer", str(pieces)], capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped at step 2 and saved" in stopped.stdout + stopped.stderr
    assert main(["train", "transformer", str(pieces)]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "pieces")
    capsys.readouterr()
    assert main(["train", "transformer", str(pieces)]) == 0
    assert "is finished (4 steps)" in capsys.readouterr().out
    settings = (tmp_path / "pieces" / "config.yaml").read_text()
    assert main(["train", "transformer", str(pieces), "steps=3", "seed=9"]) == 0
    assert "goes on" not in capsys.readouterr().out
    assert (tmp_path / "pieces" / "config.yaml").read_text() == settings  # those it was trained with
    assert main(["train", "transformer", str(pieces), "steps=5", "optimiser.clip=1"]) == 0
    assert "goes on at step 4 with other settings than before: steps, optimiser.clip" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, capsys) -> None:
    """SIGKILL at any moment: the same command goes on from the last checkpoint and the log has every step once."""
    config = tokenizer_config(tmp_path, steps=40)
    words = [sys.executable, "-m", "flexvar", "train", "tokenizer", str(config)]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "tokenizer").glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert main(["train", "tokenizer", str(config)]) == 0
    assert [report["step"] for report in reports(tmp_path / "tokenizer")] == list(range(1, 41))
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, steps=40, name="whole"))]) == 0
    one, two = (load(tmp_path / name / "model").tokenizer.state_dict() for name in ("tokenizer", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_two_processes_train_as_one(stage: str, trained_tokenizer: Path, tmp_path: Path, capsys) -> None:
    make = {
        "tokenizer": lambda name: tokenizer_config(tmp_path, steps=6, name=name),
        "transformer": lambda name: transformer_config(tmp_path, trained_tokenizer, name=name),
    }[stage]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flexvar"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    opposed = ["adversary.weight=0.5", "adversary.start=2", "adversary.channels=4", "adversary.layers=1", "smallest=16"]
    words = opposed if stage == "tokenizer" else ["accumulate=2"]
    run = subprocess.run([*launch, "train", stage, str(make("two")), *words], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert main(["train", stage, str(make("one")), *words]) == 0
    one, two = (reports(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-2)
        assert ours.get("codes_in_use") == pytest.approx(theirs.get("codes_in_use"), abs=1 / 16)  # a code may differ by rounding


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="cannot be shared among 3"):
        Steps(Shapes(views=3), 7, 8, [(12, 12)], 0, 3)


def test_random_streams_differ_by_purpose() -> None:
    assert step_random(1, 2, "size").random() != step_random(1, 2, "schedule").random()
    assert position_random(1, 2, 0).random() != position_random(1, 2, 1).random()
    assert position_random(1, 2, 0).random() == position_random(1, 2, 0).random()


def test_learning_rate_has_the_paper_shape() -> None:
    config = OptimiserConfig(learning_rate=1.0)
    rates = [learning_rate(step, 1000, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.005)
    assert rates[20:70] == [1.0] * 50
    assert rates[999] == pytest.approx(0.1, abs=2e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_what_decays_and_what_does_not() -> None:
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(depth=2, shared_modulation=True))
        tokenizer = Tokenizer(TokenizerConfig())
    for network, free in ((transformer, {"positions", "start", "modulation_offset", "log_scale", "q_bias"}), (tokenizer, {"codebook"})):
        workshop = type("Bare", (), {"network": network, "adversary": None, "adversary_rate": 1.0})()
        decaying, others = ({id(parameter) for parameter in group["params"]} for group in parameter_groups(workshop, 0.05))
        for name, parameter in network.named_parameters():
            expected = others if parameter.ndim <= 1 or name.split(".")[-1] in free else decaying
            assert id(parameter) in expected, name


def test_random_scales_grow_to_the_native_one() -> None:
    for step in range(50):
        scales = random_scales(4, (4, 12), step_random(0, step))
        assert scales[-1] == (4, 12)
        assert len(scales) == 4
        assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(scales))
    assert random_scales(9, (2, 2), step_random(0, 0)) == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("text", "words", "complaint"),
    [
        ("steps: 3\nbach: 4", [], "bach"),
        ("steps: three", [], "three"),
        ("steps: [", [], "is not valid YAML"),
        ("steps: 3", ["steps"], "'steps' is not a setting"),
        ("steps: 3", ["optimiser.lr=1"], "lr"),
        ("data: {kind: photos}", [], "photos"),
    ],
)
def test_bad_configs(text: str, words: list[str], complaint: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", "tokenizer", str(tmp_path / "config.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_missing_things(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    config = tokenizer_config(tmp_path)
    for words, complaint in (
        (["train", "tokenizer", str(tmp_path / "nowhere.yaml")], "there is no config file"),
        (["train", "tokenizer", str(config), "data.kind=folder", f"data.path={tmp_path / 'empty'}"], "no pictures in"),
        (["train", "tokenizer", str(config), "data.kind=folder"], "data.path is empty"),
        (["train", "transformer", str(transformer_config(tmp_path, Path("")))], "is not a model folder"),
        (["train", "tokenizer", str(config), "sizes=[[18,16]]"], "multiple of 4"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert "Traceback" not in error


def test_a_run_folder_of_another_model(trained_tokenizer: Path, tmp_path: Path, capsys) -> None:
    config = tokenizer_config(tmp_path)
    assert main(["train", "tokenizer", str(config)]) == 0
    assert main(["train", "tokenizer", str(config), "model.codebook_size=32", "steps=8"]) == 2
    told = capsys.readouterr().err
    assert "another model than the config (size mismatch for " in told
    assert f"begin another run= folder with init_from={tmp_path}" in told
    assert told.count("\n") == 1


def test_folder_of_pictures_with_a_corrupt_one(tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "shapes"), "--count", "2", "--height", "20", "--width", "20"]) == 0
    broken = next((tmp_path / "shapes").rglob("*.png"))
    broken.write_bytes(b"not a picture")
    words = ["data.kind=folder", f"data.path={tmp_path / 'shapes'}", "batch=8", "workers=1", "measure=0"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0
    said = capsys.readouterr()
    assert broken.name in said.err
    told = f"1 pictures could not be read and were skipped: {broken.parent.name}/{broken.name}"
    assert told in said.out
    assert reports(tmp_path / "tokenizer")[-1]["unreadable_pictures"] == 1
    broken.unlink()  # it stays known to a run that goes on
    assert main(["train", "tokenizer", str(tmp_path / "tokenizer.yaml"), *words, "steps=6"]) == 0
    assert told in capsys.readouterr().out


def test_shipped_configs_are_read() -> None:
    configs = Path(__file__).parent.parent / "configs"
    found = sorted(configs.rglob("*.yaml"))
    assert found
    for path in found:
        kinds = {"tokenizer": TokenizerRun, "decoder": TokenizerRun, "cache": CacheRun}
        read_config(kinds.get(path.stem, TransformerRun), path)


def test_used_codes_stay_and_unused_ones_start_anew(tmp_path: Path) -> None:
    config = read_config(TokenizerRun, tokenizer_config(tmp_path, steps=100), ["restart_every=2", "model.codebook_size=64"])
    torch.manual_seed(0)
    source = Shapes(views=3)
    workshop = TokenizerWorkshop(config, examples(source, config))
    optimiser = torch.optim.AdamW(workshop.parameters())
    loss, _ = workshop(Steps(source, 0, 8, config.sizes)[0])
    loss.backward()
    optimiser.step()
    codebook = workshop.tokenizer.quantizer.codebook
    before, used = codebook.detach().clone(), workshop.used > 0
    assert used.any()
    assert not used.all()
    workshop.after_step(1, optimiser)
    assert torch.equal(codebook, before)
    workshop.after_step(2, optimiser)
    assert torch.equal(codebook[used], before[used])
    assert not (codebook[~used] == before[~used]).all(1).any()
    assert (optimiser.state[codebook]["exp_avg"][~used] == 0).all()
    assert workshop.used.sum() == 0


def test_a_half_written_log_and_new_optimiser_settings(trained_tokenizer: Path, tmp_path: Path, capsys) -> None:
    config = str(tokenizer_config(tmp_path))
    assert main(["train", "tokenizer", config]) == 0
    with (tmp_path / "tokenizer" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    assert main(["train", "tokenizer", config, "steps=6", "optimiser.weight_decay=0.5"]) == 0
    assert [report["step"] for report in reports(tmp_path / "tokenizer")] == [1, 2, 3, 4, 5, 6]
    groups = newest_state(tmp_path / "tokenizer")["optimiser"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    (tmp_path / "tokenizer" / "checkpoints" / "step-0000006.pt").write_bytes(b"cut off")
    assert main(["train", "tokenizer", config, "steps=8"]) == 2
    assert "step-0000006.pt is damaged; remove it to go on from the one before" in capsys.readouterr().err
    (tmp_path / "tokenizer" / "checkpoints" / "step-0000006.pt").unlink()
    assert main(["train", "tokenizer", config, "steps=8"]) == 0
    assert [report["step"] for report in reports(tmp_path / "tokenizer")] == list(range(1, 9))
