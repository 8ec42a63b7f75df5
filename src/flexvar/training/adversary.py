"""The tokenizer's adversary: a network that learns to tell real pictures from rebuilt ones, and the losses of both sides."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from flexvar.tokenizer.networks import group_norm

LARGEST_MULTIPLE = 8  # of the first layer's channels
GROUPS, CHANNELS_A_GROUP = 32, 4  # at most, at least


class Discriminator(nn.Module):
    """PatchGAN: a logit for every patch of a picture, real above 0 and rebuilt below (Isola et al. 2017, as in LlamaGen).

    channels: of the first layer; they double from layer to layer, up to 8 times. layers: how many halve the resolution; with 3, a patch is
    70 x 70 px. Group normalisation stands in place of their batch normalisation, with which the loss of a picture would depend on the
    other pictures that its process happens to hold. Raises ValueError for numbers below 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or layers < 1:
            raise ValueError(f"a discriminator of {layers} layers from {channels} channels cannot be; give at least 1 of both")
        self.layers = layers
        widths = [channels * min(2**level, LARGEST_MULTIPLE) for level in range(layers + 1)]
        body: list[nn.Module] = []
        for level, (inside, outside) in enumerate(zip([3, *widths], widths, strict=False)):
            body.append(nn.Conv2d(inside, outside, 4, stride=2 if level < layers else 1, padding=1))
            if level:
                # A group of one channel would lose its mean, and all it holds where the map has a single position.
                body.append(group_norm(outside, max(1, min(GROUPS, outside // CHANNELS_A_GROUP))))
            body.append(nn.LeakyReLU(0.2))
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for name, parameter in self.body.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 4:
                nn.init.normal_(parameter, std=0.02)

    @property
    def smallest(self) -> int:
        """The smallest side in px of a picture that it can judge: 24 with 3 layers. The last two convolutions take a position each."""
        return 3 * 2**self.layers

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 1, h, w), h = H // 2^layers - 2, of pictures (B, 3, H, W) in [-1, 1]. ValueError below `smallest`."""
        if min(pictures.shape[-2:]) < self.smallest:
            height, width = pictures.shape[-2:]
            raise ValueError(f"pictures of {height} x {width} px are too small to judge; give sides of at least {self.smallest} px")
        return self.body(pictures)  # (B, 1, h, w)


def judged_without_learning(discriminator: Discriminator, pictures: Tensor) -> Tensor:
    """The discriminator's logits, with gradients for the pictures and none for its own weights.

    So the losses of both sides can be added up and both learn from one backward pass, each from its own.
    """
    detached = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Tensor = functional_call(discriminator, detached, (pictures,))
    return logits  # (B, 1, h, w)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss, a scalar: 0 where all real patches are above 1 and all rebuilt ones below -1."""
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The tokenizer's adversarial loss, a scalar: the lower, the more real its pictures look to the discriminator."""
    return -fake_logits.float().mean()
