"""The terms of the tokenizer's loss: what each is, when it counts, and that it trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from flexvar import Tokenizer, TokenizerConfig
from flexvar.checkpoint import load
from flexvar.cli import main
from flexvar.data import Shapes
from flexvar.evaluation.lpips import LPIPS
from flexvar.evaluation.reconstruction import quality_by_scale, use_of_all
from flexvar.official import to_released
from flexvar.schedule import Schedule
from flexvar.training import losses
from flexvar.training.config import read_config
from flexvar.training.order import Steps
from flexvar.training.pictures import examples
from flexvar.training.settings import TokenizerRun
from flexvar.training.tokenizer import TokenizerWorkshop
from training_runs import assert_same_end, measurements, newest_state, reports, tokenizer_config

ADVERSARY = ["adversary.weight=0.5", "adversary.start=2", "adversary.channels=8", "adversary.layers=1", "smallest=8"]


def workshop_of(folder: Path, *words: str) -> tuple[TokenizerWorkshop, Steps]:
    config = read_config(TokenizerRun, tokenizer_config(folder), ["sizes=[[32,32]]", "scales=8", *words])
    source = Shapes(views=3)
    torch.manual_seed(0)
    return TokenizerWorkshop(config, examples(source, config)), Steps(source, 0, 4, config.sizes)


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_codes_are_passed_unchanged(gradient) -> None:
    z, e = units(5, 7, 8), units(5, 7, 8, seed=1)
    torch.testing.assert_close(losses.past_codes(z, e, gradient), e, atol=1e-6, rtol=1e-6)


def test_the_rotated_gradient_keeps_its_angle_to_the_vector() -> None:
    """The gradient at the feature lies to the feature as the one at the code lies to the code, and is as long."""
    z, e, arriving = units(64, 8).requires_grad_(), units(64, 8, seed=1), units(64, 8, seed=2)
    losses.past_codes(z, e, "rotation").backward(arriving)
    assert z.grad is not None
    torch.testing.assert_close((z.grad * z).sum(-1), (arriving * e).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z.grad.norm(dim=-1), arriving.norm(dim=-1), atol=1e-5, rtol=1e-5)
    straight = units(64, 8).requires_grad_()
    losses.past_codes(straight, e, "straight-through").backward(arriving)
    assert torch.equal(straight.grad, arriving)


def test_entropy_is_the_formula_and_rewards_sure_and_even_codes() -> None:
    z, codebook = units(40, 4), units(6, 4, seed=1)
    distances = ((z[:, None] - codebook[None]) ** 2).sum(-1).double().numpy()
    shares = np.exp(-distances / 0.5)
    shares /= shares.sum(1, keepdims=True)
    expected = -(shares * np.log(shares)).sum(1).mean() + (shares.mean(0) * np.log(shares.mean(0))).sum()
    assert losses.entropy(z, 3 * codebook, temperature=0.5).item() == pytest.approx(expected, rel=1e-4)
    even, one = codebook.repeat(5, 1), codebook[:1].repeat(30, 1)
    assert losses.entropy(even, codebook) < losses.entropy(one, codebook)
    assert losses.entropy(even, codebook).item() == pytest.approx(-math.log(6), abs=1e-2)


@pytest.mark.parametrize("how", ["area", "bicubic"])
def test_reduced_pictures(how) -> None:
    pictures = torch.rand(2, 3, 24, 36)
    assert losses.reduced(pictures, (24, 36), how) is pictures
    small = losses.reduced(pictures, (8, 12), how)
    assert small.shape == (2, 3, 8, 12)
    assert small.mean().item() == pytest.approx(pictures.mean().item(), abs=0.02)
    assert not losses.reduced(pictures.requires_grad_(), (8, 12), how).requires_grad  # a target
    if how == "area":
        torch.testing.assert_close(small[0, 0, 0, 0], pictures[0, 0, :3, :3].mean())


def test_what_is_seen_of_small_pictures() -> None:
    small, large = torch.rand(1, 3, 8, 16), torch.rand(1, 3, 32, 48)
    assert losses.seen(large, 32, "mask") is large
    assert losses.seen(small, 32, "mask") is None
    enlarged = losses.seen(small, 32, "enlarge")
    assert enlarged is not None
    assert enlarged.shape == (1, 3, 32, 64)


def test_a_term_looks_at_the_scales_that_are_large_enough(tmp_path: Path) -> None:
    """Of the 8 scales of 32 px, 4 px a code, those of 4 to 8 codes have 16 px and more."""
    words = ["adversary.weight=1", "adversary.start=0", "adversary.channels=4", "adversary.layers=1", "smallest=16"]
    judged: dict[str, list[int]] = {}
    for small in ("mask", "enlarge"):
        workshop, steps = workshop_of(tmp_path, *words, f"small={small}")
        assert workshop.adversary is not None
        judged[small] = []
        workshop.adversary.register_forward_pre_hook(lambda _, args, small=small: judged[small].append(args[0].shape[-1]))
        _, figures = workshop(steps[0])
        assert {"adversarial", "discriminator"} <= set(figures)
    assert sorted(set(judged["mask"])) == [16, 20, 24, 28, 32]
    assert len(judged["mask"]) == 3 * 5  # as a judge of the rebuilt one, and twice to learn
    assert sorted(set(judged["enlarge"])) == [16, 20, 24, 28, 32]
    assert len(judged["enlarge"]) == 3 * 8


def test_network_and_adversary_learn_each_from_its_own_loss(tmp_path: Path) -> None:
    workshop, steps = workshop_of(tmp_path, *ADVERSARY, "adversary.start=0")
    total, figures = workshop(steps[0])
    total.backward()
    assert workshop.adversary is not None
    theirs = {name: parameter.grad.clone() for name, parameter in workshop.adversary.named_parameters()}
    ours = {name: parameter.grad.clone() for name, parameter in workshop.network.named_parameters()}
    workshop.config.adversary.weight = 0.0  # the adversary's own loss is left
    workshop.zero_grad()
    workshop(steps[0])[0].backward()
    assert all(torch.equal(parameter.grad, theirs[name]) for name, parameter in workshop.adversary.named_parameters())
    assert not all(torch.allclose(parameter.grad, ours[name]) for name, parameter in workshop.network.named_parameters())
    assert figures["loss"].item() == pytest.approx(total.item() - figures["discriminator"].item(), rel=1e-5)


def test_the_adversary_begins_at_its_step_and_resumes(tmp_path: Path, capsys) -> None:
    for name, pieces in (("whole", [4]), ("pieces", [3, 4])):
        for steps in pieces:
            config = str(tokenizer_config(tmp_path, steps, name))
            assert main(["train", "tokenizer", config, "optimiser.flat=1", "restart_every=0", "save_every=1", *ADVERSARY]) == 0
    assert ["discriminator" in report for report in reports(tmp_path / "whole")] == [False, False, True, True]
    state = newest_state(tmp_path / "whole")["workshop"]
    assert any(name.startswith("adversary.") for name in state)
    assert_same_end(tmp_path / "whole", tmp_path / "pieces")


def test_an_adversary_that_cannot_see_the_smallest_pictures(tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), "adversary.weight=1", "adversary.start=0", "smallest=16"]) == 2
    assert "smallest is 16 px, too small for a discriminator of 3 layers; give at least 24" in capsys.readouterr().err


def test_an_adversary_that_would_see_no_picture(tmp_path: Path, capsys) -> None:
    masked = ["adversary.weight=1", "adversary.start=0", "smallest=24", "small=mask"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *masked]) == 2
    assert "small=mask leaves out all pictures below smallest=24 px on a side, and sizes holds none" in capsys.readouterr().err
    assert not (tmp_path / "tokenizer").exists()
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, 1)), *masked, "sizes=[[16, 16], [24, 24]]"]) == 0


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory) -> list[str]:
    """Random weights under the names of torchvision's and lpips' files."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    lpips = LPIPS()
    vgg = {name: tensor * (0.1 if tensor.ndim == 1 else 1) for name, tensor in lpips.state_dict().items() if name.startswith("features.")}
    linear = {f"lin{i}.model.1.weight": weights.detach()[None, :, None, None] for i, weights in enumerate(lpips.linear)}
    save_file(vgg, folder / "vgg.safetensors")
    torch.save(linear, folder / "linear.pth")
    return ["perceptual.weight=1", f"perceptual.vgg={folder / 'vgg.safetensors'}", f"perceptual.linear={folder / 'linear.pth'}"]


