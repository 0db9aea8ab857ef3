"""The body of a push, a multipart form or a tar, is read here, and its adapter checked.

Nothing here touches the spool: names that a body carries are compared with the four that an
adapter may have, and never used as paths.
"""

from __future__ import annotations

import asyncio
import errno
import tarfile
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.hashes import CONFIG_FILE, FILES, LORA_FILE
from pte_vllm.method.options import PTEConfig

MAX_ADAPTER_BYTES = 1 << 30
"""The largest body of a push."""
TAR_TYPES = ("application/x-tar", "application/tar")
_IN_MEMORY_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        **{name: {"type": "string", "format": "binary"} for name in FILES},
                        "sha256": {"type": "string"},
                        "version": {"type": "integer", "minimum": 1},
                    },
                    "required": [CONFIG_FILE, LORA_FILE, "sha256"],
                }
            },
            TAR_TYPES[0]: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
"""What the OpenAPI description says; the body is read by hand, so that its size is bounded."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a push sent, not yet looked into."""

    files: dict[str, IO[bytes]]
    """Its files by name; the names are among `FILES`."""
    sha256: str
    """The hash that the sender says its files have."""
    number: int | None
    """The version; None asks for the next."""


async def read_upload(request: Request) -> Upload:
    """Read the body, at most `MAX_ADAPTER_BYTES` of it.

    Raises:
        ValueError: naming the part that is wrong.
        HTTPException: 413 if it is too large, 507 if there is no room for it.
    """
    try:
        return await _read_upload(request)
    except OSError as error:
        raise not_stored(f"TMPDIR, {tempfile.gettempdir()},", error) from error


def not_stored(where: str, error: OSError) -> HTTPException:
    """Make the answer to a failed write: 507 where there is no room, 500 otherwise.

    Args:
        where: the option or variable that says where it was written.
        error: the failure.
    """
    status = 507 if error.errno in _NO_ROOM else 500
    return HTTPException(status, f"{where} cannot be written: {error.strerror}")


async def _read_upload(request: Request) -> Upload:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_ADAPTER_BYTES:
        raise _too_large()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        files, fields = await _read_form(request)
    elif kind in TAR_TYPES:
        files, fields = await _read_tar(request), dict(request.query_params)
        if unknown := set(fields) - {"sha256", "version"}:
            raise ValueError(f"unknown query parameter {min(unknown)!r}")
    else:
        raise ValueError(f"the body must be multipart/form-data or {TAR_TYPES[0]}, got {kind!r}")
    for part in (CONFIG_FILE, LORA_FILE):
        if part not in files:
            raise ValueError(f"file {part} is missing")
    if "sha256" not in fields:
        raise ValueError("field sha256 is missing")
    number = fields.get("version")
    if number is not None and not (number.isdecimal() and 0 < int(number) < 2**31):
        raise ValueError(f"version must be a positive integer, got {number!r}")
    return Upload(
        files=files,
        sha256=fields["sha256"],
        number=int(number) if number is not None else None,
    )


def check_servable(
    path: Path, shape: ModelShape, max_lora_rank: int, dtype: torch.dtype
) -> PTEConfig | None:
    """Read and check an adapter, every tensor of it.

    Args:
        path: its directory.
        shape: the sizes of the base model.
        max_lora_rank: the largest rank that the engine has room for.
        dtype: the engine's precision of LoRAs.

    Returns:
        What its config says of the method; None of a plain LoRA.

    Raises:
        AdapterError: if it is broken, or not for this model or engine. The message names no
            directory.
    """
    try:
        adapter = Adapter.load(path, shape)
        rank = max(a.shape[0] for a in adapter.lora_a.values())
        if adapter.pte is not None:
            rank = max(rank, adapter.pte.rank)
        if rank > max_lora_rank:
            raise AdapterError(f"rank {rank} exceeds this server's --max-lora-rank {max_lora_rank}")
        adapter.check_numbers(path, dtype)
    except AdapterError as error:
        raise AdapterError(str(error).replace(f"{path}/", "")) from error
    return adapter.pte


async def _read_form(request: Request) -> tuple[dict[str, IO[bytes]], dict[str, str]]:
    parser = MultiPartParser(request.headers, _bounded(request), max_files=len(FILES), max_fields=2)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        raise ValueError(f"the body is not well-formed: {error}") from error
    files: dict[str, IO[bytes]] = {}
    fields: dict[str, str] = {}
    for part, value in form.multi_items():
        if part in files or part in fields:
            raise ValueError(f"part {part} came twice")
        if isinstance(value, UploadFile) and part in FILES:
            files[part] = value.file
        elif isinstance(value, str) and part in ("sha256", "version"):
            fields[part] = value
        else:
            raise _unexpected(part)
    return files, fields


async def _read_tar(request: Request) -> dict[str, IO[bytes]]:
    body = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 (outlives this call)
    async for chunk in _bounded(request):
        await asyncio.to_thread(body.write, chunk)
    body.seek(0)
    return await asyncio.to_thread(_tar_members, body)


def _tar_members(body: IO[bytes]) -> dict[str, IO[bytes]]:
    files: dict[str, IO[bytes]] = {}
    try:
        archive = tarfile.open(fileobj=body, mode="r:")  # noqa: SIM115 (uncompressed: size bounds it)
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isdir() and name in ("", "."):
                continue
            if not member.isreg() or name not in FILES:
                raise _unexpected(member.name)
            if name in files:
                raise ValueError(f"part {name} came twice")
            found = archive.extractfile(member)
            assert found is not None  # a regular file
            files[name] = found
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the body is no uncompressed tar archive: {error}") from error
    return files


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body, and raise 413 once it is above the largest size."""
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_ADAPTER_BYTES:
            raise _too_large()
        yield chunk


def _unexpected(part: str) -> ValueError:
    return ValueError(
        f"unexpected part {part!r}; files are {', '.join(FILES)}, fields sha256 and version"
    )


def _too_large() -> HTTPException:
    return HTTPException(413, f"the body exceeds {MAX_ADAPTER_BYTES} bytes")
