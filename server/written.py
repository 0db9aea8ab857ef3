"""The tokens of requests that keep some, for as long as it can be asked what they kept.

The worker does not know what it sampled: with async scheduling tokens go from step to step on the
device. The API server has them while a request runs. What has ended is copied, as vLLM drops it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from vllm.engine.protocol import EngineClient

from pte_vllm.engine.earlier import EARLIER
from pte_vllm.engine.request_ids import find_id
from pte_vllm.server.sharing.ended_tokens import EndedTokens

MAX_BYTES = 2**26
"""The most memory for tokens of requests that have ended; the oldest leave."""


class Written:
    """Finds the tokens of requests by name, running or ended lately, prompt and answer together.

    Args:
        engine: AsyncLLM. It is made to hand over what ends.
        ended: what remembers that.
    """

    def __init__(self, engine: EngineClient, ended: EndedTokens) -> None:
        processor: Any = engine.output_processor
        processor.request_states = _Running(processor.request_states, self)
        self._processor = processor
        self._ended = ended

    def find(self, name: str) -> Sequence[int] | None:
        """Return the tokens of the newest request that a client calls `name`; None without.

        Of several API servers each knows what runs by way of it, and what has ended of all.
        """
        running = self._processor.request_states
        request_id = find_id(name, running)
        if request_id is not None:
            state = running[request_id]
            return _tokens(state) if _keeps(state) else None
        request_id = find_id(name, self._ended.names())
        return None if request_id is None else self._ended.get(request_id)

    def add(self, state: Any) -> None:
        """Remember the tokens of a request that ends, if it keeps some; vLLM's RequestState."""
        if _keeps(state):
            self._ended.put(state.request_id, _tokens(state))

    def forget(self, name: str) -> None:
        """Drop what an ended request wrote that is called `name`; does nothing without one."""
        request_id = find_id(name, self._ended.names())
        if request_id is not None:
            self._ended.drop(request_id)


class _Running(dict[str, Any]):
    """vLLM's table of running requests; whatever way one ends, it is popped."""

    def __init__(self, states: dict[str, Any], written: Written) -> None:
        super().__init__(states)
        self._written = written

    def pop(self, request_id: str, *default: Any) -> Any:
        if request_id in self:
            self._written.add(self[request_id])
        return super().pop(request_id, *default)


def _keeps(state: Any) -> bool:
    return EARLIER.keeps_tokens(state.external_req_id) and state.detokenizer is not None


def _tokens(state: Any) -> array[int]:
    return array("i", [*state.prompt_token_ids, *state.detokenizer.output_token_ids])
