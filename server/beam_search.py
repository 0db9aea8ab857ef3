"""Beam search is refused: it would run under another plan than the one that was asked for.

vLLM makes the parameters of each beam itself, without the request's options, and sends what a beam
has so far as its prompt, which would be pinned: nothing would fold, and memory would grow.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.exceptions import VLLMValidationError


def _refuse(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
    raise VLLMValidationError(
        "use_beam_search is not supported by this server, whose KV cache has a window: sample with "
        "n instead",
        parameter="use_beam_search",
    )


def refuse_beam_search(state: State) -> None:
    """Have every handler of vLLM's that can search with beams answer 400 to it."""
    for handler in vars(state)["_state"].values():
        if isinstance(handler, BeamSearchOnlineMixin):
            handler.beam_search = _refuse  # type: ignore[method-assign, assignment]
