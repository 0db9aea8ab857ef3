"""`/pte/v1/adapters`: push, list and remove adapter versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.adapter import CONFIG_FILE, FILES, LORA_FILE
from pte_vllm.server.adapters import AdapterRegistry, ConflictError
from pte_vllm.server.auth import may_change
from pte_vllm.server.spool import Incoming, check_name
from pte_vllm.server.state import service

MAX_ADAPTER_BYTES = 1 << 30
"""Largest body of a push."""

router = APIRouter()


@router.get("/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """Pushed adapters and their versions."""
    registry = service(request).registry
    return {"adapters": [registry.summary(name) for name in registry.names()]}


@router.get("/adapters/{name}")
async def get_adapter(name: str, request: Request) -> dict[str, Any]:
    """One adapter, by `name` or `name@version`."""
    try:
        return service(request).registry.summary(name)
    except LookupError as error:
        raise HTTPException(404, str(error)) from error


@router.delete("/adapters/{name}", dependencies=[Depends(may_change)])
async def delete_adapter(name: str, request: Request) -> dict[str, Any]:
    """Stop serving `name` or `name@version`; what runs finishes."""
    try:
        gone = await service(request).registry.delete(name)
    except LookupError as error:
        raise HTTPException(404, str(error)) from error
    return {"deleted": [version.engine_name for version in gone]}


@router.put("/adapters/{name}", dependencies=[Depends(may_change)])
async def put_adapter(name: str, request: Request) -> JSONResponse:
    """Push a version: 201 if it is new, 200 if the same files are there under the same number."""
    state = service(request)
    try:
        check_name(name)
        files, sha256, number = await _read_form(request)
        incoming = await asyncio.to_thread(state.spool.incoming)
        try:
            return await _push(state.registry, name, incoming, files, sha256, number)
        finally:
            await asyncio.to_thread(incoming.discard)
    except ConflictError as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    except EngineDeadError as error:
        raise HTTPException(503, "the engine has died; the server is about to end") from error
    except OSError as error:
        raise HTTPException(500, f"--pte-spool cannot be written: {error.strerror}") from error


async def _push(
    registry: AdapterRegistry,
    name: str,
    incoming: Incoming,
    files: dict[str, UploadFile],
    sha256: str,
    number: int | None,
) -> JSONResponse:
    for part, upload in files.items():
        await asyncio.to_thread(incoming.write, part, upload.file)
    version, created = await registry.push(name, incoming, sha256=sha256, number=number)
    body = {
        "name": version.name,
        "version": version.number,
        "engine_name": version.engine_name,
        "sha256": version.sha256,
        "bytes": version.num_bytes,
        "created": created,
    }
    return JSONResponse(body, status_code=201 if created else 200)


async def _read_form(request: Request) -> tuple[dict[str, UploadFile], str, int | None]:
    """Files by name, `sha256` and `version`; ValueError naming the part that is wrong."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ValueError("the body must be multipart/form-data")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_ADAPTER_BYTES:
        raise _too_large()
    parser = MultiPartParser(request.headers, _bounded(request), max_files=len(FILES), max_fields=2)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ValueError(f"the body is not well-formed: {error.message}") from error
    files: dict[str, UploadFile] = {}
    fields: dict[str, str] = {}
    for part, value in form.multi_items():
        if part in files or part in fields:
            raise ValueError(f"part {part} came twice")
        if isinstance(value, UploadFile) and part in FILES:
            files[part] = value
        elif isinstance(value, str) and part in ("sha256", "version"):
            fields[part] = value
        else:
            raise ValueError(
                f"unexpected part {part!r}; files are {', '.join(FILES)}, fields sha256 and version"
            )
    for part in (CONFIG_FILE, LORA_FILE):
        if part not in files:
            raise ValueError(f"file {part} is missing")
    if "sha256" not in fields:
        raise ValueError("field sha256 is missing")
    number = fields.get("version")
    if number is not None and not (number.isdecimal() and 0 < int(number) < 2**31):
        raise ValueError(f"version must be a positive integer, got {number!r}")
    return files, fields["sha256"], int(number) if number is not None else None


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    """The body, up to the largest size."""
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_ADAPTER_BYTES:
            raise _too_large()
        yield chunk


def _too_large() -> HTTPException:
    return HTTPException(413, f"the body exceeds {MAX_ADAPTER_BYTES} bytes")
