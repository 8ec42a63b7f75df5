from __future__ import annotations

import copy
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexvar import FlexVARPipeline, Guidance, Schedule, Tokenizer, Transformer, generation, memory
from flexvar.accounting import plan
from flexvar.checkpoint import Defaults, Model
from flexvar.cli import main
from flexvar.counting import LiveBytes, encoding_memory
from flexvar.memory import MemoryNeed, free_memory, in_parts, is_out_of_memory
from flexvar.processes import kept_memory

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def need(small_tokenizer: Tokenizer, small_transformer: Transformer) -> MemoryNeed:
    """A guided batch of 4 pictures of 96 x 160 px."""
    schedule = Schedule.for_grid(24, 40, 6, 4)
    return MemoryNeed(small_transformer.config, small_tokenizer.config, schedule, 4, True, torch.float32, torch.device("cpu"))


@pytest.fixture
def pipe(small_tokenizer: Tokenizer, small_transformer: Transformer) -> FlexVARPipeline:
    return FlexVARPipeline(Model(copy.deepcopy(small_tokenizer), small_transformer, tuple("abcde"), Defaults(16, 16, 4)))


def bytes_for(need: MemoryNeed) -> int:
    how = {"batch": need.batch, "guided": need.guided, "split": need.split, "dtype": need.dtype, "int8": need.int8}
    cost = plan(need.transformer, need.tokenizer, need.schedule, **how)
    return cost.memory.peak - cost.memory.weights


@settings(deadline=None, max_examples=6)
@given(free=st.integers(0, 100 * MEBIBYTE))
def test_the_largest_size_fits_and_the_next_does_not(free: int, need: MemoryNeed) -> None:
    size = need.largest_size(free)
    h, w = size or (0, 0)
    assert w <= 40
    assert h == (max(1, round(w * 24 / 40)) if size else 0)
    if size:
        assert bytes_for(replace(need, schedule=Schedule.for_grid(h, w, len(need.schedule), 4))) <= free
    if w < 40:
        next_size = max(1, round((w + 1) * 24 / 40)), w + 1
        assert bytes_for(replace(need, schedule=Schedule.for_grid(*next_size, len(need.schedule), 4))) > free


def test_the_largest_batch_fits_and_the_next_does_not(need: MemoryNeed) -> None:
    three = bytes_for(replace(need, batch=3))
    assert [need.largest_batch(free) for free in (0, three - 1, three, 100 * three)] == [0, 2, 3, 4]


def test_the_line_names_what_fits(need: MemoryNeed) -> None:
    free = bytes_for(replace(need, batch=3))
    h, w = need.largest_size(free) or (0, 0)
    assert need.complaint(free) == (
        f"not enough memory for 4 pictures of 96 x 160 px at a time; {4 * h} x {4 * w} px or 3 at a time would fit (see `flexvar plan`)"
    )
    one = replace(need, batch=1)
    assert one.complaint(bytes_for(one) - 1) == "not enough memory for a picture of 96 x 160 px; 92 x 156 px would fit (see `flexvar plan`)"
    for unknown in (None, 0, bytes_for(need)):
        assert "free some, or take smaller pictures or a smaller batch" in need.complaint(unknown)


