"""The benchmark of both trainings says what it measures."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmarks import shapes


def test_unigram_entropy_is_that_of_the_histogram() -> None:
    codes = [torch.randint(5, (6, 1, 1)), torch.randint(5, (6, 2, 3)), torch.full((6, 4, 4), 3)]
    for found, scale in zip(shapes.unigram_entropies(codes, 9), codes, strict=True):
        counts = Counter(scale.flatten().tolist())
        expected = -sum(count / scale.numel() * math.log(count / scale.numel()) for count in counts.values())
        assert found == pytest.approx(expected, abs=1e-9)


def test_a_folder_that_is_there_is_not_trained_into(tmp_path: Path, capsys) -> None:
    assert shapes.main(["--run", str(tmp_path)]) == 2
    assert "exists; remove it, or name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_form_prints_every_measure(tmp_path: Path, capsys) -> None:
    assert shapes.main(["--quick", "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for words in ("PSNR on unseen drawings, dB", "from 4x4 codes", "loss of guessing, ln V", "unigram entropy", "on samples"):
        assert words in said
