"""Faster ways to run the loop over scales, chosen by `pipe.compile()`: the same pictures up to rounding.

CPU, float32: the blocks' weights are laid out for oneDNN, and the C library keeps the memory of one picture for the next.
CUDA: each half of a block and the decoder become few kernels (torch.compile), codes are chosen by one Triton kernel, and all scales with
the decoding are recorded once as a CUDA graph: nothing is launched or waited for between scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from flexvar.generation import Choose, Draw, Request, Step, draw_scales
from flexvar.linear import can_pack, pack
from flexvar.processes import keep_memory
from flexvar.sampling import Guidance, Sampling, choose
from flexvar.schedule import Schedule
from flexvar.tokenizer import Tokenizer
from flexvar.transformer import Transformer

MOST_RECORDINGS = 4
"""Each holds the memory of its whole drawing; the one unused for longest goes first."""

Work: TypeAlias = Callable[[], list[Tensor]]


def compiled(tokenizer: Tokenizer, transformer: Transformer) -> Draw:
    """Prepares both networks for the device that they are on, for good; gives the way to draw with them. On MPS nothing changes."""
    device = transformer.head.weight.device.type
    if device == "cpu":
        keep_memory()
        if can_pack(transformer):
            pack(transformer)
    elif device == "cuda":
        fuse(tokenizer, transformer)
        return Recorded(cuda_graph, fused_choose())
    return draw_scales


def fuse(tokenizer: Tokenizer, transformer: Transformer) -> None:
    """Lets torch.compile join what stands between the large products; it compiles when it first draws, again for few other shapes."""
    tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tokenizer.decoder.forward = torch.compile(tokenizer.decoder.forward)  # type: ignore[method-assign]
    for block in transformer.layers:
        block.before = torch.compile(block.before, dynamic=True)  # type: ignore[method-assign]
        block.after = torch.compile(block.after, dynamic=True)  # type: ignore[method-assign]


def fused_choose() -> Choose:
    """The Triton kernel, or the plain way where there is no Triton."""
    try:
        from flexvar.fused_sampling import choose as fused
    except ModuleNotFoundError:
        return choose
    return fused


def cuda_graph(work: Work) -> tuple[list[Tensor], Callable[[], None]]:
    """Records work on the GPU; gives the tensors that it fills and the function that fills them again."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # kernels are compiled, and libraries choose theirs, before anything is recorded
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = work()
    return filled, graph.replay


@dataclass
class Recording:
    """One drawing as it was recorded: it reads `labels` and `numbers` and fills the codes of every scale and, last, the pictures."""

    labels: Tensor  # (B,)
    numbers: Tensor  # (B, L)
    filled: list[Tensor]
    replay: Callable[[], None]

    def run(self, labels: Tensor, numbers: Tensor) -> list[Tensor]:
        """Codes and pictures of at most B labels; the other places of the batch draw what they drew before."""
        count = len(labels)
        self.labels[:count] = labels
        self.numbers[:count] = numbers
        self.replay()
        return [tensor[:count].clone() for tensor in self.filled]


class Recorded:
    """Draws by recordings: one for each schedule, guidance, sampling and largest batch. A scale is given out when all are drawn.

    What is kept of given pictures changes from call to call: edits take the plain loop.
    """

    def __init__(self, record: Callable[[Work], tuple[list[Tensor], Callable[[], None]]], choose: Choose) -> None:
        self.record, self.choose = record, choose
        self.recordings: dict[tuple[Schedule, Guidance, Sampling, int], Recording] = {}

    @torch.no_grad()
    def __call__(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Iterator[Step]:
        if request.keep is not None:
            yield from draw_scales(tokenizer, transformer, request, self.choose)
            return
        *codes, images = self._recording(tokenizer, transformer, request).run(request.labels, request.numbers)
        for k, size in enumerate(request.schedule):
            last = k == len(request.schedule) - 1
            yield Step(k, size, codes[k], (lambda _: images) if last else tokenizer.decode)

    def _recording(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Recording:
        """The one with the smallest batch that holds the request, or a new one."""
        settings, pictures = (request.schedule, request.guidance, request.sampling), len(request.labels)
        fitting = [key for key in self.recordings if key[:3] == settings and key[3] >= pictures]
        key = min(fitting, key=lambda key: key[3], default=(*settings, pictures))
        recording = self.recordings.pop(key, None)
        if recording is None:
            while len(self.recordings) >= MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]
            recording = self._recorded(tokenizer, transformer, request)
        self.recordings[key] = recording  # as the latest one
        return recording

    def _recorded(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Recording:
        own = replace(request, labels=request.labels.clone(), numbers=request.numbers.clone())

        def work() -> list[Tensor]:
            steps = list(draw_scales(tokenizer, transformer, own, self.choose))
            return [*(step.codes for step in steps), steps[-1].images]

        return Recording(own.labels, own.numbers, *self.record(work))
