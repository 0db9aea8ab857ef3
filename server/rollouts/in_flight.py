"""One sequence runs on the engine, while its adapter may get a new version.

pin             it finishes on its version
switch_rebuild  it is stopped, and goes on from its tokens on the new version, which reads them
                again: KV cache and thought state are those of the new version
max_staleness   it ends, its tokens kept, once it is further behind than that
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

from vllm.exceptions import GenerationError
from vllm.inputs import EngineInput, TokensPrompt
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import SamplingParams

from pte_vllm.method.kept_record import KeptRecord, record_to_json
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import RequestOptions
from pte_vllm.server.adapters.catalog import Resolved
from pte_vllm.server.adapters.spool import Version
from pte_vllm.server.finished import read_kept, read_rho
from pte_vllm.server.service import Service
from pte_vllm.wire.rollout import InFlight, Rollout, WeightSpan

_ABORT_AGAIN_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The fields of a record that sampling and scoring each find in their own way."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    top_ids: tuple[tuple[int, ...], ...] | None = None
    top_logprobs: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence for the engine, rendered and validated."""

    prompt: EngineInput
    params: SamplingParams
    adapter: Resolved
    plan: FoldPlan
    group_id: str
    index: int
    kind: Literal["rollout", "score"]
    """What the metrics count it as."""
    read: Callable[[RequestOutput], Outcome]
    """What takes the outcome from the engine's final output."""
    in_flight: InFlight = "pin"
    """What happens when its adapter gets a new version."""
    max_staleness: int | None = None
    """How many versions it may fall behind before it ends; None sets no limit."""


async def render(service: Service, prompt: str | list[int]) -> EngineInput:
    """Turn a prompt into what the engine takes, with vLLM's renderer."""
    renderer, model = service.engine.renderer, service.engine.model_config
    raw = prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt)
    (rendered,) = await renderer.render_cmpl_async([parse_model_prompt(model, raw)])
    return rendered


async def run(service: Service, request_id: str, job: Job) -> Rollout:
    """Run a job and return its record, whose versions are those that sampled each part.

    Raises:
        GenerationError: if the engine ends it without a result.
    """
    part, parts, spans = job, 0, list[WeightSpan]()
    done = Outcome(prompt_ids=(), completion_ids=(), logprobs=(), finish_reason="")
    num_preempted: int | None = 0
    kept: KeptRecord | None = None
    while True:
        final, newer = await _generate(service, f"{request_id}-{parts}", part)
        outcome = job.read(final)
        start, end = len(done.completion_ids), len(done.completion_ids + outcome.completion_ids)
        done = Outcome(
            prompt_ids=done.prompt_ids or outcome.prompt_ids,
            completion_ids=done.completion_ids + outcome.completion_ids,
            logprobs=done.logprobs + outcome.logprobs,
            finish_reason=outcome.finish_reason,
            top_ids=outcome.top_ids,  # of a score, which has one part
            top_logprobs=outcome.top_logprobs,
        )
        if end > start:
            spans.append(WeightSpan(version=part.adapter.version, start=start, end=end))
            # A part that sampled nothing may have folded less often than the one before it.
            num_tokens = len(done.prompt_ids) + end
            kept = await read_kept(service.kept, f"{request_id}-{parts}", job.plan, num_tokens)
        preempted = final.metrics.num_preemptions if final.metrics is not None else None
        num_preempted = None if None in (num_preempted, preempted) else num_preempted + preempted
        if not (newer and outcome.finish_reason == "abort" and job.in_flight == "switch_rebuild"):
            break
        if end == job.params.max_tokens:
            done = replace(done, finish_reason="length")
            break
        part, parts = await _on_newest(service, job, done, kept), parts + 1
    num_tokens = len(done.prompt_ids) + len(done.completion_ids)
    rho = None
    if part.adapter.lora is not None:
        # The last part knows: it folded everything before it again on its own version.
        rho = await read_rho(service.rho, f"{request_id}-{parts}", job.plan, num_tokens)
    return Rollout(
        prompt_ids=done.prompt_ids,
        completion_ids=done.completion_ids,
        logprobs=done.logprobs,
        mask=(1,) * len(done.completion_ids),
        finish_reason=done.finish_reason,
        adapter=part.adapter.engine_name,
        rule=RequestOptions.parse(job.params.extra_args).rule or part.adapter.rule,
        weight_versions=tuple(spans),
        plan=job.plan,
        rho=rho,
        kept=kept,
        group_id=job.group_id,
        index=job.index,
        num_preempted=num_preempted,
        top_ids=done.top_ids,
        top_logprobs=done.top_logprobs,
    )


async def _generate(service: Service, request_id: str, job: Job) -> tuple[RequestOutput, bool]:
    """Return the engine's final output, and whether a new version had it stopped."""
    registry, name = service.registry, job.adapter.pushed_name
    final: RequestOutput | None = None
    stopping: asyncio.Task[None] | None = None

    async def stop() -> None:
        while True:  # the engine may not know the request yet
            await service.engine.abort(request_id)
            await asyncio.sleep(_ABORT_AGAIN_S)

    def hear(newest: Version) -> None:
        nonlocal stopping
        behind = newest.number - job.adapter.version
        stale = job.max_staleness is not None and behind > job.max_staleness
        switch = behind > 0 and job.in_flight == "switch_rebuild"
        if (stale or switch) and stopping is None:
            stopping = asyncio.create_task(stop())

    with registry.use.using(job.adapter.engine_name), registry.use.listening(name, hear):
        if name is not None and (newest := registry.catalog.newest(name)) is not None:
            hear(newest)  # it may have come since the request did
        try:
            async for output in service.engine.generate(
                copy(job.prompt), job.params, request_id, lora_request=job.adapter.lora
            ):
                final = output
        finally:
            if stopping is not None:
                stopping.cancel()
    if final is None or not final.finished:
        raise GenerationError(f"{request_id} ended without a final output")
    if final.outputs[0].finish_reason == "error":
        raise GenerationError(f"{request_id}: the engine reports an error")
    return final, stopping is not None


async def _on_newest(service: Service, job: Job, done: Outcome, kept: KeptRecord | None) -> Job:
    """Make the job that finishes this one on the newest version.

    What is done counts as thoughts, not as question; and what was kept is kept again, as the tokens
    after it were sampled from that.
    """
    sampled = len(done.completion_ids)
    params = job.params.clone()
    params.max_tokens -= sampled
    params.min_tokens = max(0, params.min_tokens - sampled)
    if params.seed is not None:
        params.seed = (params.seed + sampled) % 2**63  # draws of its own, again the same ones
    params.extra_args = {**(params.extra_args or {}), "pte_pin_tokens": job.plan.pin_tokens}
    if kept:
        params.extra_args["pte_kept"] = record_to_json(kept)
    prompt = await render(service, [*done.prompt_ids, *done.completion_ids])
    adapter = service.registry.catalog.resolve(job.adapter.pushed_name)
    return replace(job, prompt=prompt, params=params, adapter=adapter)
