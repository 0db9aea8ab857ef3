"""vLLM's routes to pause, resume, abort and reset caches are there without its development mode.

The handlers are vLLM's. Where the operator switched its development mode on as well, these take
the place of its own, so that nothing is there twice and keys hold for them too.

A thought state S shares the fate of its KV blocks: what drops a running request's blocks (a pause
that clears the cache, a reset with `reset_running_requests`) goes through vLLM's preemption, and a
preempted request starts over from S_0 and replays its folds.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from vllm.entrypoints.rl.online import api_router as rl
from vllm.entrypoints.serve.dev.cache import api_router as cache
from vllm.entrypoints.serve.dev.server_info import api_router as server_info
from vllm.entrypoints.serve.dev.sleep import api_router as sleep

from pte_vllm.server.service import Service

Describe = Callable[[Request], Awaitable[dict[str, Any]]]


class ResetOptions(BaseModel):
    """The options of a reset as a JSON body; vLLM itself reads the query only."""

    model_config = ConfigDict(extra="forbid")

    reset_running_requests: bool = False
    """Whether to preempt what runs too; else the reset fails while blocks are held."""
    reset_external: bool = False


class AbortOptions(BaseModel):
    """The body of an abort."""

    model_config = ConfigDict(extra="forbid")  # a misspelled field would end everything

    request_ids: list[str] | None = None
    """The requests to end, by the ids that clients know; null or an empty list ends all."""


async def abort_requests(body: AbortOptions, raw_request: Request) -> JSONResponse:
    """Have vLLM end requests; their clients get what was sampled, with `abort` as the reason."""
    answer = await rl.abort_requests(raw_request)  # reads the body again
    found: Service | None = getattr(raw_request.app.state, "pte_service", None)
    if body.request_ids or found is None or answer.status_code != HTTPStatus.OK:
        return answer
    told = json.loads(answer.body)
    told["aborted"] += await found.others.abort_all()
    return JSONResponse(told)


async def reset_prefix_cache(
    raw_request: Request,
    reset_running_requests: Annotated[bool, Query()] = False,
    reset_external: Annotated[bool, Query()] = False,
    body: ResetOptions | None = None,
) -> JSONResponse:
    """Have vLLM reset its prefix cache; each option may be in the query or in the body."""
    found = body or ResetOptions()
    return await cache.reset_prefix_cache(
        raw_request,
        reset_running_requests or found.reset_running_requests,
        reset_external or found.reset_external,
    )


def attach(app: FastAPI, describe: Describe) -> None:
    """Register the routes.

    Args:
        app: vLLM's app.
        describe: what makes the answer of `GET /pte/v1/info`.
    """

    async def show_server_info(
        raw_request: Request,
        config_format: Annotated[Literal["text", "json"], Query()] = "text",
    ) -> JSONResponse:
        """Tell vLLM's configuration and environment, and below `pte` what `/pte/v1/info` says."""
        answer = await server_info.show_server_info(raw_request, config_format)
        return JSONResponse({**json.loads(answer.body), "pte": await describe(raw_request)})

    router = APIRouter(tags=["control"])
    router.post("/pause")(rl.pause_generation)
    router.post("/resume")(rl.resume_generation)
    router.post("/abort_requests")(abort_requests)
    router.post("/reset_prefix_cache")(reset_prefix_cache)
    router.get("/is_paused")(rl.is_paused)
    router.get("/weight_info")(rl.weight_info)
    router.get("/get_world_size")(rl.get_world_size)
    router.get("/server_info")(show_server_info)
    router.get("/is_sleeping")(sleep.is_sleeping)
    app.include_router(router)
