"""vLLM's route of tokens in, tokens out tells the version of a pushed adapter in its answer.

It also names the tokens of log-probs as vLLM's other routes do with `return_tokens_as_token_ids`:
clients that were written for earlier versions read `token`, and fail without it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.serving import format_token_id_placeholder
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateTokensResponse
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.outputs import RequestOutput, WeightVersionSpan

from pte_vllm.server.adapters.catalog import Catalog


class NamedTokensResponse(GenerateTokensResponse):
    """vLLM's answer, whose log-probs have `token` beside `token_id`."""

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Return what is sent."""
        return with_names(super().model_dump(**options))


def with_names(answer: dict[str, Any]) -> dict[str, Any]:
    """Add `"token": "token_id:N"` wherever log-probs have a `token_id`; return the same answer.

    Args:
        answer: a whole answer, or one chunk of a stream.
    """
    for choice in answer.get("choices") or ():
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            for named in (entry, *(entry.get("top_logprobs") or ())):
                if "token_id" in named:
                    named["token"] = format_token_id_placeholder(named["token_id"])
    return answer


def _with_names_in_line(line: str) -> str:
    """Do the same to one event of a stream; what has no log-probs stays as it is."""
    if '"token_id":' not in line:
        return line
    answer = with_names(json.loads(line.removeprefix("data: ")))
    return f"data: {json.dumps(answer, ensure_ascii=False, separators=(',', ':'))}\n\n"


class PTEServingTokens(ServingTokens):
    """Labels tokens with the version of a pushed adapter, where vLLM tells the base weights'.

    Log-probs name their tokens as text too.
    """

    def __init__(self, *args: Any, catalog: Catalog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._catalog = catalog

    async def serve_tokens_full_generator(
        self,
        request: Any,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        model_name: str,
        request_metadata: Any,
        **options: Any,
    ) -> Any:
        results = self._labelled(result_generator, model_name)
        answer = await super().serve_tokens_full_generator(
            request, results, request_id, model_name, request_metadata, **options
        )
        if isinstance(answer, GenerateTokensResponse):
            return NamedTokensResponse.model_construct(answer.model_fields_set, **dict(answer))
        return answer

    async def serve_tokens_stream_generator(
        self,
        request: Any,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        model_name: str,
        request_metadata: Any,
    ) -> AsyncGenerator[str, None]:
        results = self._labelled(result_generator, model_name)
        async with aclosing(
            super().serve_tokens_stream_generator(
                request, results, request_id, model_name, request_metadata
            )
        ) as chunks:
            async for chunk in chunks:
                yield _with_names_in_line(chunk)

    async def _labelled(
        self, results: AsyncGenerator[RequestOutput, None], engine_name: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Replace the spans of `results` by one: a request stays with its adapter's version."""
        version = self._pushed_version(engine_name)
        async with aclosing(results):
            async for result in results:
                for output in result.outputs if version is not None else ():
                    if output.weight_versions:
                        end = output.weight_versions[-1].end
                        output.weight_versions = [WeightVersionSpan(str(version), 0, end)]
                yield result

    def _pushed_version(self, engine_name: str) -> int | None:
        """Return its number; None for the base model, or a LoRA that was not pushed."""
        try:
            return self._catalog.versions(engine_name)[-1].number
        except LookupError:
            return None


def serving_tokens(
    engine: EngineClient, state: State, args: Namespace, catalog: Catalog
) -> PTEServingTokens:
    """Make what takes the place of vLLM's `state.serving_tokens`, the way vLLM makes its own."""
    own: dict[str, Any] = {}
    if hasattr(state.serving_tokens, "online_derenderer"):  # since 0.33
        own["online_derenderer"] = state.online_derenderer
    return PTEServingTokens(
        engine,
        state.openai_serving_models,
        state.online_renderer,
        catalog=catalog,
        request_logger=state.serving_tokens.request_logger,
        return_tokens_as_token_ids=args.return_tokens_as_token_ids,
        enable_prompt_tokens_details=args.enable_prompt_tokens_details,
        enable_log_outputs=args.enable_log_outputs,
        force_no_detokenize=args.tokens_only,
        **own,
    )
