"""The Triton kernel against the plain way, by Triton's interpreter where there is no CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexvar import Sampling
from flexvar.sampling import candidates, choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Choose = Callable[..., Tensor]


@pytest.fixture(scope="module")
def fused() -> Choose:
    return pytest.importorskip("flexvar.fused_sampling", reason="Triton is made for Linux", exc_type=ModuleNotFoundError).choose


def compared(fused: Choose, logits: Tensor, numbers: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Codes by the kernel and by the plain way."""
    found = fused(logits.to(DEVICE), numbers.to(DEVICE), sampling).cpu()
    assert found.dtype == torch.int64
    assert found.shape == numbers.shape
    return found, choose(logits, numbers, sampling)


def distance_to_a_border(logits: Tensor, number: Tensor, sampling: Sampling) -> float:
    """How far a number is from where one candidate ends and the next begins, for one row of logits."""
    probabilities, _ = candidates(logits, sampling.top_k, sampling.top_p, sampling.temperature)
    return float((probabilities.double().cumsum(-1) / probabilities.double().sum() - number).abs().min())


@pytest.mark.parametrize(
    ("codes", "spread", "top_k", "top_p"),
    [
        *((8, 1.0, 0, 0.0), (8, 1.0, 7, 0.3), (8, 1.0, 900, 0.95)),
        *((100, 3.0, 2, 0.95), (100, 3.0, 7, 0.0), (100, 3.0, 0, 0.3)),
        *((1024, 0.3, 0, 0.95), (1024, 0.3, 900, 0.3), (1024, 0.3, 900, 0.95)),
    ],
)
def test_it_chooses_what_the_plain_way_chooses(fused: Choose, codes: int, spread: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(codes + top_k)
    sampling = Sampling(top_k, top_p, temperature=0.8)
    logits, numbers = torch.randn(2, 3, codes) * spread, torch.rand(2, 3)
    found, expected = compared(fused, logits, numbers, sampling)
    for differs in (found != expected).nonzero():
        row = tuple(differs.tolist())
        assert distance_to_a_border(logits[row], numbers[row], sampling) < 1e-5
    assert (found == expected).float().mean() > 0.8  # all of them, as a rule


def test_the_released_codebook_and_settings(fused: Choose) -> None:
    torch.manual_seed(0)
    logits, numbers = torch.randn(1, 5, 8912) * 2, torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-24]])
    found, expected = compared(fused, logits, numbers, Sampling())
    assert torch.equal(found, expected)
    assert found[0, 0] == logits[0, 0].argmax()


def test_the_example_of_the_kernel(fused: Choose) -> None:
    """Five candidates as 5, 3, 3, 2, 1; five eighths of what is kept are a's, the rest b's."""
    logits, sampling = torch.tensor([5.0, 3.0, 3.0, 2.0, 1.0]).log().expand(1, 4, -1), Sampling(top_k=4, top_p=0.6)
    found, expected = compared(fused, logits, torch.tensor([[0.0, 0.6, 0.65, 0.9]]), sampling)
    assert found.tolist() == expected.tolist() == [[0, 0, 1, 1]]


def test_numbers_from_end_to_end_choose_every_candidate_as_often_as_it_is_likely(fused: Choose) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12)
    numbers = torch.linspace(0, 1, 61)[None, :-1]
    sampling = Sampling(top_k=6)
    found, _ = compared(fused, logits.expand(1, 60, -1), numbers, sampling)
    probabilities, kept = candidates(logits, sampling.top_k, sampling.top_p)
    shares = torch.stack([(found == code).float().mean() for code in kept])
    assert torch.allclose(shares, probabilities, atol=1 / 60)


@pytest.mark.parametrize("sampling", [Sampling(0, 0.0), Sampling(5, 0.0), Sampling(0, 0.6), Sampling(7, 0.6)])
def test_equal_logits_share_their_mass(fused: Choose, sampling: Sampling) -> None:
    """Which of equal candidates is meant is nobody's promise; their common value is."""
    torch.manual_seed(0)
    logits = torch.randint(-1, 3, (1, 10, 20)).float()
    numbers = (torch.arange(10)[None] + 0.503) / 10
    found, expected = compared(fused, logits, numbers, sampling)
    assert torch.equal(logits.gather(-1, found[..., None]), logits.gather(-1, expected[..., None]))


@pytest.mark.parametrize("logits", [torch.zeros(1, 4, 16), torch.tensor([[[-0.0, 0.0, 1e38, -1e38]]]), torch.full((1, 1, 5), -1e30)])
def test_extreme_logits_give_a_code(fused: Choose, logits: Tensor) -> None:
    found, _ = compared(fused, logits, torch.full(logits.shape[:2], 0.999), Sampling(3, 0.9))
    assert ((found >= 0) & (found < logits.shape[-1])).all()


def test_greedy_scales_take_the_likeliest(fused: Choose) -> None:
    logits, numbers = torch.randn(2, 3, 50), torch.rand(2, 3)
    assert torch.equal(fused(logits, numbers, Sampling(), True), logits.argmax(-1))
    assert torch.equal(fused(logits, numbers, Sampling(top_k=1)), logits.argmax(-1))


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flexvar.fused_sampling import _choose_row

types = ["*fp32", "*fp32", "*i64", "i32", "i32", "fp32", "fp32", "constexpr", "constexpr"]
for capability in (80, 90):
    source = ASTSource(_choose_row, dict(zip(_choose_row.arg_names, types)), {"LIMITED": True, "BLOCK": 16384})
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    print(capability, len(made.asm["cubin"]) > 10000, made.metadata.shared < 48 * 1024)
"""


@pytest.mark.slow
def test_it_compiles_for_cuda_on_any_machine(fused: Choose) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "80 True True\n90 True True\n", ran.stderr
