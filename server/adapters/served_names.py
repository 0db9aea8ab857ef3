"""vLLM's table of LoRAs, in which a pushed adapter's plain name means its newest version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.lora.request import LoRARequest


class ServedNames(dict[str, LoRARequest]):
    """A table whose entries vLLM lists and loads; `newest` adds names that point at one of them.

    Requests look adapters up by `in` and `[]`, so `model: "policy"` finds `policy@7` and runs under
    that name. `/v1/models` goes through `values()`, which has `policy` as well.

    Args:
        entries: LoRAs by the name that the engine knows them by, `name@version` if pushed.
        refresh: called before a name is looked up, so that it may add and remove entries.
    """

    def __init__(
        self, entries: Mapping[str, LoRARequest], refresh: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(entries)
        self._refresh = refresh
        self.newest: dict[str, str] = {}
        """The engine's name of the newest version, by pushed name."""

    def __contains__(self, name: object) -> bool:
        self._refresh()
        return super().__contains__(name) or super().__contains__(self.newest.get(name))

    def __missing__(self, name: str) -> LoRARequest:
        return self[self.newest[name]]

    def values(self) -> Any:
        self._refresh()
        named = {name: self[at] for name, at in self.newest.items() if dict.__contains__(self, at)}
        return [
            *super().values(),
            *(LoRARequest(name, lora.lora_int_id, lora.lora_path) for name, lora in named.items()),
        ]
