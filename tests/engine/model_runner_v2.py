"""Model Runner V2 with PTE, driven for real; `test_model_runner_v2.py` runs this file in a process
of its own, with Triton's interpreter (`tests/harness/triton_interpreter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

from pte_vllm.engine.attention import GapCuttingBuilder
from pte_vllm.engine.runner_v2 import PTECPUModelRunnerV2
from tests.engine.kept import assert_selected
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK
MAX_MODEL_LEN = 1024
RANDOM = {"pte_pin_tokens": 20, "pte_window": 4 * BLOCK, "pte_evict": "random"}


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(
        model,
        probes=probes,
        window_tokens=WINDOW,
        lora_rank=8,
        async_scheduling=True,
        num_blocks=60,
        max_num_seqs=8,
        max_num_batched_tokens=300,
        max_model_len=MAX_MODEL_LEN,
        max_prompt_tokens=128,
    )
    assert type(engine.runner) is PTECPUModelRunnerV2
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module")
def paper(model: Path, adapters: Callable[..., Path]) -> Any:
    return lora("paper", adapters(model, rank=8, rule="paper"), 1)


def test_parity(engine: Engine, model: Path, paper: Any, adapters: Callable[..., Path]) -> None:
    """Two rules, no adapter, full attention and folds in the prefill, preempted on the way.

    Then one of them is continued.
    """
    ridge = lora("ridge", adapters(model, rank=8, rule="ridge"), 2)
    jobs = [
        Job(random_tokens(20, 500, 1), 120, paper),
        Job(random_tokens(35, 500, 2), 127, ridge),
        Job(random_tokens(7, 500, 3), 90),
        Job(random_tokens(90, 500, 4), 20, paper, {"pte_window": 0}),
        Job(random_tokens(310, 500, 5), 20, ridge, {"pte_pin_tokens": 20}),
        Job(random_tokens(300, 500, 6), 20, ridge, RANDOM),
        Job(random_tokens(20, 500, 7), 150, None, {"pte_keep": BLOCK}),
        Job(random_tokens(33, 500, 8), 130, ridge, {"pte_keep": BLOCK}),
    ]
    preempted = []

    def on_step(step: int, request_ids: list[str]) -> None:
        running = engine.scheduler.running
        if step in (60, 100) and len(running) > 1:
            preempted.append(running[0].request_id)
            engine.preempt(0)
            engine.worker.pte_check_integrity()

    engine.run(jobs, on_step)
    assert len(preempted) == 2
    assert_parity(model, jobs[:2], WINDOW, min_folds=2)
    assert_parity(model, jobs[2:], WINDOW)
    assert assert_selected(jobs[-2:], WINDOW) == 2 + 1
    first, options = jobs[0], {"pte_pin_tokens": 20}
    later = Job([*first.prompt, *first.tokens, *random_tokens(9)], 20, paper, options)
    engine.run([later])
    assert later.cached_tokens == 4 * BLOCK  # past the first fold, at 3 blocks
    assert_parity(model, [later], WINDOW, min_folds=3)


def test_warm_up_leaves_nothing(engine: Engine) -> None:
    """vLLM warms up with requests of its own, whose prompts may exceed our limits."""
    runner, worker = engine.runner, engine.worker
    finished, folds = len(runner.pte_pool.finished), dict(runner.pte_pool.counters.folds)
    with runner.pte_warm_up():
        assert run_mixed_prefill_decode_warmup(
            runner, worker.execute_model, worker.sample_tokens, num_tokens=200
        )
    assert len(runner.pte_pool.finished) == finished
    assert dict(runner.pte_pool.counters.folds) == folds
    worker.pte_check_integrity()
    assert not runner.pte_pool.sequences


def test_metadata_stays_in_place(
    engine: Engine, model: Path, paper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs hold on to addresses: what is captured is what every later step writes to."""
    monkeypatch.setattr(GapCuttingBuilder, "_graphs", True)
    runner = engine.runner

    def places(metadata: dict[str, Any]) -> set[tuple[int, int]]:
        return {(m.block_table.data_ptr(), m.seq_lens.data_ptr()) for m in metadata.values()}

    captured = prepare_inputs_to_capture(
        4,
        4,
        runner.model_state,
        runner.input_buffers,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        full_cudagraph=True,
    ).attn_metadata
    assert len(places(captured)) == 1
    # Read when a graph is captured, then baked in: it has to cover every replay.
    assert {m.max_seq_len for m in captured.values()} == {MAX_MODEL_LEN}

    steps: list[tuple[set[tuple[int, int]], int]] = []
    original = runner.model_state.prepare_attn

    def spy(*args: Any, **kwargs: Any) -> dict[str, Any]:  # records what the real method returned
        metadata = original(*args, **kwargs)
        steps.append((places(metadata), max(m.max_seq_len for m in metadata.values())))
        return metadata

    monkeypatch.setattr(runner.model_state, "prepare_attn", spy)
    job = Job(random_tokens(20, 500, 8), 90, paper)
    engine.run([job])
    assert {place for found, _ in steps for place in found} == places(captured)
    # Attention spans the pinned block and the window of two, never more.
    assert max(longest for _, longest in steps) == 3 * BLOCK
    assert_parity(model, [job], WINDOW, min_folds=1)


def test_rows_of_a_padded_batch(engine: Engine) -> None:
    """A graph has more rows than the step; those hold no sequence and must have no gap."""
    runner = engine.runner
    runner.pte_gaps.publish([((1, 2),), ((1, 3),)])
    try:
        assert runner.pte_gaps.length.tolist() == [2, 3] + [0] * 6
        assert runner.pte_gaps.any
    finally:
        runner._publish_nobody()
    assert not runner.pte_gaps.any and not torch.count_nonzero(runner.pte_gaps.length)
