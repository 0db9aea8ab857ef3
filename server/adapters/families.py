"""Adapters `name-v1`, `name-v2`, ... that are loaded by path are versions of one adapter.

Trainers that number the names themselves may never unload the old ones, so that vLLM's list would
grow for as long as they train. Of each family the newest stay, as those of a pushed adapter do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.logger import init_logger

from pte_vllm.server.engines import Engines

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_NUMBERED = re.compile(r"(?P<family>.+)-v(?P<number>\d+)")


def surplus(names: list[str], newest: str, keep: int) -> list[str]:
    """Return the names of the family of `newest` beyond its `keep` highest numbers, lowest first.

    Args:
        names: adapters that were loaded by path.
        newest: the one that was loaded just now, which always stays.
        keep: how many stay; 0 keeps all.
    """
    match = _NUMBERED.fullmatch(newest)
    if match is None or not keep:
        return []
    numbered = [found for name in names if (found := _NUMBERED.fullmatch(name))]
    family = [found for found in numbered if found["family"] == match["family"]]
    family.sort(key=lambda found: int(found["number"]))
    return [found[0] for found in family[:-keep] if found[0] != newest]


class Families:
    """Unloads old members of families, but none that a request uses.

    Args:
        models: vLLM's list. It must be ready to unload by vLLM's own method.
        engines: those that know what adapters requests use.
        keep: how many of a family stay; 0 keeps all.
        rollouts: returns how many rollouts and scores run on an adapter.
    """

    def __init__(
        self,
        models: OpenAIServingModels,
        engines: Engines,
        *,
        keep: int,
        rollouts: Callable[[str], int],
    ) -> None:
        self._models, self._engines = models, engines
        self._keep, self._rollouts = keep, rollouts
        self._unload = models.unload_lora_adapter
        self._fixed = frozenset(models.lora_requests)  # what the server was started with stays

    async def loaded(self, name: str) -> None:
        """Note that `name` was loaded by path, and unload what is older than those that stay.

        What a request uses is left for the next time.
        """
        by_path = [n for n in dict.keys(self._models.lora_requests) if "@" not in n]
        old = [n for n in surplus(by_path, name, self._keep) if n not in self._fixed]
        if not old:
            return
        report = await self._engines.requests()
        for candidate in old:
            if candidate in report["adapters_in_use"] or self._rollouts(candidate):
                continue
            result = await self._unload(UnloadLoRAAdapterRequest(lora_name=candidate))
            if not isinstance(result, ErrorResponse):
                logger.info(
                    "adapter %s is unloaded, as --pte-keep-loaded is %d", candidate, self._keep
                )
            elif result.error.code != HTTPStatus.NOT_FOUND:  # somebody else was faster
                logger.warning("adapter %s is not unloaded: %s", candidate, result.error.message)
