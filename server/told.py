"""An answer tells what its request pinned, and what was folded: whole answers and streams.

vLLM hands the dict of a KV connector through to its responses as it is, and with PTE there is no
connector. So `generate` of the engine puts it into the last output of a request: how much was
folded follows from the plan and from the length of each choice. vLLM's streams have no field for
it, save those of `/v1/responses`; a middleware writes it into the chunk that ends the answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from pte_vllm.engine.earlier import EARLIER
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.plan import FoldPlan

FIELD = "kv_transfer_params"

_ENDS = (b'"finish_reason":"', b'"message_delta"')
"""One of them is in every chunk that may end an answer, and in no text, which escapes quotes."""
_LAST_EVENTS = ("message_delta", "message-end")
"""Of `/v1/messages` and of Cohere's route, the events with the reason of the end."""


@dataclass
class _Prompt:
    """A prompt of a request that is answered."""

    choices: int
    ended: int = 0
    """How many choices have ended in what was sent."""
    told: dict[str, Any] | None = None
    """What is told of it, once its last choice has ended."""


@dataclass
class _Answer:
    """An answer of HTTP: what is known of its prompts, in their order."""

    prompts: list[_Prompt] = field(default_factory=list)

    def add(self, choices: int) -> _Prompt:
        """Add a prompt that the engine is asked to go on with."""
        self.prompts.append(_Prompt(choices))
        return self.prompts[-1]

    def with_told(self, event: bytes) -> bytes:
        """Return an event of a stream, with what is told of its prompt where that ends with it."""
        head, mark, text = event.rpartition(b"data: {")
        if not mark:
            return event
        data = json.loads(b"{" + text)
        prompt = self._ended_by(data)
        if prompt is None or prompt.told is None or prompt.ended < prompt.choices:
            return event
        data[FIELD] = prompt.told
        return head + b"data: " + json.dumps(data, separators=(",", ":")).encode()

    def _ended_by(self, data: Mapping[str, Any]) -> _Prompt | None:
        """Count the choices that end with an event, and return their prompt; None without any."""
        if data.get("type") in _LAST_EVENTS:
            self.prompts[0].ended = self.prompts[0].choices
            return self.prompts[0]
        ended = [c["index"] for c in data.get("choices") or () if c.get("finish_reason")]
        if not ended:
            return None
        number = ended[0] // self.prompts[0].choices  # all prompts have as many
        if number >= len(self.prompts):
            return None
        self.prompts[number].ended += len(ended)
        return self.prompts[number]


_ANSWER: ContextVar[_Answer | None] = ContextVar("pte_answer", default=None)
"""The answer that this task, or the one that started it, makes."""


def tell_folds(engine: EngineClient, config: EngineConfig, block_size: int) -> None:
    """Have the last output of each request say what was pinned and folded, where it is to be told.

    Args:
        engine: AsyncLLM, whose `generate` is replaced.
        config: the engine's defaults.
        block_size: tokens of a block of its KV cache.
    """
    replaced: Any = engine
    generate = replaced.generate

    @wraps(generate)
    def telling(
        prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        answer = _ANSWER.get()
        place = None if answer is None else answer.add(sampling_params.n)
        results = generate(prompt, sampling_params, request_id, **options)
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        return _telling(results, request_id, place, is_delta, config, block_size)

    replaced.generate = telling


async def _telling(
    results: AsyncGenerator[RequestOutput, None],
    request_id: str,
    place: _Prompt | None,
    is_delta: bool,
    config: EngineConfig,
    block_size: int,
) -> AsyncGenerator[RequestOutput, None]:
    earlier, is_first = None, True
    lengths = Counter[int]()
    async with aclosing(results):  # who stops listening has the request aborted
        async for result in results:
            if is_first:  # its checks were passed, and what it pins is known
                earlier, is_first = EARLIER.exactly(request_id), False
            if earlier is not None and earlier.is_told:
                for output in result.outputs:
                    before = lengths[output.index] if is_delta else 0
                    lengths[output.index] = before + len(output.token_ids)
                if result.finished:
                    plan = earlier.plan(config, block_size)
                    num_prompt = earlier.num_prompt_tokens
                    told = told_of(plan, {c: num_prompt + lengths[c] for c in sorted(lengths)})
                    result.kv_transfer_params = told
                    if place is not None:
                        place.told = told
            yield result


def told_of(plan: FoldPlan, lengths: Mapping[int, int]) -> dict[str, Any]:
    """Return what is told of a request.

    Args:
        plan: its plan.
        lengths: tokens of each choice by its number, the prompt's included.
    """
    pinned: dict[str, Any] = {"pin_tokens": plan.pin_tokens}
    if plan.pin_spans:
        pinned["pin_spans"] = [list(span) for span in plan.pin_spans]
    folds = {choice: _folds(plan, length) for choice, length in lengths.items()}
    if len(folds) == 1:
        return {"pte": pinned | next(iter(folds.values()))}
    return {"pte": pinned | {"choices": [{"index": c, **found} for c, found in folds.items()]}}


def _folds(plan: FoldPlan, length: int) -> dict[str, int]:
    folded = plan.folded_blocks(max(0, length - 2))  # the last token was never computed
    return {"folds": folded // plan.evict_blocks, "folded_tokens": folded * plan.block_size}


class FoldsInStreams:
    """ASGI middleware that writes what is told into the chunk that ends a streamed answer.

    All other chunks pass through as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        answer = _Answer()
        token = _ANSWER.set(answer)
        try:
            await self.app(scope, receive, _sending(answer, send))
        finally:
            _ANSWER.reset(token)


def _sending(answer: _Answer, send: Send) -> Send:
    is_stream = False

    async def sending(message: Message) -> None:
        nonlocal is_stream
        if message["type"] == "http.response.start":
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            is_stream = kind.startswith("text/event-stream")
        elif is_stream and answer.prompts and _may_end(body := message.get("body", b"")):
            events = [answer.with_told(event) for event in body.split(b"\n\n")]
            message = {**message, "body": b"\n\n".join(events)}
        await send(message)

    return sending


def _may_end(chunk: bytes) -> bool:
    return any(end in chunk for end in _ENDS)
