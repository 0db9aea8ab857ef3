"""Kept tokens in the engine: places, blocks, and what happens to both when others interfere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pte_vllm.method.keep_marks import unpacked
from tests.engine.kept import same
from tests.harness.engine import BLOCK, Engine, Job
from tests.harness.models import random_tokens

WINDOW = 3 * BLOCK
"""Of which one block leaves at a fold."""


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
    plan = job.plan(WINDOW)
    assert len(survivals) == plan.folds(len(job.prompt) + len(job.tokens) - 2) > whole + 2
    for marks in job.kept[whole:]:
        assert marks is not None
        of_fold = unpacked(marks, 3, 2, keep + BLOCK)
        assert (of_fold.sum(-1) == keep).all()
        assert not torch.equal(of_fold[0, 0], of_fold[1, 1])  # heads choose differently


def test_what_was_kept_is_told_once(engine: Engine) -> None:
    """Also before the worker has heard that the request is over, as a client may ask so early."""
    job = _job(3, BLOCK)
    engine.run([job])
    for settled in (False, True):
        name, again = f"told-{settled}", _job(3, BLOCK)
        engine._add(name, again)
        while engine.engine.has_unfinished_requests():
            engine.engine.step()
        if settled:
            engine.settle()
        assert (name in str(list(engine.runner.pte_pool.sequences))) == (not settled)
        assert engine.worker.pte_kept([name]) == [job.kept] and any(job.kept)
        engine.settle()
        assert engine.worker.pte_kept([name]) == [None]


def test_what_was_kept_is_shown_as_often_as_one_looks(engine: Engine) -> None:
    """Also while it runs, from the start again after a preemption, and when it has ended."""
    job, name = _job(4, BLOCK), ""
    seen: list[tuple[bytes | None, ...]] = []

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal name
        (name,) = request_ids
        shown = engine.worker.pte_kept_folds(name, None)
        if shown is not None:
            assert shown["status"] == "running" and shown["folds"] == len(shown["record"])
            seen.append(shown["record"])
        if step == 220:
            engine.preempt()

    engine.run([job], on_step)
    folds = [len(record) for record in seen]
    assert sum(now < before for before, now in pairwise(folds)) == 1  # it was preempted once
    assert folds[-1] == len(job.kept) > 5
    assert all(record == job.kept[: len(record)] for record in seen)
    for count in (2, None, 2):
        shown = engine.worker.pte_kept_folds(name, count)
        assert (shown["status"], shown["folds"]) == ("finished", len(job.kept))
        assert shown["record"] == job.kept[:count]


def test_preempted_ones_keep_what_they_kept(engine: Engine) -> None:
    wanted, jobs = ([_job(seed, BLOCK) for seed in range(5, 9)] for _ in range(2))
    for job in wanted:
        engine.run([job])
    before: dict[str, list[torch.Tensor | None]] = {}
    preempted = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal preempted
        engine.scheduler.pte_check_integrity()
        for name, sequence in engine.runner.pte_pool.sequences.items():
            known = before.setdefault(name, [])
            for now, then in zip(sequence.survivals, known, strict=False):
                assert (now is None) == (then is None)
                assert now is None or torch.equal(now, then)
            known += sequence.survivals[len(known) :]
        if step % 41 == 40:
            preempted += 1
            engine.preempt(step % len(engine.scheduler.running))

    engine.run(jobs, on_step)
    assert preempted > 4 and all(len(known) > 5 for known in before.values())
    for job, alone in zip(jobs, wanted, strict=True):
        same(job, alone)


def test_aborted_before_it_has_caught_up(engine: Engine) -> None:
    """Its tokens were sampled from what it had kept before it was preempted: that is told."""
    whole, cut = _job(12, BLOCK), _job(12, BLOCK)
    engine.run([whole])

    def on_step(step: int, request_ids: list[str]) -> None:
        sequences = engine.runner.pte_pool.sequences
        folds = [len(sequence.survivals) for sequence in sequences.values()]
        if step == 7 * BLOCK:  # it has more tokens than a step of catching up has
            assert folds == [4]
            engine.preempt()
        elif step == 7 * BLOCK + 2:
            assert folds < [4]
            engine.engine.abort_request(request_ids)

    engine.run([cut], on_step)
    assert not cut.finished
    assert cut.kept == whole.kept[:4] and any(cut.kept)


@pytest.mark.parametrize("keep", [BLOCK, 2 * BLOCK])
def test_continued_and_forked(engine: Engine, keep: int) -> None:
    """A later request takes up what an ended one kept, and two may do so at once."""
    whole = _job(31, keep, 10 * BLOCK + 3)
    whole.temperature = 0.0
    engine.run([whole])
    first = _job(31, keep, 7 * BLOCK)
    first.temperature = 0.0
    engine.run([first])
    assert first.tokens == whole.tokens[: 7 * BLOCK]

    def go_on() -> Job:
        job = _job(31, keep, 3 * BLOCK + 3, pte_pin_tokens=len(first.prompt))
        job.prompt, job.temperature = first.prompt + first.tokens, 0.0
        return job

    pair = [go_on(), go_on()]
    engine.run(pair)
    again = go_on()  # what the pair left
    engine.run([again])
    plan = first.plan(WINDOW)
    for job in (*pair, again):
        assert job.cached_tokens > plan.first_fold + plan.stride
        assert job.tokens == whole.tokens[7 * BLOCK :]
        assert job.logprobs == pytest.approx(whole.logprobs[7 * BLOCK :], abs=2e-4)
