"""LoRA as a GPU runs it, as far as a CPU can tell: over vLLM's wrapper, compiled, in fp32."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from pte_vllm.engine.lora.cuda import CUDALayerPunica
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.method import reference

RANK, D_IN, OUTPUTS, ADAPTERS, SLOTS = 12, 20, (24, 8, 16), 2, 5


class _Linear:
    """One merged linear under vLLM's CPU wrapper, which has A's and B's products apart too."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.a = tuple(torch.randn(ADAPTERS, 1, RANK, D_IN).to(dtype) for _ in OUTPUTS)
        self.b = tuple(torch.randn(ADAPTERS, 1, d, RANK).to(dtype) for d in OUTPUTS)
        self.states = torch.randn(SLOTS, RANK, RANK)
        self.states[0] = torch.eye(RANK)
        self.squared = torch.arange(SLOTS) % 3 == 1
        self.tokens = TokenSlots.allocate(64, torch.device("cpu"))
        self.wrapper = PunicaWrapperCPU(64, 8, "cpu")
        self.view = CUDALayerPunica(self.wrapper, self.states, self.squared, self.tokens)

    def features(self, slot: int) -> str:
        return "squared" if self.squared[slot] else "linear"

    def publish(self, adapters: list[int], slots: list[int]) -> None:
        ids = tuple(adapter + 1 for adapter in adapters)  # 0: none
        mapping = LoRAMapping(ids, ids, is_prefill=False)
        self.wrapper.update_metadata(mapping, [1, 2], ADAPTERS, 100)
        self.tokens.publish([(i, i + 1, slot) for i, slot in enumerate(slots)])

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        out = y.clone()
        self.view.add_lora_linear(out, x, self.a, self.b, 1.0, OUTPUTS)
        return out

    def defined(self, x: Tensor, y: Tensor, adapters: list[int], slots: list[int]) -> Tensor:
        out = y.double()
        for row, (adapter, slot) in enumerate(zip(adapters, slots, strict=True)):
            offset = 0
            for a, b in zip(self.a, self.b, strict=True):
                shrunk = x[row : row + 1].double() @ a[adapter, 0].double().T
                state, features = self.states[slot].double(), self.features(slot)
                read = reference.modulate(shrunk, state, "key", features)
                if adapter >= 0:
                    delta = read @ b[adapter, 0].double().T
                    out[row, offset : offset + b.size(2)] += delta[0]
                offset += b.size(2)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_definition(dtype: torch.dtype) -> None:
    linear = _Linear(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    none = -1 if dtype == torch.float32 else 0  # vLLM's CPU products know no missing adapter
    for adapters, slots in (([0, 1, none, 0], [1, 2, 0, 4]), ([1, 1], [0, 3]), ([none], [0])):
        linear.publish(adapters, slots)
        x = torch.randn(len(slots), D_IN).to(dtype)
        y = torch.randn(len(slots), sum(OUTPUTS)).to(dtype)
        wanted = linear.defined(x, y, adapters, slots)
        assert (linear.run(x, y).double() - wanted).norm() <= tolerance * wanted.norm()


_COMPILED = """
import torch
from pte_vllm.engine.lora import cuda as lora_cuda
from pte_vllm.method import reference
from tests.engine.test_lora_cuda import OUTPUTS, RANK, _Linear

lora_cuda.use_kernels = lambda device: True  # the operator, whose kernel the interpreter runs
linear = _Linear(torch.float32)
a, b = linear.a, linear.b

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.punica_wrapper = linear.view

    def forward(self, x, buffer):  # what stands between vLLM's two operators
        buffer = buffer + x.sum()
        view = self.punica_wrapper
        view._modulate_(buffer, view._states, view._squared, view._tokens.slots)
        return buffer

model = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
for slots in ([1, 2, 0, 4], [3, 3], [0, 1, 2]):  # one trace serves all batches
    linear.publish([0] * len(slots), slots)
    buffer = torch.randn(len(OUTPUTS), len(slots), RANK)
    found = model(torch.zeros(1), buffer)
    for t, slot in enumerate(slots):
        features = linear.features(slot)
        wanted = reference.modulate(buffer[:, t], linear.states[slot], "key", features)
        torch.testing.assert_close(found[:, t], wanted)
print("ok")
"""


def test_traced_as_one_graph_whose_states_and_slots_may_change() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
