"""Runs sequences on the engine and streams a record of each as it finishes, as NDJSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response
from vllm.inputs import EngineInput
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.server.access.admission import RETRY_AFTER_S, BusyError
from pte_vllm.server.adapters.registry import ConflictError, Resolved
from pte_vllm.server.metrics import counted
from pte_vllm.server.rollouts.in_flight import Job, run
from pte_vllm.server.rollouts.schemas import RolloutRequest, ScoreRequest
from pte_vllm.server.service import Service
from pte_vllm.wire.rollout import Rollout

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

KEEP_ALIVE_S = 10.0
"""A blank line goes out this often while nothing finishes."""

LOGPROBS_MODE = "processed_logprobs"


def resolve(service: Service, body: RolloutRequest | ScoreRequest) -> Resolved:
    """The adapter of a request; 404 if there is none, 409 if it is too old for the request."""
    try:
        return service.registry.resolve(
            body.adapter,
            min_version=body.min_weight_version,
            max_staleness=getattr(body, "max_staleness", None),
        )
    except LookupError as error:
        raise HTTPException(404, str(error)) from error
    except ConflictError as error:
        raise HTTPException(409, str(error)) from error


def check_logprobs_mode(service: Service) -> None:
    """Refuse where log-probs would not be those of the sampled distribution."""
    mode = service.engine.model_config.logprobs_mode
    if mode != LOGPROBS_MODE:
        raise HTTPException(
            400, f"rollouts need --logprobs-mode {LOGPROBS_MODE}; this server runs with {mode}"
        )


def validate(
    service: Service, prompt: EngineInput, params: SamplingParams, adapter: Resolved
) -> None:
    """All checks of a request, vLLM's and ours, before an answer begins; raises what they raise."""
    service.engine.input_processor.process_inputs(
        "validation", prompt, params, ("generate",), lora_request=adapter.lora
    )


def stream(service: Service, jobs: list[Job]) -> Response:
    """Start `jobs`, and answer with the record of each as it finishes; 429 if there is no room."""
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


def too_many(message: str) -> Response:
    """429, with the header that vLLM's handler of HTTPException would drop."""
    body = create_error_response(message, "TooManyRequests", HTTPStatus.TOO_MANY_REQUESTS)
    after = {"Retry-After": str(RETRY_AFTER_S)}
    return JSONResponse(body.model_dump(), HTTPStatus.TOO_MANY_REQUESTS, headers=after)


class _Records(StreamingResponse):
    """NDJSON of tasks as they finish; they are cancelled when the client goes away."""

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
