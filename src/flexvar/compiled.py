"""Faster ways to run the loop over scales, chosen by `pipe.compile()`: the same pictures up to rounding.

CPU: the C library keeps the memory of one picture for the next; in float32, and in bfloat16 with AVX-512, the transformer's weights are
laid out for oneDNN; with AVX-512 attention is computed by convolutions; in float32 the tokenizer convolves with fewer products.
CUDA: each half of a block and the decoder become few kernels (torch.compile), codes are chosen by one Triton kernel, and all scales with
the decoding are recorded once as a CUDA graph: nothing is launched or waited for between scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from threading import Lock, RLock
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.compiler import config as compiler
from torch.fx.experimental import _config as shapes

from flexvar.attention import by_convolutions
from flexvar.generation import Choose, Draw, Recipe, Request, Step, draw_scales
from flexvar.linear import can_pack, exchange_projection, pack, plain_linear
from flexvar.memory import is_out_of_memory
from flexvar.processes import keep_memory
from flexvar.products import convolving_pays
from flexvar.tokenizer import Tokenizer
from flexvar.tokenizer.networks import Convolution, Upsample
from flexvar.transformer import Transformer

MOST_RECORDINGS = 4
"""Each holds the memory of its whole drawing. All are dropped before a fifth is made.

All, because of torch 2.13: a dropped recording takes the cuBLAS workspaces of its stream along (pytorch issue 193402), and torch hands out
32 streams in turn. One that stayed while others came and went would in time share a stream with one of those, and lose its workspaces.
Five recipes in rotation, or a new one for every picture, are so recorded anew each time, which draws each picture three times: drawing
without `pipe.compile()` is faster then.
"""

MOST_COMPILATIONS = 64
"""Of one function, by torch.compile: what comes after runs uncompiled, for good. All models of a process count together: torch's own
limit, 8, is passed by the third one that draws with and without guidance.
"""

T = TypeVar("T")

Work: TypeAlias = Callable[[], list[Tensor]]
Record: TypeAlias = Callable[[Work], tuple[list[Tensor], Callable[[], None]]]


COMPILING = Lock()
"""Networks are changed by one thread at a time."""


def compiled(tokenizer: Tokenizer, transformer: Transformer) -> Draw:
    """Prepares both networks for the device that they are on, for good; gives the way to draw with them. On MPS nothing changes.

    A transformer that is changed can be neither moved, copied nor saved any more (`Transformer.made_faster`). Another pipeline may have
    prepared it before. On a CPU this sets the C library of the whole process (`keep_memory`). Raises ModuleNotFoundError on CUDA
    without Triton.
    """
    with COMPILING:
        if transformer.device.type == "cpu":
            _compile_for_cpu(tokenizer, transformer)
        elif transformer.device.type == "cuda":
            return _compiled_for_cuda(tokenizer, transformer)
    return draw_scales


def _compile_for_cpu(tokenizer: Tokenizer, transformer: Transformer) -> None:
    """Changes both networks; the loop stays."""
    keep_memory()
    packs, exact = can_pack(transformer.device, transformer.dtype), transformer.dtype == torch.float32
    if packs and "compiled" not in transformer.made_faster:
        pack(transformer)
        if convolving_pays():
            for block in transformer.layers:
                block.attention.attend = by_convolutions
    if exact:
        save_products(tokenizer)
    if packs or exact:
        transformer.made_faster |= {"compiled"}


def _compiled_for_cuda(tokenizer: Tokenizer, transformer: Transformer) -> Draw:
    """Changes both networks, and gives the way to draw by recordings."""
    if find_spec("triton") is None:
        raise ModuleNotFoundError("compiling for CUDA needs Triton, which torch brings along on Linux; install it, or draw without")
    from flexvar.fused_sampling import choose

    if "compiled" not in transformer.made_faster:
        fuse(transformer)
    tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    transformer.made_faster |= {"compiled"}
    return Recorded(cuda_graph, choose, torch.compile(tokenizer.decode))


def save_products(tokenizer: Tokenizer) -> None:
    """Has the tokenizer convolve with fewer products; what is saved stays the same."""
    for module in tokenizer.modules():
        if isinstance(module, Convolution):
            module.use_winograd()
        elif isinstance(module, Upsample):
            module.fold()


def fuse(transformer: Transformer) -> None:
    """Lets torch.compile join what stands between the large products; it compiles when it first draws, once for all blocks."""
    for block in transformer.layers:
        if block.attention.joined is None:
            exchange_projection(block.attention, plain_linear)  # whose bias is joined once, not at every call
        block.before = torch.compile(block.before, dynamic=True)  # type: ignore[method-assign]
        block.after = torch.compile(block.after, dynamic=True)  # type: ignore[method-assign]


def cuda_graph(work: Work) -> tuple[list[Tensor], Callable[[], None]]:
    """Records work on the current GPU; gives the tensors that it fills and the function that fills them again.

    On a stream of its own: recordings of one stream share its workspaces, which go with the first of them (see MOST_RECORDINGS).
    """
    current, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(current)
    try:
        with torch.cuda.stream(aside):
            for _ in range(2):  # kernels are compiled, and libraries choose theirs, before anything is recorded
                work()
        current.wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            filled = work()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own
    return filled, graph.replay


@dataclass
class Recording:
    """One drawing as it was recorded: it reads `labels` and `numbers` and fills the codes of every scale, their totals and the pictures."""

    labels: Tensor  # (B,)
    numbers: Tensor  # (B, L)
    filled: list[Tensor]
    replay: Callable[[], None]

    def run(self, labels: Tensor, numbers: Tensor) -> list[Tensor]:
        """Codes, totals and pictures of at most B labels; the other places of the batch draw what they drew before."""
        count = len(labels)
        self.labels[:count] = labels
        self.numbers[:count] = numbers
        self.replay()
        return [tensor[:count].clone() for tensor in self.filled]


class Recorded:
    """Draws by recordings: one for each recipe and batch. A scale is given out when all are drawn.

    A smaller batch takes the recording of one up to twice as large. What is kept of given pictures changes from call to call: edits take
    the plain loop. Threads take turns, and so do their streams. Where memory runs out, all recordings go and it is tried once more.
    Recordings point at the networks that they were made with: ValueError for others.
    """

    def __init__(self, record: Record, choose: Choose, decode: Callable[[Tensor], Tensor]) -> None:
        self.record, self.choose, self.decode = record, choose, decode
        self.recordings: dict[tuple[Recipe, int], Recording] = {}
        self.networks: tuple[Tokenizer, Transformer] | None = None  # those of the first drawing
        self.turn = RLock()
        self.done: torch.cuda.Event | None = None  # the latest drawing, on whichever stream: the next one fills the same tensors

    @torch.no_grad()
    def __call__(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Iterator[Step]:

        def decode(codes: Tensor) -> Tensor:
            return self.making_room(lambda: tokenizer.decode(codes))

        self.networks = self.networks or (tokenizer, transformer)
        if self.networks[0] is not tokenizer or self.networks[1] is not transformer:
            raise ValueError("this way to draw holds recordings of other networks; make one for each pair with flexvar.compiled.compiled")
        if request.keep is not None:
            for step in self.making_room(lambda: list(draw_scales(tokenizer, transformer, request, self.choose))):
                yield replace(step, decode=decode)
            return
        *codes, totals, images = self.making_room(lambda: self._drawn(tokenizer, transformer, request))
        for k, size in enumerate(request.recipe.schedule):
            last = k == len(request.recipe.schedule) - 1
            yield Step(k, size, codes[k], (lambda given: images if given is codes[-1] else decode(given)) if last else decode, totals[:, k])

    def recorded_batch(self, recipe: Recipe) -> int:
        """The largest batch of this recipe that is recorded, and so has its memory already; 0 if none is."""
        with self.turn:
            return max((batch for recorded, batch in self.recordings if recorded == recipe), default=0)

    def _drawn(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> list[Tensor]:
        """The codes of every scale, their totals (B, K) and the pictures."""
        device = request.numbers.device
        with self.turn, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            recording = self._recording(tokenizer, transformer, request)
            if self.done is not None:
                self.done.wait()
            drawn = recording.run(request.labels, request.numbers)
            if device.type == "cuda":
                self.done = torch.cuda.current_stream().record_event()
        return drawn

    def _recording(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Recording:
        """The one with the smallest batch that fits the request, or a new one."""
        recipe, pictures = request.recipe, len(request.labels)
        fitting = [batch for recorded, batch in self.recordings if recorded == recipe and pictures <= batch <= 2 * pictures]
        if fitting:
            return self.recordings[recipe, min(fitting)]
        if len(self.recordings) >= MOST_RECORDINGS:
            self._clear()
        recording = self._recorded(tokenizer, transformer, request)
        self.recordings[recipe, pictures] = recording
        return recording

    def making_room(self, work: Callable[[], T]) -> T:
        """What the work gives; where memory runs out, it is tried again without the recordings. All that may compile goes through here."""
        # Sides of tensors that are equal by chance, as a batch and a scale, are not taken for the same one when it compiles.
        with shapes.patch(use_duck_shape=False), compiler.patch(recompile_limit=MOST_COMPILATIONS):  # type: ignore[attr-defined]
            try:
                return work()
            except Exception as error:
                if not self.recordings or not is_out_of_memory(error):
                    raise
            self._clear()  # out here the error, which holds the tensors of what failed, is gone
            return work()

    def _clear(self) -> None:
        with self.turn:
            for recording in self.recordings.values():
                if recording.labels.is_cuda:
                    torch.cuda.synchronize(recording.labels.device)  # another stream may still be running it
            self.recordings.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _recorded(self, tokenizer: Tokenizer, transformer: Transformer, request: Request) -> Recording:
        with torch.inference_mode(False), torch.no_grad():
            own = replace(request, labels=request.labels.clone(), numbers=request.numbers.clone())

            def work() -> list[Tensor]:
                steps = list(draw_scales(tokenizer, transformer, own, self.choose))
                totals = torch.stack([step.total for step in steps], 1)  # (B, K)
                return [*(step.codes for step in steps), totals, self.decode(steps[-1].codes)]

            return Recording(own.labels, own.numbers, *self.record(work))
