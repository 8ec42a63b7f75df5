"""The same model on every device that this machine has: the CPU, and CUDA or MPS where there is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexvar import FlexVARPipeline, Guidance, Keep, Sampling, Schedule, Tokenizer, Transformer, generate
from flexvar.generation import full_logits
from flexvar.processes import without_tf32

ACCELERATORS = [name for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]
DEVICES = ["cpu", *ACCELERATORS]
SCHEDULE = Schedule.for_grid(16, 16, 10)
LABELS, SEEDS = [3, 21, 40], [1, 2, 3]

on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TensorFloat-32, which torch allows in convolutions: float32 is to be compared with float32."""
    with without_tf32():
        yield


@pytest.fixture(scope="module")
def pipe() -> FlexVARPipeline:
    """The bundled model, on the CPU in float32."""
    return FlexVARPipeline.from_pretrained("emoji")


@pytest.fixture(scope="module")
def expected(pipe: FlexVARPipeline) -> list[Tensor]:
    """The codes of every scale, on the CPU in float32."""
    return drawn(pipe, SCHEDULE)


def moved(pipe: FlexVARPipeline, device: str, dtype: torch.dtype) -> FlexVARPipeline:
    """A copy of the bundled model elsewhere."""
    return FlexVARPipeline(copy.deepcopy(pipe.model)).to(device, dtype)


def drawn(pipe: FlexVARPipeline, schedule: Schedule, keep: Keep | None = None) -> list[Tensor]:
    guidance, sampling = Guidance("constant", 2.0), Sampling(0, 0.95, greedy="none")
    steps = generate(pipe.tokenizer, pipe.transformer, LABELS, schedule, guidance=guidance, sampling=sampling, seeds=SEEDS, keep=keep)
    return [step.codes.cpu() for step in steps]


def agreement(pipe: FlexVARPipeline, expected: list[Tensor]) -> float:
    """The share of equal codes, where every scale is drawn after the expected ones: a single difference does not grow into many."""
    equal = [drawn(pipe, Schedule(SCHEDULE.sizes[: k + 1]), Keep(expected[:k]))[-1] == codes for k, codes in enumerate(expected)]
    return torch.cat([scale.flatten() for scale in equal]).float().mean().item()


def error(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    """The error of the whole array over its 2-norm."""
    ours, theirs = ours.detach().cpu().double(), torch.as_tensor(theirs).cpu().double()
    return ((ours - theirs).norm() / theirs.norm()).item()


@on_every_device
def test_what_a_training_measures_is_the_same(pipe: FlexVARPipeline, expected: list[Tensor], device: str) -> None:
    """Several pictures at once, all scales given, without gradients."""
    logits = []
    for one in (pipe, moved(pipe, device, torch.float32)):
        inputs = one.tokenizer.inputs([codes.to(one.device) for codes in expected], SCHEDULE)
        with torch.no_grad():
            logits.append(one.transformer(torch.tensor(LABELS, device=one.device), inputs, SCHEDULE))
    assert error(*logits) < 1e-4


@on_every_device
@in_every_precision
def test_round_trip_of_the_tokenizer(device: str, dtype: torch.dtype, pipe: FlexVARPipeline) -> None:
    there = moved(pipe, device, dtype)
    pictures = 2 * torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) - 1
    features = there.tokenizer.features(pictures.to(device, dtype))
    codes = there.tokenizer.codes(features, [(1, 2), (16, 24)])
    again = there.tokenizer.decode(codes[-1])
    assert (features.shape, [scale.shape[1:] for scale in codes]) == ((2, 16, 16, 24), [(1, 2), (16, 24)])
    assert (features.dtype, codes[0].dtype, again.dtype) == (dtype, torch.int64, dtype)
    assert again.shape == pictures.shape
    assert {tensor.device.type for tensor in (features, *codes, again)} == {device}
    assert torch.isfinite(again).all()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert error(features, pipe.tokenizer.features(pictures)) < tolerance
    assert error(again, pipe.tokenizer.decode(codes[-1].cpu())) < tolerance


@on_every_device
def test_the_codes_are_those_of_the_cpu(device: str, pipe: FlexVARPipeline, expected: list[Tensor]) -> None:
    there = moved(pipe, device, torch.float32)
    assert agreement(there, expected) >= (1.0 if device == "cpu" else 0.99)


@on_every_device
def test_half_precision_draws_nearly_the_same(device: str, pipe: FlexVARPipeline, expected: list[Tensor]) -> None:
    share = agreement(moved(pipe, device, torch.bfloat16), expected)
    print(f"{device}: {share:.1%} of the codes in bfloat16 are those in float32")
    assert share > 0.85


