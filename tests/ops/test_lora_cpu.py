"""LoRA on CPU through packed products, against the definition, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pte_vllm.lora import TokenSlots
from pte_vllm.lora_cpu import CPULayerPunica
from pte_vllm.ops import reference

RANK, D_IN, OUTPUTS = 8, 48, (32, 16, 16)
LAYERS, LAYER, SLOTS = 2, 1, 5


class _Linear:
    """What vLLM holds of one merged linear, and a step's tokens."""

    def __init__(self, adapters: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.a = tuple(torch.randn(adapters, 1, RANK, D_IN).to(dtype) for _ in OUTPUTS)
        self.b = tuple(torch.randn(adapters, 1, d, RANK).to(dtype) for d in OUTPUTS)
        self.states = torch.randn(LAYERS, SLOTS, RANK, RANK)
        self.states[:, 0] = torch.eye(RANK)
        self.tokens = TokenSlots.allocate(64, torch.device("cpu"))
        self.loads = [0] * adapters
        self.wrapper = SimpleNamespace(token_lora_indices=None)
        self.view = CPULayerPunica(
            self.wrapper, self.states[LAYER], LAYER, self.tokens, lambda i: self.loads[i]
        )

    def run(self, x: Tensor, y: Tensor, lengths: list[int], adapters: list[int]) -> Tensor:
        """Sequence i has `lengths[i]` tokens, the adapter `adapters[i]` and the slot i + 1."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [
            (end - n, end, i + 1 if adapters[i] >= 0 else 0)
            for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
        ]
        self.tokens.publish(segments, self.states)
        self.wrapper.token_lora_indices = torch.repeat_interleave(
            torch.tensor(adapters), torch.tensor(lengths)
        )
        out = y.clone()
        self.view.add_lora_linear(out, x, self.a, self.b, 1.0, OUTPUTS)
        return out

    def defined(self, x: Tensor, y: Tensor, lengths: list[int], adapters: list[int]) -> Tensor:
        out, token = y.double(), 0
        for i, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
            for row in range(token, token + length):
                for part, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                    if adapter < 0:
                        continue
                    state = self.states[LAYER, i + 1].double()
                    read = reference.modulate(
                        x[row : row + 1].double() @ a[adapter, 0].double().T, state, "key"
                    )
                    first = sum(OUTPUTS[:part])
                    delta = read @ b[adapter, 0].double().T
                    out[row, first : first + OUTPUTS[part]] += delta[0]
            token += length
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "adapters"),
    [
        ([1, 1, 1], [0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, -1, 0]),
        ([7, 1, 4], [1, 1, 1]),
        ([7, 1, 1, 4], [1, 0, -1, 1]),
        ([3], [-1]),
    ],
)
def test_against_definition(dtype: torch.dtype, lengths: list[int], adapters: list[int]) -> None:
    linear = _Linear(2, dtype)
    x = torch.randn(sum(lengths), D_IN).to(dtype)
    y = torch.randn(sum(lengths), sum(OUTPUTS)).to(dtype)
    found = linear.run(x, y, lengths, adapters).double()
    wanted = linear.defined(x, y, lengths, adapters)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_slices_without_weights_are_left_out() -> None:
    linear = _Linear(1, torch.float32)
    linear.b[1].zero_()
    x, y = torch.randn(2, D_IN), torch.zeros(2, sum(OUTPUTS))
    found = linear.run(x, y, [1, 1], [0, 0])
    torch.testing.assert_close(
        found.double(), linear.defined(x, y, [1, 1], [0, 0]), rtol=1e-5, atol=1e-4
    )
    assert not found[:, OUTPUTS[0] : OUTPUTS[0] + OUTPUTS[1]].any()
    for a in linear.a:
        a.zero_()
    linear.loads[0] += 1
    assert torch.equal(linear.run(x, y, [1, 1], [0, 0]), y)


def test_new_weights_in_the_same_slot_are_seen() -> None:
    linear = _Linear(1, torch.float32)
    x, y = torch.randn(2, D_IN), torch.zeros(2, sum(OUTPUTS))
    before = linear.run(x, y, [1, 1], [0, 0])
    for b in linear.b:
        b.mul_(2.0)
    linear.loads[0] += 1
    torch.testing.assert_close(linear.run(x, y, [1, 1], [0, 0]), 2 * before)
