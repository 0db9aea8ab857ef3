"""Runs sequences on the engine and streams a record of each as it finishes, as NDJSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GenerationError
from vllm.inputs import EngineInput, TokensPrompt
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.plan import FoldPlan
from pte_vllm.server.adapters import ConflictError, Resolved
from pte_vllm.server.state import Service
from pte_vllm.train.rollout import FoldEvent, Rollout, WeightSpan, fold_events, with_rho

logger = init_logger(__name__)

KEEP_ALIVE_S = 10.0
"""A blank line goes out this often while nothing finishes."""

LOGPROBS_MODE = "processed_logprobs"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence for the engine, rendered and validated."""

    prompt: EngineInput
    params: SamplingParams
    adapter: Resolved
    plan: FoldPlan
    group_id: str
    index: int
    read: Callable[[RequestOutput], Outcome]
    """Takes the outcome from the engine's final output."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is particular to sampling and to scoring; the fields are the record's."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def resolve(service: Service, name: str | None, min_version: int | None) -> Resolved:
    """The adapter of a request; 404 if there is none, 409 if it is too old."""
    try:
        return service.registry.resolve(name, min_version=min_version)
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


async def render(service: Service, prompt: str | list[int]) -> EngineInput:
    """A prompt as the engine takes it, through vLLM's renderer."""
    renderer, model = service.engine.renderer, service.engine.model_config
    raw = prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt)
    (rendered,) = await renderer.render_cmpl_async([parse_model_prompt(model, raw)])
    return rendered


def validate(
    service: Service, prompt: EngineInput, params: SamplingParams, adapter: Resolved
) -> None:
    """All checks of a request, vLLM's and ours, before an answer begins; raises what they raise."""
    service.engine.input_processor.process_inputs(
        "validation", prompt, params, ("generate",), lora_request=adapter.lora
    )


def stream(service: Service, jobs: list[Job]) -> StreamingResponse:
    """Answer with the records of `jobs`, each as it finishes.

    A client that goes away cancels the body's iterator, and with it every job.
    """
    return StreamingResponse(_lines(service, jobs), media_type="application/x-ndjson")


async def _lines(service: Service, jobs: list[Job]) -> AsyncIterator[bytes]:
    request_id = f"rollout-{uuid4().hex[:16]}"
    tasks = [
        asyncio.create_task(_run(service, f"{request_id}-{i}", job)) for i, job in enumerate(jobs)
    ]
    for task in tasks:
        task.add_done_callback(_retrieve)
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield b"\n"
            for task in done:
                yield _line(task.result().to_json())
    except Exception as error:  # the status is out; the reason follows as the last line
        logger.warning("%s ended early: %s", request_id, error)
        yield _line(_error(error))
    finally:
        for task in tasks:
            task.cancel()


async def _run(service: Service, request_id: str, job: Job) -> Rollout:
    final: RequestOutput | None = None
    with service.registry.using(job.adapter):
        async for output in service.engine.generate(
            copy(job.prompt), job.params, request_id, lora_request=job.adapter.lora
        ):
            final = output
    if final is None or not final.finished:
        raise GenerationError(f"{request_id} ended without a final output")
    if final.outputs[0].finish_reason == "error":
        raise GenerationError(f"{request_id}: the engine reports an error")
    outcome = job.read(final)
    events = fold_events(job.plan, len(outcome.prompt_ids) + len(outcome.completion_ids))
    if events and job.adapter.lora is not None:
        (rho,) = await service.engine.collective_rpc("pte_rho", args=(request_id,))
        events = with_rho(events, rho)
    return _record(job, final, outcome, events)


def _record(
    job: Job, final: RequestOutput, outcome: Outcome, events: tuple[FoldEvent, ...]
) -> Rollout:
    count = len(outcome.completion_ids)
    span = WeightSpan(version=job.adapter.version, start=0, end=count)
    return Rollout(
        prompt_ids=outcome.prompt_ids,
        completion_ids=outcome.completion_ids,
        logprobs=outcome.logprobs,
        mask=(1,) * count,
        finish_reason=outcome.finish_reason,
        adapter=job.adapter.engine_name,
        weight_versions=(span,) if count else (),
        plan=job.plan,
        fold_events=events,
        group_id=job.group_id,
        index=job.index,
        num_preempted=final.metrics.num_preemptions if final.metrics is not None else None,
    )


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _error(error: Exception) -> dict[str, Any]:
    body = create_error_response(error).model_dump()
    if isinstance(error, EngineDeadError):
        body["error"]["code"] = HTTPStatus.SERVICE_UNAVAILABLE.value  # the server is about to end
    return body


def _retrieve(task: asyncio.Task[Rollout]) -> None:
    """Mark a failure as seen: only the first of a request is told."""
    if not task.cancelled():
        task.exception()
