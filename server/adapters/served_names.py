"""vLLM's table of LoRAs, in which a pushed adapter's plain name means its newest version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.lora.request import LoRARequest


class ServedNames(dict[str, LoRARequest]):
    """A table whose entries vLLM lists and loads; `newest` adds names that point at one of them.

    Requests look adapters up by `in` and `[]`, so `model: "policy"` finds `policy@7` and runs under
    that name. `/v1/models` goes through `values()`, which has `policy` as well.

    Args:
        entries: LoRAs by the name that the engine knows them by, `name@version` if pushed.
    """

    def __init__(self, entries: Mapping[str, LoRARequest]) -> None:
        super().__init__(entries)
        self.newest: dict[str, str] = {}
        """The engine's name of the newest version, by pushed name."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(self.newest.get(name))

    def __missing__(self, name: str) -> LoRARequest:
        return self[self.newest[name]]

    def values(self) -> Any:
        named = {name: self[found] for name, found in self.newest.items() if found in self}
        return [
            *super().values(),
            *(LoRARequest(name, lora.lora_int_id, lora.lora_path) for name, lora in named.items()),
        ]
