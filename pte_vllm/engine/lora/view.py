"""What our views of vLLM's punica wrapper have in common.

vLLM gives every LoRA layer one wrapper, whose methods add the adapters' share to its output. A view
stands before it in a layer, replaces one of them (`lora.py`, `lora_cpu.py`, `lora_cuda.py`), and
hands on the rest.
"""

from __future__ import annotations

from typing import Any


class PunicaView:
    """vLLM's wrapper, but for what a subclass defines."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
