"""Our functions as operators of torch, which torch.compile calls and does not look into.

On a GPU `lora_cuda.py` registers its kernel here. On a CPU a whole LoRA layer is opaque: which
adapters a step has decides what it does, and a trace would take that for constant.
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

_library = Library("pte_vllm", "FRAGMENT")  # operators live as long as it does


def register(
    name: str, function: Callable[..., None], *, mutates: list[str]
) -> Callable[..., None]:
    """`torch.ops.pte_vllm.<name>`, of a function that changes arguments in place.

    Args:
        function: its annotations, without quotes, are the operator's schema.
        mutates: names of the arguments that it changes; shapes must stay as they are.
    """
    direct_register_custom_op(
        op_name=name,
        op_func=function,
        mutates_args=mutates,
        fake_impl=_shapes_stay,
        target_lib=_library,
        dispatch_key="CompositeExplicitAutograd",
    )
    operator: Callable[..., None] = getattr(torch.ops.pte_vllm, name)
    return operator


def _shapes_stay(*args: Any) -> None:
    pass


class LayerOperators:
    """Makes operators of what the LoRA layers of one model do.

    Numbers are the same whenever the model is loaded, so that compiled code is found again.
    """

    def __init__(self) -> None:
        self.adds: list[Add] = []
        self._model = next(i for i in itertools.count() if i not in _models)
        _models[self._model] = self

    def wrap(self, add: Add) -> Add:
        """The same, to be traced; lives as long as this object."""
        model, number = self._model, len(self.adds)
        self.adds.append(add)

        def traced(y: Tensor, x: Tensor) -> None:
            _add_lora_(y, x, model, number)

        return traced


_models: WeakValueDictionary[int, LayerOperators] = WeakValueDictionary()


def _add_lora(y: torch.Tensor, x: torch.Tensor, model: int, number: int) -> None:
    _models[model].adds[number](y, x)


_add_lora_ = register("add_lora_", _add_lora, mutates=["y"])
