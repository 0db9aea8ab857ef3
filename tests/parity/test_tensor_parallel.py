"""Ranks that share out a model sample what the replay of one process computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.engine.kept import assert_selected
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity
from tests.harness.zygote import Zygote
from tests.parity.embedding import assert_embedding_adapter

WINDOW = 2 * BLOCK
LENGTH = WINDOW + 4 * BLOCK + 5
DRAWN = {"pte_keep_score": "random", "pte_evict_seed": 7}


# The tiny models have two KV heads: of four ranks two hold the same one.
@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def engine(
    request: pytest.FixtureRequest,
    tiny: Callable[[str], Path],
    probes: Path,
    zygote: Zygote | None,
) -> Iterator[Engine]:
    with zygote.spawning() if zygote is not None else nullcontext():
        made = Engine(
            tiny("llama"),
            window_tokens=WINDOW,
            lora_rank=8,
            probes=probes,
            max_num_seqs=16,
            ranks=request.param,
        )
    yield made
    made.close()


def test_mixed_batch(
    engine: Engine, tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    """Every kind of adapter and of plan at once, some preempted, some continued from a prefix."""
    model = tiny("llama")
    given = [
        lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1),
        lora("paper", adapters(model, rank=8, rule="paper", layers=[0, 2]), 2),
        lora("plain", adapters(model, plain=True), 3),
        None,
    ]
    options: tuple[dict[str, object], ...] = ({}, {"pte_keep": BLOCK}, {"pte_window": 0})
    jobs = [
        Job(random_tokens(9 + 21 * i, 500, i), LENGTH, adapter, dict(more), seed=i)
        for i, adapter in enumerate(given)
        for more in options
    ]
    jobs.append(Job(jobs[-1].prompt, LENGTH, None, {"pte_keep": 2 * BLOCK, **DRAWN}, seed=3))

    def on_step(step: int, request_ids: list[str]) -> None:
        if step in (120, 150):
            engine.preempt()

    engine.run(jobs, on_step)
    again = engine.run(
        [Job(job.prompt, LENGTH, job.adapter, job.options, seed=9) for job in jobs[::4]]
    )
    assert all(job.cached_tokens for job in again if len(job.prompt) > BLOCK)
    engine.check_idle()
    folding = [job for job in [*jobs, *again] if job.options.get("pte_window") != 0]
    worst = assert_parity(model, folding, WINDOW, min_folds=4)
    chosen = assert_selected([job for job in folding if job.keeps], WINDOW)
    print(f"{chosen} choices, max |Δ log p| {worst:.1e}")


def test_adapter_of_the_embedding(
    engine: Engine, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The vocabulary is shared out too."""
    assert_embedding_adapter(engine, tiny("llama"), tmp_path)
