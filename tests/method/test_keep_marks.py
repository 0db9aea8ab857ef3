"""Marks of kept tokens as bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte_vllm.method.keep_marks import packed_bytes, unpacked


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 37), st.integers(0, 2**31))
def test_round_trip(layers: int, heads: int, candidates: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    marks = torch.rand(layers, heads, candidates, generator=g) < 0.5
    data = packed_bytes(marks)
    assert len(data) == -(-layers * heads * candidates // 8)
    assert torch.equal(unpacked(data, layers, heads, candidates), marks)


def test_the_order_of_bits() -> None:
    marks = torch.tensor([[[True, False, False], [False, True, True]], [[True, True, False]] * 2])
    assert packed_bytes(marks) == bytes([0b10001111, 0b01100000])


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\xff", "of 2 bytes, got 1"), (b"\xff\xf0", "bits that are not zero")],
)
def test_other_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpacked(data, 1, 2, 5)
    assert unpacked(b"\xff\xc0", 1, 2, 5).all()
