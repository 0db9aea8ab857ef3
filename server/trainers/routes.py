"""RL trainers call adapter loads, pauses and weight updates under names of their own.

docs/trainers/ tells which. A load under a name that is there becomes the name's next version;
vLLM's own route, for those who number their names, stays beside it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from vllm import envs
from vllm.entrypoints.rl.online import api_router as rl
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE
from pte_vllm.server.access.table import BASE_WEIGHT_ROUTES, SLEEP_ROUTES
from pte_vllm.server.adapters.spool import SpoolError
from pte_vllm.server.adapters.upload import not_stored
from pte_vllm.server.service import service

PUSH_INSTEAD = (
    "Train an adapter, and push its files with PUT /pte/v1/adapters/{name}. Or have the server "
    "read them from a directory, with POST /v1/load_lora_adapter or POST /load_lora_adapter "
    "(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)"
)
"""What to do where the base weights were to change."""


class LoadRequest(BaseModel):
    """The body that prime-rl and SkyRL send."""

    lora_name: str
    lora_path: str | None = None
    """A directory that the server can read."""
    in_memory: bool = False
    """SkyRL says so where the tensors came over NCCL before; that is not supported."""


async def load_lora_adapter(body: LoadRequest, request: Request) -> JSONResponse:
    """Copy a directory into the spool as the next version of `lora_name`, and serve it.

    The same files again are the same version. What runs keeps its version; there is no need to
    pause, nor to reset a cache: every version has prefix blocks of its own.
    """
    if body.in_memory or body.lora_path is None:
        raise HTTPException(
            400,
            "lora_path is missing, and in_memory is not supported: send the adapter's files with "
            "PUT /pte/v1/adapters/{name}",
        )
    path = Path(body.lora_path)
    try:
        missing = await asyncio.to_thread(_missing, path)
        if missing is not None:  # a shared file system may lag: trainers try again on 404
            raise HTTPException(404, f"lora_path has no {missing}")
        version = await service(request).registry.push_directory(body.lora_name, path)
    except SpoolError as error:
        raise not_stored("--pte-spool", error) from error
    except OSError as error:
        raise HTTPException(400, f"lora_path cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    except EngineDeadError as error:
        raise HTTPException(503, "the engine has died; the server is about to end") from error
    return JSONResponse({"status": "ok", "name": version.name, "version": version.number})


def _missing(path: Path) -> str | None:
    """Return the first file that every adapter has and this directory has not."""
    return next((name for name in (CONFIG_FILE, LORA_FILE) if not (path / name).is_file()), None)


async def pause_and_abort(request: Request) -> JSONResponse:
    """Pause as AReaL does: what runs ends with `abort`, to be sent again as a longer prompt."""
    return await rl.pause_generation(request, mode="abort", clear_cache=True)


async def refuse_base_weights(request: Request) -> Response:
    """Answer 400 and say why: the base model of a server does not change."""
    raise HTTPException(
        400, f"{request.url.path}: the base model of this server does not change. {PUSH_INSTEAD}"
    )


async def refuse_sleep(request: Request) -> Response:
    """Answer 400 and say why: weights, KV cache and thoughts stay where they are."""
    raise HTTPException(
        400,
        f"{request.url.path}: this server does not sleep, as thoughts would be lost with their KV "
        "cache. To stop generation, use POST /pause and POST /resume. To free the memory, end the "
        "server: it serves pushed adapters again when it starts",
    )


async def refuse_rpc(request: Request) -> Response:
    """Answer 400 and say why: a call of any method of the workers is for development."""
    raise HTTPException(
        400,
        f"{request.url.path} calls any method of the workers, and needs VLLM_SERVER_DEV_MODE=1. "
        f"It is not needed for adapters. {PUSH_INSTEAD}",
    )


def attach(app: FastAPI) -> None:
    """Register the routes. Loads by path are there only where vLLM's own would be."""
    router = APIRouter(tags=["trainers"])
    router.post("/areal_pause_generation")(pause_and_abort)
    router.post("/areal_continue_generation")(rl.resume_generation)
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        json_only: dict[str, Any] = {"dependencies": [Depends(validate_json_request)]}
        router.post("/load_lora_adapter", **json_only)(load_lora_adapter)
        router.post("/skyrl/v1/load_lora_adapter", **json_only)(load_lora_adapter)
    for path in BASE_WEIGHT_ROUTES:
        router.post(path)(refuse_base_weights)
    if not envs.VLLM_SERVER_DEV_MODE:
        for path in SLEEP_ROUTES:
            router.post(path)(refuse_sleep)
        router.post("/collective_rpc")(refuse_rpc)
    app.include_router(router)
