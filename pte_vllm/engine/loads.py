"""Which loading of an adapter a request runs on, so that no cached block outlives its adapter.

vLLM finds a prefix block by the adapter's name and path. Both may mean other weights by now: a name
can be unloaded and loaded again, and a directory can be written again. A number of our own tells
loadings apart. It lives in the process that takes requests in.
"""

from __future__ import annotations

from collections import Counter

from vllm.lora.request import LoRARequest

_replaced: Counter[int] = Counter()
"""How many times the weights under an adapter's id were replaced, by id."""


def loaded_in_place(adapter_id: int) -> None:
    """Note that the weights of an adapter were replaced under the id that it has."""
    _replaced[adapter_id] += 1


def loading(lora: LoRARequest) -> str:
    """Return what tells this loading of an adapter from all others of this server."""
    return f"{lora.lora_int_id}.{_replaced[lora.lora_int_id]}"
