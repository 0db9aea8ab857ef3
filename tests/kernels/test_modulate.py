"""Both fast paths against the definition, on batches with odd lengths and shared slots."""

from __future__ import annotations

import pytest
import torch

from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.kernels.modulate import modulate_segments, modulate_slices, modulate_tokens
from pte_vllm.method import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5], [1, 7, 1, 3], [2, 1, 1, 13, 1]])
@pytest.mark.parametrize(
    ("read", "kinds"),
    [
        ("key", ["linear"]),
        ("value", ["linear"]),
        ("key", ["squared"]),
        ("key", ["squared", "linear"]),
    ],
)
def test_against_reference(
    lengths: list[int], read: str, kinds: list[str], dtype: torch.dtype
) -> None:
    rank, num_slots = 9, 6
    stored = torch.randn(num_slots, rank, rank).to(dtype)
    states = stored.float() if read == "key" else stored.float().mT
    slots = [(3 * i + 1) % num_slots for i in range(len(lengths))]  # never the identity alone
    segments, start = [], 0
    for length, slot in zip(lengths, slots, strict=True):
        segments.append((start, start + length, slot))
        start += length
    a = torch.randn(start, rank)
    features = [kinds[slot % len(kinds)] for slot in range(num_slots)]
    squared = torch.tensor([kind == "squared" for kind in features])
    wanted = torch.cat(
        [reference.modulate(a[s:e], states[slot], read, features[slot]) for s, e, slot in segments]
    )
    tokens = TokenSlots.allocate(64, torch.device("cpu"))
    tokens.slots.fill_(5)  # left over from an earlier step
    tokens.publish(segments)
    per_token = tokens.slots[:start]
    assert tokens.any
    assert not tokens.slots[start:].any()
    about = stored, squared, per_token
    torch.testing.assert_close(modulate_tokens(a, *about), wanted)
    torch.testing.assert_close(modulate_segments(a, *about, segments), wanted)
    slices = torch.stack((a, a))
    modulate_slices(slices, stored, squared, tokens.slots)
    torch.testing.assert_close(slices, torch.stack((wanted, wanted)))
