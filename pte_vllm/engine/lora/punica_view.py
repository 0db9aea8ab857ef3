"""What our views of vLLM's punica wrapper have in common.

vLLM gives every LoRA layer one wrapper, whose methods add the adapters' share to its output. A view
stands before it in a layer, replaces one of them, and hands on the rest. `cpu.py` and `cuda.py`
have the views of the decoder's linears, `install.py` that of embedding and output layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor


class PunicaView:
    """A view of vLLM's wrapper that differs from it in what a subclass defines.

    Args:
        wrapper: vLLM's punica wrapper, which does everything else.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


class OpaquePunicaView(PunicaView, ABC):
    """A view whose work torch.compile must not look into; the layer calls `apply`."""

    apply: Callable[[Tensor, Tensor], None]
    """`add` itself, or an operator that does the same."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self.apply = self.add

    @abstractmethod
    def add(self, y: Tensor, x: Tensor) -> None:
        """Add what the adapters make of `x: [T, ...]` to `y: [T, D]`, in place."""
