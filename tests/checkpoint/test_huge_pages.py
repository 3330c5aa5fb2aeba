"""Float16 weights share blocks of memory, and nothing else: each has a storage of its own."""

import copy
import gc
import io
import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, half_weights
from upcast.core import pages
from upcast.core.pages import BLOCK, SMALL, Memory
from upcast.kernels import packed
from upcast.kernels.rounding import to_half

LARGE = SMALL  # float32 elements of a tensor that goes into a block

pytestmark = pytest.mark.skipif(not hasattr(pages.mmap, "MADV_HUGEPAGE"), reason="the system has no such pages")


def source(elements: int = LARGE) -> Tensor:
    return torch.randn(elements // 64, 64)


def test_tensors_lie_side_by_side_with_storages_of_their_own() -> None:
    memory = Memory()
    first, second = memory.half_like(source()), memory.half_like(source(LARGE + 64))
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    for half in (first, second):
        assert half.dtype == torch.float16
        assert half.is_contiguous()
        assert half.storage_offset() == 0
        assert half.untyped_storage().nbytes() == half.nbytes
        assert half.data_ptr() % pages.ALIGNMENT == 0
    first.fill_(1), second.fill_(2)
    assert bool((first == 1).all() and (second == 2).all())


def test_packed_weights_lie_there_too() -> None:
    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 1024)).bfloat16()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 1, 2)  # so that nothing escapes
    upcast.patch(model, storage="packed")
    first, second = (weight.store.matrix.blob for weight in half_weights(model).values())
    assert first.untyped_storage().nbytes() == first.nbytes == packed.size_of(512, 1024, 0) > SMALL
    assert second.data_ptr() == first.data_ptr() + -(-first.nbytes // pages.ALIGNMENT) * pages.ALIGNMENT


ELSEWHERE = {
    "small": lambda: torch.ones(3, 5),
    "transposed": lambda: torch.ones(256, 512).t(),
    "empty": lambda: torch.ones(0, 4),
    "scalar": lambda: torch.tensor(1.0),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_small_and_transposed_tensors_have_their_own_memory(kind: str) -> None:
    tensor = ELSEWHERE[kind]()
    memory = Memory()
    half = memory.half_like(tensor)
    assert half.stride() == torch.empty_like(tensor, dtype=torch.float16).stride()
    assert memory._block is None


def test_more_than_a_block() -> None:
    memory = Memory()
    halves = [memory.half_like(source(BLOCK // 8)) for _ in range(9)] + [memory.half_like(source(BLOCK))]
    spans = sorted((half.data_ptr(), half.data_ptr() + half.nbytes) for half in halves)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for number, half in enumerate(halves):
        half.fill_(number)
    assert all(bool((half == number).all()) for number, half in enumerate(halves))


def test_a_block_ends_with_its_last_tensor() -> None:
    memory = Memory()
    halves = [memory.half_like(source()) for _ in range(3)]
    assert memory._block is not None
    block = weakref.ref(memory._block)
    del memory
    del halves[1:]
    gc.collect()
    assert block() is not None
    halves[0].fill_(1)
    halves.clear()
    gc.collect()
    assert block() is None


def test_what_does_not_fit_leaves_its_place_to_the_next() -> None:
    memory = Memory()
    first, _ = to_half(source(), memory)
    refused, rounding = to_half(source() * 1e9, memory)
    assert not rounding.fits
    place = refused.data_ptr()
    assert to_half(source(), memory)[0].data_ptr() == place == first.data_ptr() + first.nbytes


def test_a_tensor_elsewhere_takes_nothing_back() -> None:
    memory = Memory()
    first = memory.half_like(source())
    memory.take_back(torch.empty(3, dtype=torch.float16))
    assert memory.half_like(source()).data_ptr() == first.data_ptr() + first.nbytes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


def test_a_patched_model_copies_saves_and_goes_back() -> None:
    model, x = Net().eval(), torch.randn(3, 512)
    want = model(x)
    upcast.patch(model)
    assert_patched(model)
    weights = list(half_weights(model).values())
    assert weights[1].stored.data_ptr() == weights[0].stored.data_ptr() + weights[0].stored.nbytes
    copied = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert stream.tell() < 2 * sum(weight.stored.nbytes for weight in weights) * 1.1 + 20_000
    got = model(x)
    assert torch.equal(copied(x), got)
    assert torch.allclose(got, want, atol=1e-2)
    gone = weakref.ref(weights[0].stored)
    weights.clear()
    upcast.unpatch(model)
    gc.collect()
    assert gone() is None
    assert torch.equal(copied(x), got)


def test_without_such_pages_memory_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_HUGE", None)
    memory = Memory()
    assert memory.half_like(source()).shape == (LARGE // 64, 64)
    assert memory._block is None
    pages.read_ahead(Path(__file__))


def cached(path: Path) -> int:
    with path.open("rb") as file, pages.mmap.mmap(file.fileno(), 0, access=pages.mmap.ACCESS_COPY) as whole:
        return pages._cached_bytes(whole)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A file of which the system holds nothing in memory; skipped where it cannot be told to let go."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * pages.PAGE + 5))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps what was written in memory")
    return path


def test_a_file_is_read_before_it_is_mapped(on_disk: Path) -> None:
    pages.read_ahead(on_disk)
    assert cached(on_disk) >= on_disk.stat().st_size


def test_a_file_that_was_just_written_is_read_again(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk.write_bytes(content := bytes(range(250)) * 30_000)
    read = []
    monkeypatch.setattr(pages, "read_ahead", lambda path: read.append(cached(path)))
    pages.advise(on_disk)
    assert read == [0]
    assert on_disk.read_bytes() == content


def test_what_the_system_holds_or_could_not_hold_is_left_alone(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_free_bytes", lambda: on_disk.stat().st_size)
    pages.read_ahead(on_disk)
    assert cached(on_disk) == 0
    monkeypatch.undo()
    monkeypatch.setattr(pages, "_cached_bytes", len)
    pages.read_ahead(on_disk)
    monkeypatch.undo()
    assert cached(on_disk) == 0


def test_small_and_empty_files_are_left_alone(tmp_path: Path) -> None:
    for size in (0, 1, 4097):
        (tmp_path / "small").write_bytes(bytes(size))
        pages.read_ahead(tmp_path / "small")


def test_an_interruption_of_reading_ahead_is_what_is_heard(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pages.ctypes, "CDLL", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pages.read_ahead(on_disk)