def test_the_perceptual_term(lpips_files: list[str], tmp_path: Path, capsys) -> None:
    workshop, steps = workshop_of(tmp_path, *lpips_files, "smallest=16")
    total, figures = workshop(steps[0])
    total.backward()
    assert figures["perceptual"] > 0
    without, _ = workshop_of(tmp_path)
    plain, _ = without(steps[0])
    assert total.item() == pytest.approx(plain.item() + figures["perceptual"].item(), rel=1e-4)
    assert not any("features" in name for name in workshop.state_dict())  # VGG stays out of the checkpoints
    config = str(tokenizer_config(tmp_path))
    assert main(["train", "tokenizer", config, "steps=2", "sizes=[[16,16]]", "smallest=16", *lpips_files]) == 0
    assert all("perceptual" in report for report in reports(tmp_path / "tokenizer"))
    assert main(["train", "tokenizer", config, "perceptual.weight=1"]) == 2
    assert "fetch them, or set perceptual.weight=0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["target=bicubic"], ["gradient=rotation"], ["entropy=0.1"], ["l1=1", "l2=0"], ["restart_every=0"]])
def test_every_choice_trains(words: list[str], tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0
    assert all(math.isfinite(report["loss"]) for report in reports(tmp_path / "tokenizer"))


def test_measured_scale_by_scale(tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), "sizes=[[32,32]]"]) == 0
    for line in measurements(tmp_path / "tokenizer"):
        by_scale = line["measured"]["by_scale"]
        assert list(by_scale) == ["1x1", "2x2", "3x3", "4x4", "5x5", "6x6", "8x8"]
        for figures in by_scale.values():
            assert set(figures) == {"psnr", "ssim", "l1", "use", "perplexity"}
            assert 0 < figures["use"] <= 1
            assert 1 <= figures["perplexity"] <= 16
        assert line["measured"]["loss"] == by_scale["8x8"]["l1"]