@on_every_device
@in_every_precision
def test_pictures_come_out_of_the_pipeline(device: str, dtype: torch.dtype, pipe: FlexVARPipeline) -> None:
    there = moved(pipe, device, dtype)
    together = there(["pizza", None], height=32, width=64, seed=5, output_type="pt").images
    assert together.shape == (2, 3, 32, 64)
    assert torch.isfinite(together).all()
    assert together.std() > 0.05
    assert there.reconstruct(there("pizza", height=32, width=64, seed=5).images[0]).images[0].size == (64, 32)


@on_every_device
@in_every_precision
def test_given_pictures_are_edited(device: str, dtype: torch.dtype, pipe: FlexVARPipeline) -> None:
    there, given = moved(pipe, device, dtype), pipe("pizza", height=64, width=64, seed=5).images[0]
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    painted = there.inpaint(given, mask, "pizza", seed=1).images[0]
    assert np.array_equal(np.asarray(painted)[:, :32], np.asarray(given)[:, :32])
    assert not np.array_equal(np.asarray(painted)[:, 32:], np.asarray(given)[:, 32:])
    assert there.outpaint(given, "pizza", left=16, seed=1).images[0].size == (80, 64)
    assert there.upscale(given, 1.5, "pizza", seed=1).images[0].size == (96, 96)
    rebuilt = np.asarray(there.refine(given, 0.0, "pizza", seed=1).images[0]).astype(float)
    assert np.abs(rebuilt - np.asarray(pipe.reconstruct(given).images[0])).mean() < 3


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_logits_are_not_rounded_to_half_precision(device: str, dtype: torch.dtype, pipe: FlexVARPipeline) -> None:
    head = moved(pipe, device, dtype).transformer.head
    read = torch.randn(2, 5, head.in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    exact = read.cpu().double() @ head.weight.cpu().double().T + head.bias.cpu().double()
    logits = full_logits(head, read)
    assert (logits.dtype, logits.shape) == (torch.float32, exact.shape)
    assert error(logits, exact) < 1e-5
    assert error(head(read), exact) > 1e-4


@on_every_device
def test_golden_values(device: str, golden, golden_tokenizer: Tokenizer, golden_transformer: Transformer) -> None:
    tokenizer, transformer = copy.deepcopy(golden_tokenizer).to(device), copy.deepcopy(golden_transformer).to(device)
    assert error(tokenizer.features(torch.from_numpy(golden["vae_wide_image"]).to(device)), golden["vae_wide_latent"]) < 1e-4
    codes = torch.from_numpy(golden["vae_wide_indices"]).to(device)
    assert error(tokenizer.decode(codes), golden["vae_wide_recon"]) < 1e-4

    schedule = Schedule.square(golden["ms_schedule"].tolist())
    inputs = torch.from_numpy(golden["ms_inputs"]).to(device)
    logits = transformer(torch.from_numpy(golden["tf_label"]).long().to(device), inputs, schedule)
    assert error(logits[0, golden["tf_rows"]], golden["tf_logits_rows"]) < 1e-4
    assert np.mean(logits.argmax(-1).cpu().numpy() == golden["tf_argmax"]) >= (1.0 if device == "cpu" else 0.99)


@on_every_device
@in_every_precision
def test_a_step_of_training(device: str, dtype: torch.dtype, small_tokenizer: Tokenizer, small_transformer: Transformer) -> None:
    torch.manual_seed(0)
    schedule = Schedule.of([1, (2, 3), (4, 4)])
    codes = [torch.randint(48, (2, h, w)) for h, w in schedule]
    inputs, targets = small_tokenizer.inputs(codes, schedule), torch.cat([scale.flatten(1) for scale in codes], 1)

    def gradients(device: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        network = copy.deepcopy(small_transformer).to(device).requires_grad_(True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
            logits = network(torch.tensor([1, 5], device=device), inputs.to(device), schedule)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in network.named_parameters()}

    loss, found = gradients(device, dtype)
    loss_of_the_cpu, theirs = gradients("cpu", torch.float32)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert loss == pytest.approx(loss_of_the_cpu, rel=tolerance)
    assert {name: gradient.dtype for name, gradient in found.items()} == dict.fromkeys(theirs, torch.float32)
    assert error(torch.cat([found[name].flatten().cpu() for name in theirs]), torch.cat([g.flatten() for g in theirs.values()])) < tolerance
