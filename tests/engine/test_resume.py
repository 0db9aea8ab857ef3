"""A request takes up an earlier one: with its blocks or by replay, the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 4 * BLOCK
PIN = 50
FIRST_FOLD = 6 * BLOCK
"""Two pinned blocks and four of the window."""


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


def _case(is_async: bool, rule: str, **how: object):
    return pytest.param((is_async, rule), id=f"{'async' if is_async else 'sync'}-{rule}", **how)


@pytest.fixture(
    scope="module",
    params=[
        _case(False, "paper"),
        _case(True, "delta"),
        _case(False, "delta", marks=pytest.mark.slow),
        _case(True, "ridge", marks=pytest.mark.slow),
        _case(True, "paper", marks=pytest.mark.slow),
    ],
)
def case(request: pytest.FixtureRequest) -> tuple[bool, str]:
    """Whether scheduling is asynchronous, and the rule of the adapter."""
    return request.param


@pytest.fixture(scope="module")
def engine(model: Path, case: tuple[bool, str]) -> Iterator[Engine]:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        num_blocks=60,
        keep_thoughts=8,
        max_prompt_tokens=256,
        async_scheduling=case[0],
    )
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module")
def adapter(model: Path, adapters: Callable[..., Path], case: tuple[bool, str]) -> object:
    return lora(case[1], adapters(model, rank=8, rule=case[1]), 1)


def _first(adapter: object, seed: int, length: int = 230, **options: object) -> Job:
    return Job(random_tokens(PIN, 500, seed), length, adapter, options, seed=seed)


def _resumed(job: Job, more: list[int], **changes: object) -> Job:
    options = {**job.options, "pte_pin_tokens": PIN, **changes}
    return Job([*job.prompt, *job.tokens, *more], 70, job.adapter, options, seed=4)


def _flush(engine: Engine) -> None:
    """Use every block of the pool for something else."""
    engine.run([Job(random_tokens(200, 500, 100 + i), 1) for i in range(12)])


def test_resume_with_and_without_its_blocks(engine: Engine, model: Path, adapter: object) -> None:
    first = _first(adapter, 1)
    engine.run([first])
    # 280 tokens, the last not computed: eight full blocks, of which three in the gap.
    hit = _resumed(first, random_tokens(7, 500, 2))
    engine.run([hit])
    assert hit.cached_tokens == 8 * BLOCK
    engine.check_idle()
    _flush(engine)
    replayed = _resumed(first, random_tokens(7, 500, 2))
    engine.run([replayed])
    assert replayed.cached_tokens < FIRST_FOLD
    assert replayed.tokens == hit.tokens
    assert_parity(model, [hit, replayed], WINDOW, min_folds=5)
    engine.check_idle()


def test_fork_into_three_and_again(engine: Engine, model: Path, adapter: object) -> None:
    first, bare = _first(adapter, 2), _first(None, 9)
    engine.run([first, bare])
    forks = [_resumed(first, random_tokens(1 + 20 * i, 500, i)) for i in range(3)]
    # Without an adapter nothing remembers what left the window, but the window goes on.
    forks.append(_resumed(bare, []))
    engine.run(forks)
    assert [fork.cached_tokens for fork in forks] == [8 * BLOCK] * 4
    assert len({tuple(fork.tokens) for fork in forks}) == 4
    engine.check_idle()
    again = _resumed(forks[2], [])
    engine.run([again], lambda step, _: engine.preempt() if step == 40 else None)
    assert again.cached_tokens > 9 * BLOCK
    assert_parity(model, [*forks, again], WINDOW, min_folds=5)
    engine.check_idle()


def test_resume_cancelled_requests(engine: Engine, model: Path, adapter: object) -> None:
    """Cancelled around boundaries, where with async scheduling a fold may be under way."""
    steps = [FIRST_FOLD - PIN, 173, 174, 175, 176, 190]
    drawn = {"pte_evict": "random", "pte_evict_seed": 3}
    jobs = [_first(adapter, 30 + step, **(drawn if step % 2 else {})) for step in steps]

    def on_step(at: int, request_ids: list[str]) -> None:
        for step, job, request_id in zip(steps, jobs, request_ids, strict=True):
            if at == step:
                request = next(
                    r for i, r in engine.scheduler.requests.items() if i.startswith(request_id)
                )
                job.tokens = list(request.output_token_ids)
                engine.engine.abort_request([request_id])

    engine.run(jobs, on_step)
    seen = [list(job.tokens) for job in jobs]
    assert all(len(tokens) >= step - 2 for tokens, step in zip(seen, steps, strict=True))
    resumed = [_resumed(job, []) for job in jobs]
    engine.run(resumed)
    for tokens, job in zip(seen, resumed, strict=True):
        # All but the last block, and a fold under way at the end may have cost one more.
        assert job.cached_tokens >= (PIN + len(tokens) - 1) // BLOCK * BLOCK - BLOCK
    assert_parity(model, resumed, WINDOW, min_folds=3)
    engine.check_idle()


def test_another_plan_or_rule_is_another_sequence(
    engine: Engine, model: Path, adapter: object
) -> None:
    first = _first(adapter, 3)
    engine.run([first])
    others = [_resumed(first, [5], pte_window=2 * BLOCK), _resumed(first, [5], pte_pin_tokens=70)]
    others.append(_resumed(first, [5], pte_update="sum"))
    engine.run(others)
    assert all(other.cached_tokens <= FIRST_FOLD for other in others)
    assert_parity(model, others, WINDOW, min_folds=4)
    engine.check_idle()


def test_random_blocks(engine: Engine, model: Path, adapter: object) -> None:
    """A continuation draws the same blocks; another seed, or none, finds nothing past a fold."""
    drawn = {"pte_evict": "random", "pte_evict_seed": 3}
    first = _first(adapter, 4, **drawn)
    engine.run([first])
    later = random_tokens(7, 500, 2)
    hit = _resumed(first, later)
    engine.run([hit])
    assert hit.cached_tokens == 8 * BLOCK
    changes = {"pte_evict_seed": 4}, {"pte_evict": "oldest", "pte_evict_seed": None}
    others = [_resumed(first, later, **change) for change in changes]
    engine.run(others)
    assert all(other.cached_tokens <= FIRST_FOLD for other in others)
    others[1].options.pop("pte_evict_seed")
    _flush(engine)
    replayed = _resumed(first, later)
    engine.run([replayed])
    assert replayed.cached_tokens < FIRST_FOLD
    assert replayed.tokens == hit.tokens
    assert_parity(model, [first, hit, replayed, *others], WINDOW, min_folds=3)
    engine.check_idle()


def test_old_states_leave(engine: Engine, adapter: object) -> None:
    jobs = [_first(adapter, 200 + i, 150) for i in range(10)]
    engine.run(jobs)
    assert len(engine.scheduler.pte_snapshots) == 8
    assert engine.worker.pte_check_integrity()["snapshots"] == 8
    _flush(engine)  # states without their blocks are of no use, and do no harm
    late = _resumed(jobs[-1], [])
    engine.run([late])
    assert late.cached_tokens < FIRST_FOLD
    engine.scheduler.reset_prefix_cache()
    engine.run([Job([5], 2)])
    assert engine.worker.pte_check_integrity()["snapshots"] == 0
    engine.check_idle()
