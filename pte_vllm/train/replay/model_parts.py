"""What a `PTEModel` puts into its base model: an A with a thought state, and layers run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ModulatedA(nn.Linear):
    """LoRA's A `[G, d_in]` with a thought state after it: turns `[B, n, d_in]` into `[B, n, r]`."""

    def __init__(self, weight: nn.Parameter, modulate: Callable[[Tensor], Tensor]) -> None:
        rows, d_in = weight.shape
        super().__init__(d_in, rows, bias=False, device="meta")
        self.weight = weight
        self._modulate = modulate

    def forward(self, input: Tensor) -> Tensor:
        return self._modulate(super().forward(input))


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a layer's forward so that the backward pass computes it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def submodule(model: Any, name: str) -> nn.Module:
    """Return a module that an adapter changes.

    Raises:
        ValueError: If the model has none of that name.
    """
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name}, which the adapter changes") from error
    return module
