"""What tests of kept tokens share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.probes import Probes
from tests.harness.engine import Job


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random queries for a tiny model; what is kept matters to nobody, only that it stays so."""
    file = tmp_path_factory.mktemp("probes") / "probes.safetensors"
    queries = 3 * torch.randn(3, 2, 24, 32, generator=torch.Generator().manual_seed(5))
    Probes.of(queries, "none").save(file)
    return file


def same(found: Job, wanted: Job) -> None:
    assert found.tokens == wanted.tokens
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)
