"""A streamed request that cannot run is refused before its answer begins, with HTTP 400.

vLLM checks a request when its generator is first iterated. For a stream that is after status and
headers went out, so a mistake would come as an event within an answer 200, or not at all.

All of vLLM's routes call `generate` of the engine, or a method that will, before they make their
answer. So the check is made there, once more than vLLM makes it. Nothing waits for the engine, and
the stream itself is vLLM's: its headers, keep-alives and aborts are as they were.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from copy import deepcopy
from functools import wraps
from typing import Any

from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from pte_vllm.engine.earlier import ONLY_CHECKED


def check_before_streams(engine: EngineClient, state: State) -> None:
    """Have vLLM's and our checks of a streamed request made when its generator is asked for.

    Args:
        engine: AsyncLLM, whose `generate` then raises what it would raise at its first iteration.
        state: the app's, once vLLM has filled it.
    """
    _check_generate(engine)
    responses = getattr(state, "openai_serving_responses", None)
    if responses is not None:  # it calls `generate` at its own first iteration
        _check_responses(engine, responses)


def _check_generate(engine: Any) -> None:
    generate = engine.generate

    @wraps(generate)
    def checked(
        prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        _check(engine, prompt, sampling_params, options)
        found: AsyncGenerator[RequestOutput, None] = generate(
            prompt, sampling_params, request_id, **options
        )
        return found

    engine.generate = checked


def _check_responses(engine: Any, responses: Any) -> None:
    generate = responses._generate_with_builtin_tools

    @wraps(generate)
    def checked(
        request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **options: Any
    ) -> AsyncGenerator[Any, None]:
        _check(engine, engine_input, sampling_params, options)
        found: AsyncGenerator[Any, None] = generate(
            request_id, engine_input, sampling_params, *args, **options
        )
        return found

    responses._generate_with_builtin_tools = checked


def _check(engine: Any, prompt: Any, params: Any, options: dict[str, Any]) -> None:
    """Raise what vLLM or we have against a streamed request.

    Raises:
        VLLMValidationError: If it cannot run; the routes answer HTTP 400.
    """
    if not isinstance(params, SamplingParams) or params.output_kind != RequestOutputKind.DELTA:
        return  # an answer that is sent whole is checked before it begins
    if not (isinstance(prompt, dict) and "type" in prompt):
        return  # no route renders later
    lora: LoRARequest | None = options.get("lora_request")
    engine.input_processor.process_inputs(
        ONLY_CHECKED,
        prompt,
        deepcopy(params),  # the check may write into them
        ("generate",),
        lora_request=lora,
        data_parallel_rank=options.get("data_parallel_rank"),
    )
