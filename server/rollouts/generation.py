"""Sequences run on the engine, and a record of each goes out as it finishes, as NDJSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.engine.chat_pins import with_pins
from pte_vllm.engine.earlier import ONLY_CHECKED
from pte_vllm.method.requests import LOGPROBS_MODE, RequestOptions
from pte_vllm.method.spans import Spans
from pte_vllm.server.access.admission import BusyError, too_many
from pte_vllm.server.adapters.catalog import ConflictError, Resolved
from pte_vllm.server.metrics import counted
from pte_vllm.server.rollouts.in_flight import Job, run
from pte_vllm.server.rollouts.schemas import RolloutRequest, ScoreRequest
from pte_vllm.server.service import Service
from pte_vllm.wire.rollout import Rollout

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

KEEP_ALIVE_S = 10.0
"""A blank line goes out this often while nothing finishes."""

FIELDS = {
    "pte_window": "window_tokens",
    "pte_pin_tokens": "pin_tokens",
    "pte_pin_spans": "pin_spans",
    "pte_update": "update",
    "pte_evict": "evict",  # and the seed, which begins so
    "pte_keep_score": "keep_score",
    "pte_kept": "kept",
    "pte_keep": "keep_tokens",
    "pte_pin": "pin",  # last, as other names begin so
}
"""Fields of a request by the names that the same options have in `vllm_xargs`."""


def resolve(service: Service, body: RolloutRequest | ScoreRequest) -> Resolved:
    """Return the adapter of a request.

    Raises:
        HTTPException: 404 if there is none, 409 if it is too old for the request.
    """
    try:
        return service.registry.catalog.resolve(
            body.adapter,
            min_version=body.min_weight_version,
            max_staleness=getattr(body, "max_staleness", None),
        )
    except LookupError as error:
        raise HTTPException(404, str(error)) from error
    except ConflictError as error:
        raise HTTPException(409, str(error)) from error


def check_logprobs_mode(service: Service) -> None:
    """Refuse, with 400, where log-probs would not be those of the sampled distribution."""
    mode = service.engine.model_config.logprobs_mode
    if mode != LOGPROBS_MODE:
        raise HTTPException(
            400, f"rollouts need --logprobs-mode {LOGPROBS_MODE}; this server runs with {mode}"
        )


def validate(
    service: Service, prompt: EngineInput, params: SamplingParams, adapter: Resolved
) -> None:
    """Make all checks of a request, vLLM's and ours, before an answer begins.

    Raises:
        HTTPException: 400 if an option of the plan does not fit; it has the name of its field here.
        VLLMValidationError: for anything else.
    """
    try:
        service.engine.input_processor.process_inputs(
            ONLY_CHECKED, prompt, params, ("generate",), lora_request=adapter.lora
        )
    except VLLMValidationError as error:
        if error.parameter != "vllm_xargs":
            raise
        raise HTTPException(400, _with_fields(str(error.args[0]))) from error


def pins_in_numbers(
    service: Service,
    body: RolloutRequest | ScoreRequest,
    prompt: Sequence[int],
    given: tuple[int | None, Spans],
) -> tuple[int, Spans]:
    """Return how many tokens at the start of a sequence are pinned, and which later spans.

    They are said to the engine in any case: a default of the server is for requests that tell no
    question from its answer.

    Args:
        service: whose chat template tells questions apart.
        body: the request.
        prompt: the tokens of the question, or of the conversation up to the answer.
        given: what the request says of this sequence in numbers.

    Raises:
        HTTPException: 400 if `pin` asks for what cannot be found in the prompt, or pinned.
    """
    pin_tokens, pin_spans = given
    if body.pin is None:
        return len(prompt) if pin_tokens is None else pin_tokens, pin_spans
    try:
        found = with_pins(
            RequestOptions(pin=body.pin),
            service.config,
            tokenizer=service.engine.input_processor.tokenizer,
            prompt=prompt,
            earlier=None,
        )
    except ValueError as error:
        raise HTTPException(400, _with_fields(str(error))) from error
    assert found.pin_tokens is not None
    if found.pin_spans and body.evict == "random":
        raise HTTPException(
            400,
            f"pin is {body.pin}, and evict random draws from all that a window holds: leave one of "
            "them out, or send pin prompt",
        )
    return found.pin_tokens, found.pin_spans


def _with_fields(message: str) -> str:
    """Write a message about options with the names of their fields here."""
    for name, field in FIELDS.items():
        message = message.replace(name, field)
    return message


def stream(service: Service, jobs: list[Job]) -> Response:
    """Start `jobs` and answer with the record of each as it finishes, or 429 without room."""
    try:
        service.admission.enter(len(jobs))
    except BusyError as error:
        return too_many(str(error))
    request_id = f"rollout-{uuid4().hex[:16]}"
    tasks = [
        asyncio.create_task(_counted(service, f"{request_id}-{i}", job))
        for i, job in enumerate(jobs)
    ]
    for task in tasks:
        task.add_done_callback(_retrieve)
        task.add_done_callback(lambda _: service.admission.leave())
    return _Records(request_id, tasks)


async def _counted(service: Service, request_id: str, job: Job) -> Rollout:
    with counted(job.kind):
        return await run(service, request_id, job)


class _Records(StreamingResponse):
    """An answer with a line of each task as it finishes; it cancels them when its client leaves."""

    def __init__(self, request_id: str, tasks: list[asyncio.Task[Rollout]]) -> None:
        super().__init__(_lines(request_id, tasks), media_type="application/x-ndjson")
        self._tasks = tasks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client left before the first line
            for task in self._tasks:
                task.cancel()


async def _lines(request_id: str, tasks: list[asyncio.Task[Rollout]]) -> AsyncIterator[bytes]:
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield b"\n"
            for task in done:
                yield task.result().to_line() + b"\n"
    except Exception as error:  # the status is out; the reason follows as the last line
        logger.warning("%s ended early: %s", request_id, error)
        yield json.dumps(_error(error), separators=(",", ":")).encode() + b"\n"


def _error(error: Exception) -> dict[str, Any]:
    body = create_error_response(error).model_dump()
    if isinstance(error, EngineDeadError):
        body["error"]["code"] = HTTPStatus.SERVICE_UNAVAILABLE.value  # the server is about to end
    return body


def _retrieve(task: asyncio.Task[Rollout]) -> None:
    """Mark a failure as seen: only the first of a request is told."""
    if not task.cancelled():
        task.exception()
