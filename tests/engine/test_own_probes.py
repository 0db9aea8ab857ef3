"""Adapters that bring probes of their own, beside others that the engine's probes score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.exceptions import VLLMValidationError

from pte_vllm.adapter.hashes import PROBES_FILE
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import make_probes, random_tokens
from tests.harness.parity import assert_parity, replayed

WINDOW = 3 * BLOCK
"""Of which one block leaves at a fold."""
LENGTH = 9 * BLOCK
KEEP = {"pte_keep": BLOCK}
FIRST_CHOICE = 1
"""The first fold that selects: at fold 0 all candidates stay."""

Adapters = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, probes=probes, max_cpu_loras=6)
    yield engine
    engine.check_idle()
    engine.close()


def test_one_batch(engine: Engine, model: Path, adapters: Adapters, probes: Path) -> None:
    """With one question and seed, what differs before the first choice is nothing but probes."""
    ridge, own = (
        lora(name, adapters(model, rule="ridge", **options), i)
        for i, (name, options) in enumerate([("ridge", {}), ("own", {"own_probes": 9})], 1)
    )
    other = lora("other", adapters(model, rule="ridge", own_probes=2), 3)
    plain = lora("plain", adapters(model, plain=True, own_probes=9), 4)
    drawn = {**KEEP, "pte_keep_score": "random", "pte_evict_seed": 3}

    def jobs() -> list[Job]:
        question = random_tokens(40, 500, 1)
        asked = [(ridge, KEEP), (own, KEEP), (other, KEEP), (plain, KEEP), (None, KEEP)]
        asked += [(ridge, drawn), (own, drawn), (own, {})]
        return [Job(question, LENGTH, adapter, options, seed=1) for adapter, options in asked]

    batch, disturbed = jobs(), jobs()
    engine.run(batch)
    assert_parity(model, batch, WINDOW, min_folds=6)
    by_engine, by_own, by_other, _, _, *by_chance, nothing = batch
    chosen = [job.kept[FIRST_CHOICE] for job in (by_engine, by_own, by_other)]
    assert len(set(chosen)) == 3 and None not in chosen
    boundary = by_own.plan(WINDOW).first_fold + by_own.plan(WINDOW).stride - len(by_own.prompt)
    for job in (by_engine, by_other):  # until then they are the same run
        assert job.tokens[:boundary] == by_own.tokens[:boundary]
    assert by_chance[0].kept == by_chance[1].kept and by_chance[0].tokens == by_chance[1].tokens
    assert not nothing.kept
    with pytest.raises(AssertionError):  # by the engine's probes the replay would keep others
        tokens = by_own.prompt + by_own.tokens
        path, plan = Path(ridge.lora_path), by_own.plan(WINDOW)
        replayed(model, path, tokens, plan, probes=probes, record=by_own.kept)

    preempted = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal preempted
        if step % 47 == 46:
            preempted += 1
            engine.preempt(step % len(engine.scheduler.running))

    engine.run(disturbed, on_step)
    assert preempted > 3
    assert_parity(model, disturbed, WINDOW, min_folds=6)
    assert [job.tokens for job in disturbed] == [job.tokens for job in batch]


def test_other_probes_meet_nothing_of_the_first(
    engine: Engine, model: Path, adapters: Adapters, tmp_path: Path
) -> None:
    """The name and the directory are the same, as a server reloads; its number is another."""
    path = Path(shutil.copytree(adapters(model, rule="ridge", own_probes=9), tmp_path / "a"))

    def ask(lora_id: int, prompt: list[int]) -> Job:
        options = {**KEEP, "pte_pin_tokens": 2 * BLOCK}
        job = Job(prompt, 5 * BLOCK, lora("a", path, lora_id), options, seed=4)
        engine.run([job])
        assert_parity(model, [job], WINDOW, min_folds=3)
        return job

    first = ask(11, random_tokens(3 * BLOCK, 500, 2))
    longer = first.prompt + first.tokens
    assert ask(11, longer).cached_tokens > first.plan(WINDOW).first_fold
    manager = engine.runner.lora_manager
    assert 11 in manager._probes
    engine.engine.remove_lora(11)
    make_probes(12).save(path / PROBES_FILE)
    second = ask(12, longer)
    assert second.cached_tokens == 0 and 11 not in manager._probes
    assert second.kept[FIRST_CHOICE] != first.kept[FIRST_CHOICE]
    (path / PROBES_FILE).unlink()
    engine.engine.remove_lora(12)
    third = ask(13, longer)
    assert third.cached_tokens == 0 and 13 not in manager._probes
    assert third.kept[FIRST_CHOICE] not in (first.kept[FIRST_CHOICE], second.kept[FIRST_CHOICE])


def test_an_engine_without_probes_leaves_them_on_disk(model: Path, adapters: Adapters) -> None:
    own = lora("own", adapters(model, rule="ridge", own_probes=9), 1)
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8)
    try:
        with pytest.raises(VLLMValidationError, match="this server has no probes"):
            engine.run([Job(random_tokens(40), 8, own, KEEP)])
        job = Job(random_tokens(40), 4 * BLOCK, own, {**KEEP, "pte_keep_score": "random"})
        assert_parity(model, engine.run([job]), WINDOW)
        assert not engine.runner.lora_manager._probes
        engine.check_idle()
    finally:
        engine.close()
