"""Routes below `/pte/v1/adapters` push, list and retire versions of adapters."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.server.adapters.catalog import ConflictError
from pte_vllm.server.adapters.registry import AdapterRegistry
from pte_vllm.server.adapters.spool import Incoming, SpoolError, check_name
from pte_vllm.server.adapters.upload import BODY_SCHEMA, Upload, not_stored, read_upload
from pte_vllm.server.service import service

router = APIRouter()


@router.get("/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """List pushed adapters and their versions."""
    registry = service(request).registry
    return {"adapters": [registry.summary(name) for name in registry.catalog.names()]}


@router.get("/adapters/{name}")
async def get_adapter(name: str, request: Request) -> dict[str, Any]:
    """Describe one adapter, by `name` or `name@version`."""
    try:
        return service(request).registry.summary(name)
    except LookupError as error:
        raise HTTPException(404, str(error)) from error


@router.delete("/adapters/{name}")
async def delete_adapter(name: str, request: Request) -> dict[str, Any]:
    """Stop serving `name` or `name@version`; what runs finishes."""
    try:
        retired = await service(request).registry.retire(name)
    except LookupError as error:
        raise HTTPException(404, str(error)) from error
    return {"deleted": [version.engine_name for version in retired]}


@router.put("/adapters/{name}", openapi_extra=BODY_SCHEMA)
async def put_adapter(name: str, request: Request) -> JSONResponse:
    """Push a version: 201 where it is new, 200 where the same files are there already."""
    state = service(request)
    try:
        check_name(name)
        upload = await read_upload(request)
        incoming = await asyncio.to_thread(state.spool.incoming)
        try:
            return await _push(state.registry, name, incoming, upload)
        finally:
            await asyncio.to_thread(incoming.delete)
    except ConflictError as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    except EngineDeadError as error:
        raise HTTPException(503, "the engine has died; the server is about to end") from error
    except SpoolError as error:
        raise not_stored("--pte-spool", error) from error


async def _push(
    registry: AdapterRegistry, name: str, incoming: Incoming, upload: Upload
) -> JSONResponse:
    for part, file in upload.files.items():
        await asyncio.to_thread(incoming.write, part, file)
    version, created = await registry.push(
        name, incoming, sha256=upload.sha256, number=upload.number
    )
    body = {
        "name": version.name,
        "version": version.number,
        "engine_name": version.engine_name,
        "sha256": version.sha256,
        "bytes": version.num_bytes,
        "created": created,
    }
    return JSONResponse(body, status_code=201 if created else 200)
