"""Stacks read as the tensors that were appended, in memory and on disk."""

import os
import pickle
import resource
import time
from pathlib import Path

import pytest
import torch

from dcvit.errors import DcvitError
from dcvit.runtime import spill as stacks
from dcvit.runtime.spill import SpilledBuffer


@pytest.fixture(params=[0, 100, 1 << 20], ids=["on disk", "in part", "in memory"])
def _limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "IN_MEMORY", request.param)


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_parts_read_as_one_tensor(dtype: torch.dtype) -> None:
    parts = [torch.arange(12 * n).view(n, 3, 4).to(dtype) for n in (2, 0, 5, 1)]
    buffer, whole = SpilledBuffer(parts), torch.cat(parts)
    assert len(buffer) == 8
    assert buffer.shape == (8, 3, 4)
    assert torch.equal(buffer[:], whole)
    for place in (slice(1, 6), slice(7, 40), slice(3, 3), slice(-2, None)):
        assert torch.equal(buffer[place], whole[place])
    index, mask = torch.tensor([7, 0, 3, 3]), torch.arange(8) % 3 == 1
    assert torch.equal(buffer[index], whole[index])
    assert torch.equal(buffer[mask], whole[mask])
    assert torch.equal(buffer[~mask & mask], whole[:0])
    assert [len(part) for part in buffer.split(3)] == [3, 3, 2]
    assert torch.equal(torch.cat(list(buffer.split(3))), whole)
    buffer.append(parts[0])  # after it was read
    assert torch.equal(buffer[6:], torch.cat([whole[6:], parts[0]]))


@pytest.mark.usefixtures("_limit")
def test_another_process_gets_a_copy() -> None:
    buffer = SpilledBuffer([torch.arange(60).view(20, 3)])
    copied = pickle.loads(pickle.dumps(buffer))
    assert torch.equal(copied[:], buffer[:])


def test_an_empty_stack() -> None:
    assert len(SpilledBuffer()) == 0
    assert list(SpilledBuffer().split(4)) == []
    assert SpilledBuffer([torch.empty(0, 5)])[:].shape == (0, 5)


def test_parts_that_do_not_fit_are_refused() -> None:
    buffer = SpilledBuffer([torch.zeros(2, 3)])
    for other in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"the others are like \[0, 3\]"):
            buffer.append(other)


def test_what_is_on_disk_takes_no_memory_and_goes_with_the_buffer() -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, taken = files(), resident()
    buffer = SpilledBuffer(torch.full((1 << 18, 16), float(i)) for i in range(40))  # 16 MiB each
    assert float(buffer[10 << 18 : (10 << 18) + 1].mean()) == 10
    assert resident() - taken < 200 << 20  # of 640 MiB
    assert files() == before + 1
    del buffer
    assert files() == before


def test_a_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DcvitError, match=r"No space left on device\): make room, or set TMPDIR"):
        SpilledBuffer([torch.zeros(2, 3)])


def test_the_time_grows_with_the_number_of_parts() -> None:
    """Quadratically, eight times as many would take sixty times as long."""

    def seconds(count: int) -> float:
        start = time.process_time()
        SpilledBuffer(part for _ in range(count))
        return time.process_time() - start

    part = torch.zeros(1, 4)
    seconds(100)
    assert seconds(20_000) < 24 * seconds(2_500)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_whole_is_an_ordinary_tensor(on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "IN_MEMORY", 100 if on_disk else 10**6)
    parts = [torch.randn(n, 3, 5) for n in (2, 1, 4)]
    buffer = SpilledBuffer(parts)
    whole = buffer.whole()
    del buffer  # the memory stays
    assert torch.equal(whole, torch.cat(parts))
    whole += 1
    assert torch.equal(whole, torch.cat(parts) + 1)
