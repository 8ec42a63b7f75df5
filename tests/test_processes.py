"""One process or many: the device of each, and how a group of them ends. Where a GPU would be needed, a stand-in says that it is there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flexvar import processes
from flexvar.processes import pick_device, without_tf32


def test_more_processes_than_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="finds 2 GPUs, and each needs its own; start --nproc-per-node 2"):
        pick_device()


def test_processes_that_exchange_tensors_do_not_lie_on_mps(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(exchanging=True).type == "mps"  # one process has nobody to exchange them with
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device().type == "mps"
    assert pick_device(exchanging=True).type == "cpu"


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """The groups that were ended, by backend; no real ones are made."""
    made: list[str] = []
    ended: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: made.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(made[-1]))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return ended


@pytest.mark.parametrize(("device", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_a_group_ends_with_its_work(device: str, backend: str, ended: list[str]) -> None:
    with processes.processes(torch.device(device)) as place:
        assert place == (1, 2)
    assert ended == [backend]


@pytest.mark.parametrize(("device", "left"), [("cuda", []), ("cpu", ["gloo"])])
def test_a_process_that_fails_does_not_wait_for_the_others(device: str, left: list[str], ended: list[str]) -> None:
    """NCCL would, and they for this one: no error would be seen."""
    with pytest.raises(OSError, match="disk"), processes.processes(torch.device(device)):
        raise OSError("the disk is full")
    assert ended == left


def test_rounded_convolutions_come_back_when_the_last_thread_is_done() -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which the older switch still tells
    one, other = without_tf32(), without_tf32()
    one.__enter__()
    other.__enter__()  # by another thread, say, which is done later
    one.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    other.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32
    with without_tf32():
        pass
    assert torch.backends.cudnn.allow_tf32


def test_somebody_may_have_used_the_newer_switch() -> None:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with without_tf32():
            assert convolutions.fp32_precision in ("ieee", "none")
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before
