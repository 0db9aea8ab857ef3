"""Mistakes of clients: vLLM words one so that it misleads, and logs some as if it had failed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

_LOGGERS = (
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.generative_scoring.serving",
    "vllm.renderers.chat_utils",
    "vllm.renderers.hf",
)
"""Those that log a traceback where the client gets 400. Other routes log nothing then."""
_RENDERERS = ("render_chat", "render_completion", "render_responses")


def mend_client_errors(state: State) -> None:
    """Have all of vLLM's routes answer mistakes of clients in plain words, without a traceback.

    Args:
        state: the app's, once vLLM has filled it.
    """
    _refuse_full_prompts(state.online_renderer)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(found, _NoClientErrors) for found in logger.filters):
            logger.addFilter(_NoClientErrors())


def _refuse_full_prompts(renderer: OnlineRenderer) -> None:
    """Refuse a prompt that leaves no room for an answer.

    vLLM 0.32 makes it `max_tokens` 0, and says that `max_tokens` must be at least 1, whatever the
    client sent.
    """
    limit = renderer.model_config.max_model_len

    def refusing(render: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(render)
        async def rendered(request: Any, **kwargs: Any) -> Any:
            result = await render(request, **kwargs)
            for prompt in _prompts(result):
                length = len(prompt.get("prompt_token_ids") or ())
                if length == limit and not _only_echoes(request):
                    raise VLLMValidationError(
                        f"the prompt has {length} tokens, and the context of this server "
                        f"(--max-model-len) has {limit}: there is no room for an answer. Send at "
                        f"most {limit - 1} tokens",
                        parameter="prompt",
                        value=length,
                    )
            return result

        return rendered

    for name in _RENDERERS:
        setattr(renderer, name, refusing(getattr(renderer, name)))


def _prompts(result: Any) -> Sequence[Any]:
    """Return the prompts in what a method of `_RENDERERS` returns."""
    if isinstance(result, ErrorResponse):
        return ()
    if isinstance(result, list):
        return result
    if isinstance(result, tuple):
        return list(result[1])
    return [result.engine_input]


def _only_echoes(request: Any) -> bool:
    """Whether a request asks for its prompt and no more, about which vLLM has its own words."""
    return bool(getattr(request, "echo", False) and getattr(request, "max_tokens", None) == 0)


class _NoClientErrors(logging.Filter):
    """Drops records about an exception that the client is told of, with a status below 500."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if not isinstance(error, Exception):
            return True
        return create_error_response(error).error.code >= 500