def test_quality_by_scale_against_plain_arithmetic(small_tokenizer: Tokenizer) -> None:
    batches = [torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(2)]
    scales = quality_by_scale(small_tokenizer, batches, Schedule(((1, 1), (4, 6))))
    assert [scale.size for scale in scales] == [(1, 1), (4, 6)]
    (codes,) = small_tokenizer.codes(small_tokenizer.features(batches[1]), [(4, 6)])
    error = (small_tokenizer.decode(codes).clamp(-1, 1) - batches[1]).square().mean((1, 2, 3)) / 4
    assert scales[1].psnr[2:] == pytest.approx((-10 * error.log10()).tolist(), rel=1e-4)
    assert scales[0].counts.sum() == 4
    assert scales[1].counts.sum() == 4 * 24
    assert scales[0].use <= use_of_all(scales) <= 1
    assert 1 <= scales[1].perplexity <= 48


def test_begins_from_the_encoder_and_decoder_of_a_file_with_other_codes(tmp_path: Path, capsys) -> None:
    """As LlamaGen's VQ-16 has: the same layers, 16384 codes of width 8."""
    shape = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1, "z_channels": 8, "norm_groups": 4}
    theirs = Tokenizer(TokenizerConfig(**shape, codebook_size=64, code_width=8))  # type: ignore[arg-type]
    torch.save({"model": to_released(theirs)}, tmp_path / "vq.pt")
    words = [f"init_from={tmp_path / 'vq.pt'}", "steps=1", "optimiser.learning_rate=1e-12", "optimiser.weight_decay=0"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), *words]) == 0
    assert "has other codes; they begin anew" in capsys.readouterr().err
    ours = load(tmp_path / "tokenizer" / "model").tokenizer
    assert ours.config.codebook_size == 16
    for name, tensor in theirs.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


