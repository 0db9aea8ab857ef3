"""Memory on huge pages: what is moved stays what it was, and what cannot be is left alone."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from pte_vllm.engine import huge_pages
from pte_vllm.engine.huge_pages import Arena, collapse

MIB = 2**20


@pytest.fixture(params=["1", "0"])
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PTE_HUGE_PAGES", request.param)
    return request.param


def _on_huge_pages() -> int:
    """Bytes of this process."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024 if found else 0


def test_memory_moves_and_keeps_its_numbers(switch: str) -> None:
    large = torch.arange(16 * MIB, dtype=torch.int32)  # 64 MiB: a mapping of its own
    before, resident = _on_huge_pages(), _resident()
    moved = collapse()
    assert torch.equal(large, torch.arange(16 * MIB, dtype=torch.int32))
    if switch == "0":
        assert moved == 0
    elif moved:  # the kernel can
        assert moved >= 60 * MIB and _on_huge_pages() - before > 50 * MIB
        assert _resident() - resident < 0.3 * resident  # stacks and the like were left alone


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_mappings_that_are_mostly_empty_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTE_HUGE_PAGES", "1")
    sparse = torch.empty(64 * MIB, dtype=torch.uint8)
    sparse[: 4 * MIB] = 1
    before = _resident()
    collapse()
    assert _resident() - before < 32 * MIB


def test_a_system_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTE_HUGE_PAGES", "1")
    monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)  # as an older kernel answers: EINVAL
    kept = torch.arange(16 * MIB, dtype=torch.int32)
    collapse()
    assert torch.equal(kept, torch.arange(16 * MIB, dtype=torch.int32))


def test_arena(switch: str) -> None:
    arena = Arena()
    torch.manual_seed(0)
    made = [torch.randn(7 * i, 33).to(torch.bfloat16) for i in range(1, 300)]
    kept = [arena.keep(tensor.mT) for tensor in made]
    large = torch.randn(3 * MIB)  # larger than a block
    assert torch.equal(arena.keep(large), large)
    for tensor, copy in zip(made, kept, strict=True):
        assert torch.equal(copy, tensor.mT) and copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0


def test_arena_gives_memory_back() -> None:
    """A version of an adapter that left takes its blocks with it."""
    arena = Arena()
    tensor = torch.ones(MIB)
    arena.keep(tensor)
    before = _resident()
    for _ in range(100):
        arena.keep(tensor)
    gc.collect()
    assert _resident() - before < 64 * MIB  # of 400
