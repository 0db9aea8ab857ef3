"""LoRA on CPU through packed products, against the definition, token by token."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pte_vllm.engine.huge_pages import Arena
from pte_vllm.engine.lora.cpu import CPULayerPunica, load_native
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.kernels import native
from pte_vllm.method import reference

RANK, D_IN, OUTPUTS = 12, 52, (72, 64, 20)  # odd sizes: rows and tiles are padded
LAYERS, LAYER, SLOTS = 2, 1, 66


class _Linear:
    """What vLLM holds of one merged linear, and a step's tokens."""

    def __init__(self, adapters: int, dtype: torch.dtype, compiled: bool = True) -> None:
        torch.manual_seed(0)
        self.a = tuple(torch.randn(adapters, 1, RANK, D_IN).to(dtype) for _ in OUTPUTS)
        self.b = tuple(torch.randn(adapters, 1, d, RANK).to(dtype) for d in OUTPUTS)
        self.states = torch.randn(LAYERS, SLOTS, RANK, RANK).to(dtype)
        self.states[:, 0] = torch.eye(RANK)
        # Every third slot has squared features, the identity none.
        self.squared = torch.arange(SLOTS) % 3 == 1
        self.tokens = TokenSlots.allocate(256, torch.device("cpu"))
        self.loads = [0] * adapters
        self.wrapper = SimpleNamespace(token_lora_indices=None)
        module = SimpleNamespace(
            punica_wrapper=self.wrapper, lora_a_stacked=self.a, lora_b_stacked=self.b
        )
        self.view = CPULayerPunica(
            module,
            self.states[LAYER],
            self.squared,
            self.tokens,
            lambda i: self.loads[i],
            native.load() if compiled else None,
            arena=Arena(),
        )

    def run(self, x: Tensor, y: Tensor, lengths: list[int], adapters: list[int]) -> Tensor:
        """Sequence i has `lengths[i]` tokens, the adapter `adapters[i]` and the slot i + 1."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [
            (end - n, end, i + 1 if adapters[i] >= 0 else 0)
            for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
        ]
        self.tokens.publish(segments)
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
                        x[row : row + 1].double() @ a[adapter, 0].double().T,
                        state,
                        "key",
                        "squared" if self.squared[i + 1] else "linear",
                    )
                    first = sum(OUTPUTS[:part])
                    delta = read @ b[adapter, 0].double().T
                    out[row, first : first + OUTPUTS[part]] += delta[0]
            token += length
        return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "adapters"),
    [
        ([1, 1, 1], [0, 0, 0]),
        ([1, 1, 1, 1], [0, 1, -1, 0]),
        ([7, 1, 4], [1, 1, 1]),
        ([7, 1, 1, 4], [1, 0, -1, 1]),
        ([3], [-1]),
        ([1] * 13, [0] * 13),
        ([1] * 65, [0] * 65),
        ([90, 1, 40], [1, 1, 0]),
    ],
)
def test_against_definition(
    dtype: torch.dtype, compiled: bool, lengths: list[int], adapters: list[int]
) -> None:
    linear = _Linear(2, dtype, compiled)
    x = torch.randn(sum(lengths), D_IN).to(dtype)
    y = torch.randn(sum(lengths), sum(OUTPUTS)).to(dtype)
    found = linear.run(x, y, lengths, adapters).double()
    wanted = linear.defined(x, y, lengths, adapters)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled for a CPU without AVX-512 and products of bfloat16."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86")
    flags = tuple("-march=x86-64-v3" if f == "-march=native" else f for f in native._FLAGS)
    assert flags != native._FLAGS
    monkeypatch.setattr(native, "_FLAGS", flags)
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_narrow_cpu(dtype: torch.dtype) -> None:
    test_against_definition(dtype, True, [7, 1, 1, 4], [1, 0, -1, 1])
    test_against_definition(dtype, True, [1] * 65, [0] * 65)


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


def test_identity_where_no_token_has_a_state() -> None:
    linear = _Linear(1, torch.float32)
    x, y = torch.randn(3, D_IN), torch.randn(3, sum(OUTPUTS))
    linear.states[:, 1:] = torch.eye(RANK)
    linear.squared[:] = False
    wanted = linear.defined(x, y, [1, 1, 1], [0, 0, 0])
    linear.tokens.publish([(i, i + 1, 0) for i in range(3)])
    linear.wrapper.token_lora_indices = torch.zeros(3, dtype=torch.int64)
    linear.view.add_lora_linear(y, x, linear.a, linear.b, 1.0, OUTPUTS)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load = native.load.__wrapped__  # past what this process has loaded already
    native.load.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeError, match="no C\\+\\+ compiler"):
        load()
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(native.NativeError, match="broken"):
        load()
    monkeypatch.setenv(native.DISABLE, "0")
    with pytest.raises(native.NativeError, match="PTE_NATIVE=0"):
        load()
    assert load_native(torch.float16) is None and load_native(torch.float32) is None
