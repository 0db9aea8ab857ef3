"""Kept tokens in the engine: places, blocks, and what happens to both when others interfere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.probes import Probes
from tests.harness.engine import BLOCK, Engine, Job
from tests.harness.models import random_tokens

WINDOW = 3 * BLOCK
"""Of which one block leaves at a fold."""


@pytest.fixture(scope="module")
def probes(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random queries: what they attend to matters here to nobody, only that it is always so."""
    file = tmp_path_factory.mktemp("probes") / "probes.safetensors"
    queries = 3 * torch.randn(3, 2, 24, 32, generator=torch.Generator().manual_seed(5))
    Probes.of(queries, "none").save(file)
    return file


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], probes: Path) -> Iterator[Engine]:
    engine = Engine(tiny("llama"), window_tokens=WINDOW, probes=probes)
    yield engine
    engine.check_idle()
    engine.close()


def _job(seed: int, keep: int, length: int = 9 * BLOCK, **options: object) -> Job:
    return Job(
        random_tokens(40 + seed, 500, seed), length, None, {"pte_keep": keep, **options}, seed=seed
    )


def test_who_keeps_all_sees_all(engine: Engine) -> None:
    """No fold selects, and attention reads what it would without a window."""
    kept, full = _job(1, 12 * BLOCK), _job(1, 0, pte_window=0)
    engine.run([kept])
    engine.run([full])
    assert kept.tokens == full.tokens
    assert kept.logprobs == pytest.approx(full.logprobs, abs=2e-4)


@pytest.mark.parametrize("keep", [BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("score", ["expected", "random"])
def test_selections(engine: Engine, keep: int, score: str) -> None:
    survivals: list[torch.Tensor | None] = []

    def on_step(step: int, request_ids: list[str]) -> None:
        engine.scheduler.pte_check_integrity()
        for sequence in engine.runner.pte_pool.sequences.values():
            survivals[:] = sequence.survivals

    job, none = _job(2, keep, pte_keep_score=score), _job(2, 0)
    engine.run([job], on_step)
    engine.run([none])
    assert job.logprobs != none.logprobs
    whole = keep // BLOCK
    assert survivals[:whole] == [None] * whole
    assert len(survivals) == 9 + 1 - 3 + 1
    for marks in survivals[whole:]:
        assert marks is not None and marks.shape == (3, 2, keep + BLOCK)
        assert (marks.sum(-1) == keep).all()
    # Heads choose differently.
    assert not torch.equal(survivals[-1][0, 0], survivals[-1][1, 1])