def test_sizes_past_counting_have_a_largest_size_too(need: MemoryNeed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_CODES", 2**10)
    vast = replace(need, schedule=Schedule.of([1, (10**22, 10**22)]))
    assert vast.largest_size(MEBIBYTE) == replace(need, schedule=Schedule.of([1, 500])).largest_size(MEBIBYTE)


def refusal(*shape: int) -> Exception:
    """What torch raises when it finds no room."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.empty(*shape)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(10**18), True),
        (refusal(10**9, 10**9, 10**9), True),
        (refusal(10**25), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("memory format option is only supported by strided tensors"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory(torch.device("cpu")) < 2**50
    assert free_memory(torch.device("meta")) is None
    for name, value in {"mem_get_info": (5, 90), "memory_reserved": 30, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    shared, recorded, elsewhere = (
        {"device": device, "segment_pool_id": pool, "total_size": 100, "allocated_size": allocated}
        for device, pool, allocated in ((0, (0, 0), 93), (0, (0, 1), 4), (1, (0, 0), 2))
    )
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [shared, recorded, elsewhere, shared])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for backend, expected in (("native", 5 + 7 + 7), ("cudaMallocAsync", 5 + 30 - 20)):
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda backend=backend: backend)
        assert free_memory(torch.device("cuda")) == free_memory(torch.device("cuda", 0)) == expected
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 50)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 20)
    assert free_memory(torch.device("mps")) == 30
    monkeypatch.setattr(memory, "PROC", Path("nowhere"))  # a machine without /proc
    assert 0 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used"),
    [
        ("0::/", ".", "memory.max", "memory.current"),  # v2, as a container sees itself
        ("0::/user.slice/job/worker", "user.slice/job", "memory.max", "memory.current"),  # v2, a limit above the process's own group
        ("7:memory:/docker/abc", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # v1, as a container sees itself
        ("7:memory:/jobs/3", "memory/jobs/3", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_limits_of_containers_count(line: str, folder: str, limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, group = tmp_path / "proc", tmp_path / "groups" / folder
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"11:cpu,cpuacct:/a:b\n{line}\n")
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   1000 kB\n")
    group.mkdir(parents=True)
    (group / used).write_text("300000\n")
    (group / "memory.stat").write_text("cache 7\ninactive_file 50000\nactive_file 9\n")
    for name, folder_of_it in (("PROC", proc), ("GROUPS", tmp_path / "groups")):
        monkeypatch.setattr(memory, name, folder_of_it)
    monkeypatch.setattr(memory, "kept_memory", lambda: 7)
    for most, left in (("500000", 250000), ("max", 1024000), ("9223372036854771712", 1024000), ("300000", 50000)):
        (group / limit).write_text(f"{most}\n")
        assert free_memory(torch.device("cpu")) == left + 7


def test_memory_that_the_c_library_keeps_is_free() -> None:
    before = kept_memory()
    several = [torch.ones(2**12) for _ in range(2000)]  # each too small for a mapping of its own
    held = kept_memory()
    last = torch.ones(1)  # above them, so that they are not given back
    del several
    assert before >= 0
    assert kept_memory() - held > 2**24 or sys.platform != "linux"
    assert last.item() == 1


def test_8_bit_weights_are_planned_as_such(need: MemoryNeed, pipe: FlexVARPipeline) -> None:
    need = replace(need, transformer=replace(need.transformer, width=256, codebook_size=8), schedule=Schedule.of([1, 2, 4]))
    plain, rounded = (bytes_for(replace(need, int8=int8)) for int8 in (False, True))
    assert rounded > plain  # in float32 the sums take more than what they replace
    assert not replace(need, int8=True).fits(plain)
    own = FlexVARPipeline(replace(pipe.model, transformer=copy.deepcopy(pipe.transformer)))
    assert not own._need(need.schedule, 1, pipe.defaults.guidance).int8
    assert own.to_int8()._need(need.schedule, 1, pipe.defaults.guidance).int8


def test_one_half_after_the_other_is_planned_as_such(need: MemoryNeed, pipe: FlexVARPipeline) -> None:
    need = replace(need, transformer=replace(need.transformer, width=256))
    assert bytes_for(replace(need, split=True)) < bytes_for(need)
    asked = replace(pipe.defaults.guidance, split=True)
    assert pipe._need(need.schedule, 1, asked).split


def test_a_cpu_refuses_what_cannot_fit_before_it_tries(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    enough = bytes_for(pipe._need(Schedule.for_grid(16, 16, 6, 4), 1, pipe.defaults.guidance))
    settings = {"height": 64, "width": 64, "seed": 0, "num_inference_steps": 6}
    monkeypatch.setattr(memory, "free_memory", lambda device: enough)
    pipe("a", **settings)
    monkeypatch.setattr(memory, "free_memory", lambda device: enough - 1)
    monkeypatch.setattr("flexvar.pipeline.generate", lambda *_, **__: pytest.fail("it was tried"))
    plain = Tokenizer.features
    monkeypatch.setattr(Tokenizer, "features", lambda self, x: plain(self, x) if x.is_meta else pytest.fail("it was tried"))
    image, whole = Image.new("L", (64, 64)), {"num_inference_steps": 6, "max_pixels": 64**2}
    for draw in (lambda: pipe("a", **settings), lambda: pipe.stream("a", **settings), lambda: pipe.refine(image, 1, "a", **whole)):
        with pytest.raises(MemoryError, match=r"a picture of 64 x 64 px; \d+ x \d+ px would fit"):
            draw()
    with pytest.raises(MemoryError, match="a picture of 128 x 128 px"):
        pipe.reconstruct(Image.new("L", (128, 128)))


def test_what_is_encoded_counts_too(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture that is refined to a small one: most of the work is its encoding."""
    words = {"height": 8, "width": 8, "strength": 0.5, "max_pixels": 128**2}
    edit = pipe.edit_of("refine", Image.new("L", (128, 128)), **words)
    drawn = pipe._need(pipe.settings.schedule_of(edit=edit), 1, pipe.defaults.guidance, edit)
    tokenizer = pipe.tokenizer
    with torch.no_grad(), LiveBytes() as live:
        tokenizer.features(edit.canvas + 0)
    encoding = encoding_memory(tokenizer.config, edit.native, 1, torch.float32)
    assert 0.9 * live.most <= encoding <= 1.3 * live.most
    assert encoding > bytes_for(drawn)
    assert drawn.fits(encoding)
    assert not drawn.fits(encoding - 1)
    one_for_all = pipe._need(drawn.schedule, 5, pipe.defaults.guidance, edit)
    assert one_for_all.fits(encoding)
    monkeypatch.setattr(memory, "free_memory", lambda device: encoding - 1)
    with pytest.raises(MemoryError, match="not enough memory for a picture of 8 x 8 px"):
        pipe.refine(Image.new("L", (128, 128)), class_labels="a", **words)


def test_pictures_are_rebuilt_in_parts_that_fit(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 24, 3), dtype=np.uint8)) for i in range(5)]
    together, sizes, plain = pipe.reconstruct(pictures, output_type="pt").images, [], Tokenizer.features
    two = bytes_for(pipe._need(Schedule(((4, 6),)), 2, Guidance("constant", 1.0)))
    monkeypatch.setattr(memory, "free_memory", lambda device: math.ceil(1.3 * two / memory.SHARE_TO_FILL))
    monkeypatch.setattr(Tokenizer, "features", lambda self, x: (x.is_meta or sizes.append(len(x)), plain(self, x))[1])
    assert torch.allclose(pipe.reconstruct(pictures, output_type="pt").images, together, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_a_single_part_is_not_copied(need: MemoryNeed) -> None:
    pictures = torch.zeros(4, 3, 96, 160)
    assert in_parts(need, lambda part: pictures[part], 4).data_ptr() == pictures.data_ptr()
    assert torch.equal(in_parts(need, lambda part: pictures[part], 3), pictures)


def test_a_batch_of_our_choice_is_halved_where_it_does_not_fit(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, settings = list("abcdeab"), {"seed": 3, "output_type": "pt"}
    expected, sizes, plain = pipe(labels, **settings, batch_size=1).images, [], Tokenizer.decode
    most = 2

    def decode(self: Tokenizer, codes: torch.Tensor) -> torch.Tensor:
        sizes.append(len(codes))
        if len(codes) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(self, codes)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    assert torch.allclose(pipe(labels, **settings).images, expected, atol=1e-5)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(MemoryError, match="not enough memory for 3 pictures"):  # a size of the caller's choice is kept
        pipe(labels, **settings, batch_size=3)
    most = 0
    with pytest.raises(MemoryError, match="not enough memory for a picture"):
        pipe(labels, **settings)


def test_as_many_are_drawn_at_the_same_time_as_fit(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"height": 16, "width": 24, "seed": 0, "output_type": "pt"}
    together = pipe(list("abcde"), **settings).images
    two = bytes_for(pipe._need(pipe.settings.schedule_of(16, 24, None, None), 2, pipe.defaults.guidance))
    sizes, draw = [], generation.generate
    monkeypatch.setattr("flexvar.pipeline.generate", lambda *given, **named: (sizes.append(len(given[2])), draw(*given, **named))[1])
    enough = math.ceil(two / memory.SHARE_TO_FILL)
    for free, expected in ((enough, [2, 2, 1]), (two, [1] * 5), (None, [5])):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        sizes.clear()
        assert torch.allclose(pipe(list("abcde"), **settings).images, together, atol=1e-5)
        assert sizes == expected


def test_what_is_drawn_and_decoded_fails_in_one_line(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    free = bytes_for(pipe._need(Schedule.for_grid(16, 16, 6, 4), 1, Guidance("constant", 2.0)))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(MemoryNeed, "refuse_what_cannot_fit", lambda self: None)  # as on a GPU
    words = r"not enough memory for 2 pictures of 64 x 64 px at a time; \d+ x \d+ px or 1 at a time would fit"
    settings = {"height": 64, "width": 64, "seed": 0, "num_inference_steps": 6}

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", no_room)
        with pytest.raises(MemoryError, match=words) as caught:
            pipe(["a", "b"], batch_size=2, **settings)
        assert "\n" not in str(caught.value)
        *_, last = pipe.stream(["a", "b"], **settings)
        with pytest.raises(MemoryError, match=words):
            _ = last.images
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "step", no_room)
        with pytest.raises(MemoryError, match=words):
            pipe(["a", "b"], batch_size=2, **settings)
    with monkeypatch.context() as patch:
        patch.setattr("flexvar.generation.uniform_numbers", no_room)
        with pytest.raises(MemoryError, match=words):
            pipe.stream(["a", "b"], **settings)
    with monkeypatch.context() as patch:
        plain = Tokenizer.features
        patch.setattr(Tokenizer, "features", lambda self, x: plain(self, x) if x.is_meta else no_room())
        with pytest.raises(MemoryError, match=r"a picture of 192 x 128 px; \d+ x \d+ px would fit"):
            pipe.reconstruct(Image.new("RGB", (128, 192)))
    assert pipe(["a", "b"], **settings, output_type="pt").images.shape == (2, 3, 64, 64)


def test_what_failed_is_freed_before_the_free_memory_is_read(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def decode(self: Tokenizer, codes: torch.Tensor) -> None:
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def free(device: torch.device) -> int:
        assert held
        assert held[0]() is None
        return MEBIBYTE

    monkeypatch.setattr(Tokenizer, "decode", decode)
    monkeypatch.setattr(memory, "free_memory", free)
    monkeypatch.setattr(MemoryNeed, "refuse_what_cannot_fit", lambda self: None)
    with pytest.raises(MemoryError, match="not enough memory"):
        pipe("a", seed=0, batch_size=1)


def test_other_errors_pass_as_they_are(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Tokenizer, "decode", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipe("a", seed=0)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Tokenizer, "decode", no_room)
    monkeypatch.setattr(memory, "free_memory", lambda device: MEBIBYTE)
    assert main(["sample", "pizza", "--height", "128", "--width", "256", "--device", "cpu", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("flexvar: not enough memory for a picture of 128 x 256 px; ")
    assert line.endswith("px would fit (see `flexvar plan`)")
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr("flexvar.cli.parsing.run_info", no_room)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "flexvar: not enough memory; take smaller pictures or a smaller batch (see `flexvar plan`)\n"
