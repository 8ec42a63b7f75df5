"""What the loop needs of the thing that is trained."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from flexvar.checkpoint import Model
from flexvar.training.meter import Figures, Work
from flexvar.training.order import Batch


class Workshop(nn.Module):
    """What is trained: a module whose forward takes a batch and gives the loss and the figures to report."""

    def __init__(self) -> None:
        super().__init__()
        self.adversary: nn.Module | None = None  # a part that learns beside the network, from the same loss, and is not kept
        self.adversary_rate = 1.0  # its learning rate over the network's

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The part whose weights are learnt, averaged and kept."""

    def forward(self, batch: Batch) -> tuple[Tensor, Figures]:
        """What to descend on, and figures to report, "loss" among them."""
        return self.loss(self.network, batch)

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        """The same for a network in training or evaluation mode, as means over the batch."""

    def work(self, batch: Batch) -> Work:
        """Tokens and FLOPs of a training step on this batch; nothing where they are not counted."""
        return Work()

    def after_step(self, step: int, optimiser: torch.optim.Optimizer) -> None:
        """Runs when a step is done, for what is not learnt by gradients."""

    def speed_up(self) -> None:
        """Runs before the first step of a piece of the run, when its weights and their averages are in place."""

    @abstractmethod
    def measured(self, network: nn.Module, batches: list[Batch]) -> dict[str, Any]:
        """How good a network in evaluation mode is on some batches, "loss" first: less is better."""

    def scored(self, network: nn.Module, step: int, *, again: bool = True) -> dict[str, float]:
        """Scores of pictures drawn by the model just saved, where the step is one to score; on other processes than the first nothing.

        All processes must call it. network: that of the saved model. again: also where this step was scored already.
        """
        return {}

    @abstractmethod
    def sheet(self, network: nn.Module, out: BinaryIO) -> None:
        """Draws a picture to look at, with the averaged weights."""

    @abstractmethod
    def finished(self, network: nn.Module, provenance: dict[str, Any]) -> Model:
        """The model to keep, with the averaged weights."""