def test_begins_from_a_model_with_the_same_codes(tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path))]) == 0
    before = load(tmp_path / "tokenizer" / "model").tokenizer.state_dict()
    still = ["steps=1", "optimiser.learning_rate=1e-12", "optimiser.weight_decay=0", "restart_every=0"]
    again = tokenizer_config(tmp_path, name="again")
    assert main(["train", "tokenizer", str(again), f"init_from={tmp_path / 'tokenizer' / 'model'}", *still]) == 0
    after = load(tmp_path / "again" / "model").tokenizer.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    other = tokenizer_config(tmp_path, name="other")
    assert main(["train", "tokenizer", str(other), f"init_from={tmp_path / 'again' / 'model'}", "model.channels=16"]) == 2
    assert "does not fit the config's model: encoder." in capsys.readouterr().err


def test_the_decoder_alone_learns_to_paint_the_codes_that_are_there(tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path))]) == 0
    before = tmp_path / "tokenizer" / "model"
    words = ["learns=decoder", "adversary.weight=0.5", "adversary.start=1", "adversary.channels=8", "adversary.layers=1", "smallest=8"]
    for name, pieces in (("whole", [4]), ("pieces", [2, 4])):
        config = tokenizer_config(tmp_path, name=name)
        config.write_text(config.read_text().replace("restart_every: 2\n", ""))
        for steps in pieces:
            told = [f"init_from={before}", f"steps={steps}", "optimiser.flat=1", *words]
            assert main(["train", "tokenizer", str(config), *told]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "pieces")
    assert not {"codebook", "commitment"} & reports(tmp_path / "whole")[-1].keys()  # nothing of them can learn
    theirs, ours = (load(folder).tokenizer.state_dict() for folder in (before, tmp_path / "whole" / "model"))
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]) != name.startswith(("decoder.", "after_codes.")), name


def test_a_decoder_cannot_learn_codes_that_are_not_there(tmp_path: Path, capsys) -> None:
    config = tokenizer_config(tmp_path)
    config.write_text(config.read_text().replace("restart_every: 2\n", ""))
    assert main(["train", "tokenizer", str(config), "steps=1"]) == 0
    begun = f"init_from={tmp_path / 'tokenizer' / 'model'}"
    for words, told in (
        ([], "learns is decoder; name the tokenizer whose codes it is to paint as init_from"),
        (
            [begun, "continuous=0.25"],
            "continuous means nothing to a run in which only the decoder learns; remove it",
        ),
        ([begun, "model.codebook_size=32"], "has other codes than the config's model: quantizer.codebook does not fit"),
    ):
        assert main(["train", "tokenizer", str(config), f"run={tmp_path / 'decoder'}", "learns=decoder", *words]) == 2
        assert told in capsys.readouterr().err


def test_beginning_from_a_deeper_model_leaves_nothing_out_unsaid(tmp_path: Path, capsys) -> None:
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path)), "model.blocks=2", "steps=1"]) == 0
    words = [f"init_from={tmp_path / 'tokenizer' / 'model'}", "steps=1"]
    assert main(["train", "tokenizer", str(tokenizer_config(tmp_path, name="shallow")), *words]) == 2
    assert "does not fit the config's model: it has a" in capsys.readouterr().err


def test_codes_are_the_same_under_autocast(tmp_path: Path) -> None:
    """In half precision near codes would be taken for each other."""
    workshop, _ = workshop_of(tmp_path, "model.codebook_size=512")
    features = torch.randn(4, 16, 16, 4)
    plain = workshop.tokenizer.quantizer.nearest(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(workshop.tokenizer.quantizer.nearest(features), plain)
        assert losses.entropy(features, workshop.tokenizer.quantizer.codebook).dtype == torch.float32
