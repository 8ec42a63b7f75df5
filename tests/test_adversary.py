"""The discriminator learns, judges every picture by itself, and shares one backward pass with the tokenizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flexvar.training.adversary import Discriminator, generator_loss, hinge_loss, judged_without_learning


@pytest.fixture
def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(channels=8, layers=2)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_the_smallest_picture_is_found_by_trying(layers: int) -> None:
    discriminator = Discriminator(channels=2, layers=layers)

    def positions(side: int) -> int:
        try:
            return discriminator.body(torch.zeros(1, 3, side, side)).numel()
        except RuntimeError:
            return 0

    least = next(side for side in range(1, 200) if positions(side))
    assert discriminator.smallest == least
    assert discriminator(torch.zeros(2, 3, least, least + 2**layers)).shape == (2, 1, 1, 2)
    for height, width in [(least - 1, 2 * least), (2 * least, least - 1)]:
        with pytest.raises(ValueError, match=f"{height} x {width} px are too small to judge; give sides of at least {least} px"):
            discriminator(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (31, 64), (47, 30), (256, 40)])
def test_a_logit_a_patch(height: int, width: int) -> None:
    logits = Discriminator(channels=4)(torch.zeros(1, 3, height, width))
    assert logits.shape == (1, 1, height // 8 - 2, width // 8 - 2)


def test_the_published_shape() -> None:
    discriminator = Discriminator()
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(module.weight.shape) for module in convolutions] == [
        (64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)
    ]  # fmt: skip
    assert [module.stride[0] for module in convolutions] == [2, 2, 2, 1, 1]
    assert [module.negative_slope for module in discriminator.modules() if isinstance(module, nn.LeakyReLU)] == [0.2] * 4
    norms = [module for module in discriminator.modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(32, 128), (32, 256), (32, 512)]
    for module in convolutions:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.bias is not None
        assert not module.bias.any()
    widths = [module.out_channels for module in Discriminator(channels=2, layers=6).modules() if isinstance(module, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 16, 1]
    for channels, layers in [(0, 3), (64, 0)]:
        with pytest.raises(ValueError, match="give at least 1 of both"):
            Discriminator(channels, layers)


def test_a_patch_is_70_px() -> None:
    layers = [layer for layer in Discriminator(channels=4).body if not isinstance(layer, nn.GroupNorm)]  # whose statistics span the picture
    pictures = torch.randn(1, 3, 160, 160, requires_grad=True)
    nn.Sequential(*layers)(pictures)[0, 0, 9, 9].backward()
    assert pictures.grad is not None
    seen = pictures.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("channels", [1, 4, 16, 20])
def test_even_a_single_position_says_something(channels: int) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(channels)
    first, second = discriminator(torch.rand(2, 3, discriminator.smallest, discriminator.smallest) * 2 - 1)
    assert first != second


def test_a_picture_is_judged_by_itself(discriminator: Discriminator) -> None:
    pictures = torch.rand(4, 3, 24, 20) * 2 - 1
    together = discriminator.train()(pictures)
    for picture, logits in zip(pictures, together, strict=True):
        assert torch.allclose(discriminator(picture[None])[0], logits, atol=1e-6)


def test_values() -> None:
    real, fake = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, 0.0, 2.0])
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 0 + 0.5 + 2) / 4 + (0 + 0 + 1 + 3) / 4) / 2)
    assert hinge_loss(fake[:2], real[:1]).item() == pytest.approx(((4 + 2) / 2 + 3) / 2)
    assert generator_loss(fake).item() == 0.5
    assert hinge_loss(torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 5, 5), -1.5)).item() == 0
    assert hinge_loss(real.bfloat16(), fake.bfloat16()).dtype == generator_loss(fake.bfloat16()).dtype == torch.float32


def test_each_side_learns_from_its_own_loss_in_one_backward_pass(discriminator: Discriminator) -> None:
    real = torch.rand(2, 3, 16, 16) * 2 - 1
    rebuilt = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()

    hinge_loss(discriminator(real), discriminator(rebuilt.detach())).backward()
    assert rebuilt.grad is None
    alone = gradients(discriminator)
    assert all(gradient is not None and gradient.any() for gradient in alone[:-1])  # the last bias is pulled both ways alike
    (of_tokenizer,) = torch.autograd.grad(generator_loss(discriminator(rebuilt)), rebuilt)
    assert of_tokenizer.any()

    discriminator.zero_grad()
    logits = judged_without_learning(discriminator, rebuilt)
    assert torch.equal(logits, discriminator(rebuilt))
    loss = generator_loss(logits) + hinge_loss(discriminator(real), discriminator(rebuilt.detach()))
    loss.backward()
    assert rebuilt.grad is not None
    assert torch.equal(rebuilt.grad, of_tokenizer)
    for together, by_itself in zip(gradients(discriminator), alone, strict=True):
        assert together is not None
        assert by_itself is not None
        assert torch.allclose(together, by_itself, atol=1e-7)


def test_judging_alone_leaves_no_gradient_and_no_trace(discriminator: Discriminator) -> None:
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    pictures = torch.randn(1, 3, 16, 16, requires_grad=True)
    generator_loss(judged_without_learning(discriminator, pictures)).backward()
    assert pictures.grad is not None
    assert pictures.grad.any()
    assert gradients(discriminator) == [None] * len(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in discriminator.state_dict().items())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def striped(count: int, period: int, random: torch.Generator) -> Tensor:
    """Pictures (count, 3, 24, 24) of slanted stripes at random places, with noise."""
    places = torch.arange(24.0)
    phases = torch.rand(count, 3, 1, 1, generator=random) * 6.3
    return torch.sin((places[:, None] + places) * 6.283 / period + phases) + 0.1 * torch.randn(count, 3, 24, 24, generator=random)


def test_a_few_steps_tell_two_kinds_of_pictures_apart(discriminator: Discriminator) -> None:
    random = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(discriminator.parameters(), 2e-3, (0.5, 0.9))
    losses = []
    for _ in range(30):
        loss = hinge_loss(discriminator(striped(8, 12, random)), discriminator(striped(8, 6, random)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)  # untrained, it says nothing
    assert losses[-1] < 0.3
    with torch.no_grad():
        assert discriminator(striped(20, 12, random)).mean((1, 2, 3)).min() > discriminator(striped(20, 6, random)).mean((1, 2, 3)).max()
