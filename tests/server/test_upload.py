"""The body of a push: whatever is wrong with it is said, and no name in it is used as a path."""

from __future__ import annotations

import asyncio
import io
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from fastapi import HTTPException, Request
from transformers import AutoConfig

from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.hashes import CONFIG_FILE, LORA_FILE, PROBES_FILE
from pte_vllm.server.adapters import upload
from pte_vllm.server.adapters.upload import Upload, check_servable, read_upload
from tests.harness.models import make_probes

GOOD = {CONFIG_FILE: b"{}", LORA_FILE: b"tensors"}


def _tar(files: Mapping[str, bytes], **member: object) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in member.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return body.getvalue()


def _read(body: bytes, kind: str = "application/x-tar", query: str = "sha256=00") -> Upload:
    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http",
        "method": "PUT",
        "headers": [(b"content-type", kind.encode())],
        "query_string": query.encode(),
        "path": "/",
    }
    return asyncio.run(read_upload(Request(scope, receive)))


def test_a_tar_is_read_whole() -> None:
    sent = {**GOOD, PROBES_FILE: b"queries"}
    upload = _read(
        _tar({f"./{name}": data for name, data in sent.items()}), query="sha256=ab&version=7"
    )
    assert {name: file.read() for name, file in upload.files.items()} == sent
    assert (upload.sha256, upload.number) == ("ab", 7)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", f"a/{LORA_FILE}", "adapter_model.bin"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unexpected part"):
        _read(_tar({**GOOD, name: b"x"}))


def test_links_are_refused() -> None:
    with pytest.raises(ValueError, match="unexpected part"):
        _read(_tar({CONFIG_FILE: b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"))


@pytest.mark.parametrize(
    ("body", "kind", "query", "message"),
    [
        (b"no archive" * 99, "application/x-tar", "sha256=00", "no uncompressed tar"),
        (_tar(GOOD)[:700], "application/x-tar", "sha256=00", "tar archive|is missing"),
        (_tar({CONFIG_FILE: b"{}"}), "application/x-tar", "sha256=00", f"{LORA_FILE} is missing"),
        (_tar(GOOD), "application/x-tar", "", "sha256 is missing"),
        (_tar(GOOD), "application/x-tar", "sha256=00&version=-1", "positive integer"),
        (_tar(GOOD), "application/x-tar", "sha256=00&path=/tmp", "unknown query parameter"),
        (_tar(GOOD), "application/zip", "sha256=00", "must be multipart/form-data or"),
        (b"x", "multipart/form-data", "", "not well-formed"),
        (b"x", "multipart/form-data; boundary=y", "", "not well-formed|is missing"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, kind: str, query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _read(body, kind, query)


def test_large_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_ADAPTER_BYTES", 1000)
    with pytest.raises(HTTPException) as refusal:
        _read(_tar(GOOD))
    assert refusal.value.status_code == 413


@pytest.mark.parametrize("plain", [False, True])
def test_probes_that_do_not_fit_are_refused(
    plain: bool, tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a plain LoRA too, and the message names no directory."""
    model = tiny("qwen3")
    shape = ModelShape.from_hf(AutoConfig.from_pretrained(model))
    source = adapters(model, own_probes=9, **({"plain": True} if plain else {}))
    directory = Path(shutil.copytree(source, tmp_path / "a"))
    pte = check_servable(directory, shape, 8, torch.float32)
    assert (pte is None) == plain
    make_probes(layers=2).save(directory / PROBES_FILE)
    with pytest.raises(AdapterError, match=f"^{PROBES_FILE}: these probes are for 2 layers of 2"):
        check_servable(directory, shape, 8, torch.float32)
