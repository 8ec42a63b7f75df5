"""One process or many: which device it has, how it joins the others, what it does with freed memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

# Its functions keep the group of the moment when they are imported, if there is one. It would outlive `processes`, and with it threads that
# abort the process, now and then, when they free a tensor while the interpreter ends. So here, before there is one.
import torch.distributed.nn

CUDNN: Any = torch.backends.cudnn

MOST_WORKERS = 8
"""Processes that prepare pictures, beside one training process, where their number is left to us."""


def pick_device(exchanging: bool = False) -> torch.device:
    """The accelerator of this process, or the CPU.

    exchanging: several processes will exchange tensors. Then it is the CPU on a Mac: gloo does not carry tensors that lie on MPS.

    Raises ValueError for more processes than this machine has GPUs.
    """
    if torch.cuda.is_available():
        number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= there:
            raise ValueError(f"process {number} of this machine finds {there} GPUs, and each needs its own; start --nproc-per-node {there}")
        return torch.device("cuda", number)
    alone = not exchanging or int(os.environ.get("WORLD_SIZE", 1)) == 1
    return torch.device("mps" if torch.backends.mps.is_available() and alone else "cpu")


@contextmanager
def processes(device: torch.device, patience: timedelta | None = None) -> Iterator[tuple[int, int]]:
    """Joins the other processes when started by `torchrun`; gives (rank, number of processes).

    patience: how long one waits for the others before it gives up; torch's own default where it is None.
    Raises OSError, in one line with the rank and what it was at, for a process that waited in vain or lost the others.
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, finished = "nccl" if device.type == "cuda" else "gloo", False
    dist.init_process_group(backend, timeout=patience)
    try:
        yield dist.get_rank(), dist.get_world_size()
        finished = True
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise OSError(_of_the_others(error)) from error
    finally:
        if finished or backend == "gloo":  # NCCL waits here for the others, who may be waiting for this process: it leaves them by ending
            dist.destroy_process_group()
            gc.collect()  # a DistributedDataParallel holds the group, and itself


def rank() -> int:
    """The number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def _of_the_others(error: RuntimeError) -> str:
    """What happened to one process because of another, and what it was at: the innermost function of ours."""
    said = " ".join(str(error).split())
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(Path(__file__).parent)]
    at = f"{Path(ours[-1].filename).name}, {ours[-1].name}"
    waited = any(word in said.lower() for word in ("timed out", "timeout"))
    what = "waited for another one in vain, which hangs or has ended" if waited else "lost another one, whose own line says why"
    return f"process {rank()} of {world_size()} (from 0) {what}; it was at {at}: {said[:200]}"


def forbid_cudnn_attention() -> None:
    """Attention by other kernels: cuDNN plans anew for each set of lengths and strides, and random schedules hardly ever repeat one."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def forbid_tf32() -> None:
    """No TensorFloat-32, which torch allows convolutions by default: features and codes would be those of rounded pictures."""
    CUDNN.allow_tf32 = False


_precision = Lock()
_allowed_before: list[tuple[str, str]] = []  # what each thread found that is inside `without_tf32`, the first one first


@contextmanager
def without_tf32() -> Iterator[None]:
    """`forbid_tf32` for a while, or for all calls of the function that it decorates: until the last thread that asked for it is done."""
    with _precision:
        # By torch's newer switches: the older one cannot be read where somebody has used these.
        _allowed_before.append((CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision))
        forbid_tf32()
    try:
        yield
    finally:
        with _precision:
            first = _allowed_before[0]
            _allowed_before.pop()
            if not _allowed_before:
                CUDNN.allow_tf32 = first == ("tf32", "tf32")
                CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = first


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next step, where it is glibc, instead of giving it back to the system.

    Otherwise each step gets gigabytes anew, which the system fills with zeros page by page. It holds for the whole process and all that
    runs in it, until it ends: C libraries do not tell how they were set, so that nothing can be put back.
    """
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(trim_threshold, -1)  # never
        mallopt(most_mappings, 0)  # large pieces come from the heap too


def kept_memory() -> int:
    """Bytes that the C library holds while nothing uses them, where it is a glibc that tells; 0 elsewhere."""
    if sys.platform != "linux" or not (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)):
        return 0
    mallinfo.restype = _MallocInfo
    return int(mallinfo().fordblks)


class _MallocInfo(ctypes.Structure):
    """The struct mallinfo2 of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )
