"""Our functions as operators of torch, which torch.compile calls and does not look into.

On a GPU `cuda.py` registers its kernel here. On a CPU a whole LoRA layer is opaque: which adapters
a step has decides what it does, and a trace would take that for constant. Such an operator finds
its layer by name in vLLM's forward context, as vLLM's attention does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import direct_register_custom_op

Add = Callable[[Tensor, Tensor], None]
"""`add(y, x)` adds what the adapters make of x to y, in place."""

_library = Library("pte_vllm", "FRAGMENT")  # operators live as long as it does


def register(
    name: str, function: Callable[..., None], *, mutates: list[str]
) -> Callable[..., None]:
    """Return `torch.ops.pte_vllm.<name>`, an operator that does what a function does.

    Args:
        name: The operator's name.
        function: Changes arguments in place; its annotations, without quotes, are the schema.
        mutates: Names of the arguments that it changes; their shapes must stay as they are.
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


def as_operator(layers: dict[str, Any], name: str, add: Add) -> Add:
    """Return a function that does what `add` does and that torch.compile does not look into.

    The name of a layer is the same whenever the model is loaded, so compiled code is found again.

    Args:
        layers: vLLM's `static_forward_context`, where `add` is entered; it lives as long as that.
        name: The layer's name in the model.
        add: What the layer does.

    Raises:
        ValueError: If there is such a layer already.
    """
    name = f"{name}.pte_lora"
    if name in layers:
        raise ValueError(f"there are two layers named {name}")
    layers[name] = add

    def traced(y: Tensor, x: Tensor) -> None:
        # vLLM embeds images and prompts given as vectors outside of any forward context.
        if is_forward_context_available():
            _add_lora_(y, x, name)
        else:
            add(y, x)

    return traced


def _add_lora(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer](y, x)


_add_lora_ = register("add_lora_", _add_lora, mutates=["y"])
