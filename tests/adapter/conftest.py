"""A hub, and an adapter to push there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pte_vllm.adapter.hashes import LORA_FILE
from tests.harness.hub import Hub
from tests.harness.hub_repos import READ_TOKEN, WRITE_TOKEN


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody-logged-in"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("WRITER", WRITE_TOKEN)
    monkeypatch.setenv("READER", READ_TOKEN)
    monkeypatch.setenv("STRANGER", "hf_nobody_knows_it")
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def full_adapter(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], tmp_path: Path
) -> Path:
    """An adapter with all four files, and beside them what a training run leaves."""
    path = shutil.copytree(adapters(tiny("llama"), rule="ridge", own_probes=2), tmp_path / "run")
    (path / "optimizer.pt").write_bytes(b"o" * 1000)
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / LORA_FILE).write_bytes(b"c" * 1000)
    return path
