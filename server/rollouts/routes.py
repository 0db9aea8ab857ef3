"""`POST /pte/v1/rollouts` samples answers; `POST /pte/v1/score` gives log-probs of given ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from vllm.exceptions import RetryableRequestError
from vllm.inputs import EngineInput
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from pte_vllm.method.requests import request_plan
from pte_vllm.method.spans import Spans
from pte_vllm.server.adapters.catalog import Resolved
from pte_vllm.server.rollouts.generation import (
    check_logprobs_mode,
    pins_in_numbers,
    resolve,
    stream,
    validate,
)
from pte_vllm.server.rollouts.in_flight import Job, Outcome, render
from pte_vllm.server.rollouts.schemas import RolloutRequest, Sampling, ScoreRequest
from pte_vllm.server.service import Service, service
from pte_vllm.wire.folds import num_folds

router = APIRouter()


@router.post("/rollouts")
async def rollouts(body: RolloutRequest, request: Request) -> Response:
    """Send `n` samples of each prompt, an NDJSON record for each, in the order they finish."""
    state = service(request)
    check_logprobs_mode(state)
    adapter = resolve(state, body)
    prompts: Sequence[str | list[int]] = body.token_ids or body.prompts or ()
    jobs: list[Job] = []
    count = len(prompts)
    for prompt, given, group_id, wanted in zip(
        prompts, body.pins(count), body.group_ids(count), body.wanted(count), strict=True
    ):
        rendered = await render(state, prompt)
        pins = pins_in_numbers(state, body, rendered["prompt_token_ids"], given)
        options = _xargs(body, *pins)
        for index in wanted:
            seed = sample_seed(body.sampling.seed, group_id, index)
            params = _sampling_params(state, body.sampling, rendered, seed, options)
            if index == wanted[0]:
                validate(state, rendered, params, adapter)
            job = _job(state, rendered, params, adapter, group_id, index)
            jobs.append(replace(job, in_flight=body.in_flight, max_staleness=body.max_staleness))
    return stream(state, jobs)


@router.post("/score")
async def score(body: ScoreRequest, request: Request) -> Response:
    """Send log-probs of given tokens under the request's plan, in the order they finish."""
    state = service(request)
    check_logprobs_mode(state)
    _check_top(state, body.top_logprobs)
    adapter = resolve(state, body)
    jobs: list[Job] = []
    count = len(body.token_ids)
    kept = body.kept or [None] * count
    for tokens, num_prompt, given, group_id, record in zip(
        *(body.token_ids, body.prompt_tokens, body.pins(count), body.group_ids(count), kept),
        strict=True,
    ):
        # To the engine all tokens are prompt: what is pinned has to be said.
        pins = pins_in_numbers(state, body, tokens[:num_prompt], given)
        options = _xargs(body, *pins)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=body.top_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=options | ({"pte_kept": record} if record else {}),
        )
        rendered = await render(state, tokens)
        validate(state, rendered, params, adapter)
        job = _job(state, rendered, params, adapter, group_id, 0, num_prompt)
        folds = num_folds(job.plan, len(tokens))
        if record and len(record) > folds:
            raise HTTPException(
                400, f"kept: {len(record)} entries for the {folds} folds of sequence {len(jobs)}"
            )
        jobs.append(job)
    return stream(state, jobs)


def _check_top(state: Service, count: int) -> None:
    """Refuse, with 400, to name more tokens in each place than this server does."""
    most = state.engine.model_config.max_logprobs
    if most == -1:
        most = state.engine.model_config.get_vocab_size()
    if count > most:
        raise HTTPException(
            400, f"top_logprobs is {count}, more than this server's --max-logprobs {most}"
        )


def sample_seed(seed: int | None, group_id: str, index: int) -> int | None:
    """Return a seed of a sample's own, which is the same when it is asked for again."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{group_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _xargs(
    body: RolloutRequest | ScoreRequest, pin_tokens: int, pin_spans: Spans
) -> dict[str, Any]:
    """Return the options of a plan that a request gives, by vLLM's `vllm_xargs` names."""
    given = {
        "pte_window": body.window_tokens,
        "pte_pin_tokens": pin_tokens,
        "pte_pin_spans": list(map(list, pin_spans)) or None,
        "pte_update": body.rule,
        "pte_evict": body.evict,
        "pte_evict_seed": body.evict_seed,
        "pte_keep": body.keep_tokens,
        "pte_keep_score": body.keep_score,
        "pte_return_kept": True,
    }
    return {name: value for name, value in given.items() if value is not None}


def _sampling_params(
    state: Service,
    sampling: Sampling,
    prompt: EngineInput,
    seed: int | None,
    options: Mapping[str, Any],
) -> SamplingParams:
    """Make vLLM's parameters of one sample.

    Raises:
        HTTPException: 400 if `max_tokens` exceeds the room that is left.
    """
    limit, length = state.engine.model_config.max_model_len, len(prompt["prompt_token_ids"])
    room = limit - length
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    if max_tokens > room or room < 1:
        raise HTTPException(
            400,
            f"max_tokens {max_tokens} after a prompt of {length} tokens exceeds this server's "
            f"--max-model-len {limit}",
        )
    return SamplingParams(
        **sampling.model_dump(exclude={"max_tokens", "seed"}),
        max_tokens=max_tokens,
        seed=seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=dict(options),
    )


def _job(
    state: Service,
    prompt: EngineInput,
    params: SamplingParams,
    adapter: Resolved,
    group_id: str,
    index: int,
    num_prompt: int | None = None,
) -> Job:
    """Make a job that scores the tokens after `num_prompt`, or samples new ones without it."""
    tokens = tuple(prompt["prompt_token_ids"])

    def sampled(final: RequestOutput) -> Outcome:
        completion = final.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs or (), strict=True)
        return Outcome(
            prompt_ids=tokens,
            completion_ids=tuple(completion.token_ids),
            logprobs=tuple(entry[token].logprob for token, entry in pairs),
            finish_reason=completion.finish_reason or "",
        )

    def scored(final: RequestOutput) -> Outcome:
        if final.outputs[0].finish_reason == "abort":  # a part of a score is of no use
            raise RetryableRequestError("the score was aborted; ask again")
        entries = list((final.prompt_logprobs or ())[num_prompt:])
        pairs = zip(tokens[num_prompt:], entries, strict=True)
        outcome = Outcome(
            prompt_ids=tokens[:num_prompt],
            completion_ids=tokens[num_prompt:],
            logprobs=tuple(entry[token].logprob for token, entry in pairs),
            finish_reason="scored",
        )
        if not (count := params.prompt_logprobs):
            return outcome
        top = [_best(entry, count) for entry in entries]
        return replace(
            outcome,
            top_ids=tuple(tuple(token for token, _ in row) for row in top),
            top_logprobs=tuple(tuple(logprob for _, logprob in row) for row in top),
        )

    return Job(
        prompt=prompt,
        params=params,
        adapter=adapter,
        plan=request_plan(state.config, params, len(tokens), state.block_size),
        group_id=group_id,
        index=index,
        kind="rollout" if num_prompt is None else "score",
        read=sampled if num_prompt is None else scored,
    )


def _best(entry: Mapping[int, Logprob], count: int) -> list[tuple[int, float]]:
    """Return the `count` most probable tokens of one place and their log-probs, best first.

    vLLM gives these and the token that stands there, whose rank is then beyond them.
    """
    found = [(token, value) for token, value in entry.items() if (value.rank or 0) <= count]
    found.sort(key=lambda pair: pair[1].rank or 0)
    return [(token, value.logprob) for token, value in found]
