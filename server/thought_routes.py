"""Routes below `/pte/v1/thoughts` tell a request's thought state, and its folds as they happen."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from pte_vllm.engine.earlier import EARLIER
from pte_vllm.server.access.admission import too_many
from pte_vllm.server.service import Service, service

router = APIRouter()

MAX_LISTENERS = 32
"""Event streams open at once; each asks the engine `1 / POLL_S` times a second."""

POLL_S = 0.25
KEEP_ALIVE_S = 10.0
"""A comment goes out this often while nothing folds, so that proxies keep the connection."""

SETTLE_S = 1.0
"""The worker hears of an end one step after the client."""


@router.get("/thoughts/{id}")
async def get_thoughts(
    id: str, request: Request, format: Literal["json", "safetensors"] = "json"
) -> Response:
    """Tell folds, ‖S‖ per layer and ρ per fold of a running or recent request; or send S itself."""
    state = service(request)
    if format == "json":
        return JSONResponse(known(id, await state.engines.find("pte_thoughts", id)))
    is_known, content = await state.engines.find(
        "pte_thoughts_file", id, unknown=lambda answer: not answer[0]
    )
    known(id, is_known or None)
    if content is None:
        raise HTTPException(
            404,
            f"request {id} has no thought state: it runs without a PTE adapter, or waits to start "
            "over after a preemption",
        )
    return Response(content, media_type="application/octet-stream")


@router.delete("/thoughts/{id}")
async def delete_thoughts(id: str, request: Request) -> dict[str, str]:
    """Forget a finished request; one that runs gets 409."""
    state, deadline = service(request), time.monotonic() + SETTLE_S
    outcome = await state.engines.find("pte_thoughts_forget", id)
    while outcome == "running" and time.monotonic() < deadline:
        await asyncio.sleep(SETTLE_S / 10)
        outcome = await state.engines.find("pte_thoughts_forget", id)
    if known(id, outcome) == "running":
        raise HTTPException(409, f"request {id} is running; abort it first")
    EARLIER.forget(id)  # of n choices, all
    state.written.forget(id)
    return {"deleted": id}


@router.get("/thoughts/{id}/events")
async def thought_events(id: str, request: Request) -> Response:
    """Send an event for each fold, those so far included, and `end` when the request finishes."""
    state = service(request)
    first = known(id, await state.engines.find("pte_fold_events", id, 0))
    if state.listeners.count >= MAX_LISTENERS:
        return too_many(f"{MAX_LISTENERS} clients follow thoughts already")
    state.listeners.count += 1
    return _Followed(_events(state, first), state)


class _Followed(EventSourceResponse):
    """An answer that counts as a listener until its client has left or the request has ended."""

    def __init__(self, events: AsyncIterator[bytes], state: Service) -> None:
        super().__init__(events)
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._state.listeners.count -= 1


async def _events(state: Service, report: dict[str, Any]) -> AsyncIterator[bytes]:
    request_id, folds, spoken = report["request_id"], 0, time.monotonic()
    while True:
        if report["folds"] < folds:  # preempted: it starts over from S_0
            folds, spoken = 0, time.monotonic()
            yield _event("restart", {"num_tokens": report["num_tokens"]})
        for event in report["events"]:
            folds, spoken = event["fold"], time.monotonic()
            yield _event("fold", event)
        if report["finished"]:
            break
        if time.monotonic() - spoken > KEEP_ALIVE_S:
            spoken = time.monotonic()
            yield format_sse_event(comment="running")
        await asyncio.sleep(POLL_S)
        found = await state.engines.find("pte_fold_events", request_id, folds)
        if found is None:  # finished, and forgotten since
            break
        report = found
    yield _event("end", {name: report[name] for name in ("num_tokens", "folds", "folded_tokens")})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data, separators=(",", ":")))


def known(name: str, found: Any) -> Any:
    """Return what was found of a request.

    Raises:
        HTTPException: 404 if it is None.
    """
    if found is None:
        raise HTTPException(
            404,
            f"no thoughts of a request {name}: it is unknown, waits to be scheduled, or finished "
            "so long ago that it was dropped (--pte-keep-thoughts)",
        )
    return found
