"""Kept tokens of requests that are forked: by `n`, and by going on from one that has ended.

Here with a thought state, which is taken up beside the kept tokens; `test_keep.py` has it without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import CompletionOutput
from vllm.lora.request import LoRARequest

from pte_vllm.method.kept_record import record_to_json
from tests.engine.kept import assert_selected
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 3 * BLOCK
PIN = 50
FIRST_FOLD = 5 * BLOCK
LENGTH = FIRST_FOLD - PIN + 5 * BLOCK + 7
"""Six folds."""


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        probes=probes,
        num_blocks=80,
        max_prompt_tokens=256,
    )
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module")
def ridge(model: Path, adapters: Callable[..., Path]) -> LoRARequest:
    return lora("ridge", adapters(model, rank=8, rule="ridge"), 1)


def _options(keep: int) -> dict[str, object]:
    return {"pte_keep": keep, "pte_pin_tokens": PIN}


def _choice(engine: Engine, name: str, many: Job, completion: CompletionOutput) -> Job:
    """Return one choice of a request as if it had been a request of its own."""
    tokens = list(completion.token_ids)
    return replace(
        many,
        tokens=tokens,
        logprobs=[
            entry[token].logprob
            for token, entry in zip(tokens, completion.logprobs or (), strict=True)
        ],
        finished=True,
        kept=engine.runner.pte_pool.records.take(f"{completion.index}_{name}") or (),
        probes=engine.probes,
    )


def test_choices_of_one_prompt(engine: Engine, model: Path, ridge: LoRARequest) -> None:
    """They share the blocks of the question; each keeps, and is told, what is its own."""
    for adapter in (None, ridge):
        name = f"many-{adapter is None}"
        prompt = random_tokens(PIN, 500, 1)
        many = Job(prompt, LENGTH, adapter, _options(BLOCK), seed=1, n=3)
        engine._add(name, many)
        outputs = []
        while engine.engine.has_unfinished_requests():
            outputs += engine.engine.step()
        engine.settle()
        jobs = [_choice(engine, name, many, completion) for completion in outputs[-1].outputs]
        assert len({tuple(job.tokens) for job in jobs}) == len({job.kept for job in jobs}) == 3
        assert assert_selected(jobs, WINDOW) == 3 * 5
        assert_parity(model, jobs, WINDOW, min_folds=6)
        without = Job(prompt, LENGTH, adapter, {}, seed=1)
        engine.run([without])
        first = next(job for job in jobs if job.tokens[:BLOCK] == without.tokens[:BLOCK])
        assert first.tokens != without.tokens


def _resumed(first: Job, more: list[int], **options: object) -> Job:
    prompt = [*first.prompt, *first.tokens, *more]
    return Job(prompt, 70, first.adapter, {**first.options, **options}, seed=4)


@pytest.mark.parametrize("keep", [BLOCK, 2 * BLOCK])
def test_continued_with_a_state(engine: Engine, model: Path, ridge: LoRARequest, keep: int) -> None:
    """Two go on at once, and one that has lost the blocks keeps by the record what they kept."""
    first = Job(random_tokens(PIN, 500, keep), LENGTH, ridge, _options(keep), seed=2)
    engine.run([first])
    forks = [_resumed(first, random_tokens(1 + 20 * i, 500, i)) for i in range(2)]
    forks.append(_resumed(first, random_tokens(1, 500, 0), pte_keep=0))  # keeps none from now on
    engine.run(forks)
    for fork in forks[:2]:
        assert fork.cached_tokens > FIRST_FOLD + 4 * BLOCK
        assert fork.kept[: len(first.kept)] == first.kept
    assert forks[2].cached_tokens < FIRST_FOLD and forks[2].tokens != forks[0].tokens
    engine.run([Job(random_tokens(200, 500, 100 + i), 1) for i in range(16)])  # takes every block
    again = _resumed(first, random_tokens(1, 500, 0), pte_kept=record_to_json(first.kept))
    engine.run([again])
    assert again.cached_tokens < FIRST_FOLD
    assert again.kept == forks[0].kept and again.tokens == forks[0].tokens
    assert_selected([first, *forks[:2], again], WINDOW)
    assert_parity(model, [first, *forks, again], WINDOW, min_folds=6)
