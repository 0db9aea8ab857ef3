"""Kept tokens at the ends of lengths: tiny prompts, long ones, windows never full, no output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine.kept import assert_selected, own_record
from tests.harness.engine import BLOCK, Engine, Job
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, assert_parity, replayed

WINDOW = 3 * BLOCK
CHUNK = 256
"""The most tokens of a step, so that a long prompt takes many."""


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        probes=probes,
        num_blocks=600,
        max_model_len=9000,
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
    )
    yield engine
    engine.check_idle()
    engine.close()


def _job(prompt: list[int], length: int, keep: int, **options: object) -> Job:
    return Job(prompt, length, None, {"pte_keep": keep, **options}, seed=3)


@pytest.mark.parametrize("prompt_tokens", [40, 300])
def test_within_the_window_nothing_changes(engine: Engine, prompt_tokens: int) -> None:
    """Where nothing was evicted, the same bytes come as without, and under full attention."""
    prompt = random_tokens(prompt_tokens, 500, 1)
    plans: list[tuple[int, bool]] = []

    def on_step(step: int, request_ids: list[str]) -> None:
        sequences = engine.runner.pte_pool.sequences.values()
        plans[:] = [(s.plan.keep_blocks, s.plan.bounded) for s in sequences] or plans

    found = []
    for keep, window, plan in (
        (8 * BLOCK, 2048, (8, True)),
        (0, 2048, (0, True)),
        (0, 0, (0, False)),
        (BLOCK, WINDOW, (1, True)),
    ):
        job = _job(prompt, 200, keep, pte_window=window)
        engine.scheduler.reset_prefix_cache()  # each computes the whole prompt, in equal chunks
        engine.run([job], on_step)
        assert plans == [plan] and bool(job.kept) == (window == WINDOW)
        found.append((job.tokens, job.logprobs))
    kept, windowed, full, evicted = found
    assert kept == windowed == full
    assert evicted != full  # so that a window that is too small would be seen


@pytest.mark.parametrize("prompt_tokens", [1, 2, BLOCK])
def test_short_prompts(engine: Engine, model: Path, prompt_tokens: int, probes: Path) -> None:
    prompt = random_tokens(prompt_tokens, 500, 2)
    jobs = [_job(prompt, 10 * BLOCK + 5 - prompt_tokens, keep) for keep in (BLOCK, 2 * BLOCK)]
    engine.run(jobs)
    assert assert_selected(jobs, WINDOW) == 6 + 5
    assert_parity(model, jobs, WINDOW, min_folds=7)
    assert jobs[0].logprobs != jobs[1].logprobs
    for job in jobs:
        assert job.kept == own_record(model, job, WINDOW)


@pytest.mark.parametrize(
    ("pin_tokens", "window", "keep", "new_tokens", "choices"),
    [(100, 32 * BLOCK, 8 * BLOCK, 3, 27), (8192, WINDOW, BLOCK, WINDOW + 3 * BLOCK + 5, 3)],
    ids=["thoughts", "question"],
)
def test_a_long_prompt_in_chunks(
    engine: Engine,
    model: Path,
    pin_tokens: int,
    window: int,
    keep: int,
    new_tokens: int,
    choices: int,
) -> None:
    """Its folds, or those after it, choose what the replay chooses, and the record tells it."""
    prompt = random_tokens(8192, 500, pin_tokens)
    job = _job(prompt, new_tokens, keep, pte_window=window, pte_pin_tokens=pin_tokens)
    job.prompt_logprobs = True
    steps = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal steps
        steps = step

    engine.run([job], on_step)
    assert steps + 1 >= 8192 // CHUNK + new_tokens - 1
    assert assert_selected([job], WINDOW) == choices
    assert_parity(model, [job], WINDOW)
    expected = replayed(
        *(model, None, prompt, job.plan(WINDOW)), probes=job.probes, record=job.kept
    )
    pairs = zip(job.prompt_scores, expected.tolist(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= TOLERANCE


def test_one_token_and_none(engine: Engine, model: Path) -> None:
    """The thoughts of the prompt fold all the same; vLLM takes no request for no token."""
    prompt = random_tokens(600, 500, 5)
    one = _job(prompt, 1, BLOCK, pte_pin_tokens=40)
    engine.run([one])
    assert_selected([one], WINDOW)
    assert_parity(model, [one], WINDOW, min_folds=13)
    assert one.kept == own_record(model, one, WINDOW)
    with pytest.raises(VLLMValidationError, match="max_tokens must be at least 1"):
        engine.run([_job(prompt, 0, BLOCK, pte_pin_tokens=40)])
    none = _job(random_tokens(600, 500, 6), 1, BLOCK, pte_pin_tokens=40)
    engine.run(
        [none],
        lambda step, names: engine.engine.abort_request(names) if step == 7 else None,
    )
    assert not none.finished and not none.tokens
    assert 3 < len(none.kept) < 13 and any(none.kept)  # what it came to
    engine.check_idle()
