"""What our views of vLLM's punica wrapper have in common.

vLLM gives every LoRA layer one wrapper, whose methods add the adapters' share to its output. A view
stands before it in a layer, replaces one of them (`lora.py`, `lora_cpu.py`, `lora_cuda.py`), and
hands on the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

Add = Callable[[Tensor, Tensor], None]
"""`add(y, x)`: adds what the adapters make of x to y, in place."""


class PunicaView:
    """vLLM's wrapper, but for what a subclass defines."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


_library = Library("pte_vllm", "FRAGMENT")  # operators live as long as it does
_models: WeakValueDictionary[int, Operators] = WeakValueDictionary()


def _add(y: torch.Tensor, x: torch.Tensor, model: int, number: int) -> None:
    _models[model].adds[number](y, x)


def _add_fake(y: torch.Tensor, x: torch.Tensor, model: int, number: int) -> None:
    """Shapes stay as they are."""


direct_register_custom_op(
    op_name="add_lora_",
    op_func=_add,
    mutates_args=["y"],
    fake_impl=_add_fake,
    target_lib=_library,
    dispatch_key="CompositeExplicitAutograd",
)


class Operators:
    """Makes functions of one model an operator that torch.compile does not look into.

    It takes what it sees of Python at the first step for constant, and which adapters a step has is
    not. Numbers are the same whenever the model is loaded, so that compiled code is found again.
    """

    def __init__(self) -> None:
        self.adds: list[Add] = []
        self._model = next(i for i in itertools.count() if i not in _models)
        _models[self._model] = self

    def number(self, add: Add) -> int:
        """By which `call` finds it."""
        self.adds.append(add)
        return len(self.adds) - 1

    def call(self, y: Tensor, x: Tensor, number: int) -> None:
        torch.ops.pte_vllm.add_lora_(y, x, self._model, number)
