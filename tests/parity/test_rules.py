"""All rules, ranks and architectures, eight folds and more, against the replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pte_vllm.method.names import RULE_NAMES
from pte_vllm.train.options.runs import DRIFT_LIMITS
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity, difference

WINDOW = 4 * BLOCK
LENGTH = WINDOW + 9 * BLOCK + 7  # first fold after the window, then one a block
SMALL_WINDOW = 2 * BLOCK  # fewer tokens to eight folds, for the model that takes its time


def _jobs(
    model: Path,
    adapters: Callable[..., Path],
    rank: int,
    vocab: int,
    length: int = LENGTH,
    features: str = "linear",
) -> list[Job]:
    jobs = []
    for i, rule in enumerate(RULE_NAMES):
        adapter = adapters(model, rank=rank, rule=rule, seed=i, features=features)
        prompt = random_tokens(19 + 23 * i, vocab, seed=i)
        number = rank * 10 + i + 1 + (1000 if features == "squared" else 0)
        jobs.append(Job(prompt, length, lora(f"{rule}-{rank}-{features}", adapter, number)))
    return jobs


@pytest.mark.parametrize(
    "architecture", [pytest.param("llama", marks=pytest.mark.slow), "qwen2", "qwen3"]
)
def test_tiny_models(
    architecture: str, tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    model = tiny(architecture)
    # Slots for all adapters, so that all run at once: steps cost by their number.
    engine = Engine(model, window_tokens=WINDOW, lora_rank=32, max_loras=8)
    try:
        jobs = [job for rank in (8, 32) for job in _jobs(model, adapters, rank, 500)]
        assert_parity(model, engine.run(jobs), WINDOW, min_folds=8)
        engine.check_idle()
    finally:
        engine.close()


def test_named_options(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> None:
    """Options away from their defaults; fewer layers; G unlike r; an override of the rule."""
    model = tiny("llama")
    variants = [
        {"read": "value", "rule": "paper"},
        {"keys": "rotated", "rule": "sum"},
        {"normalize": "row", "rule": "paper"},
        {"layers": [1], "rule": "ridge"},
        {"features": "squared", "rule": "ridge"},
        {"features": "squared", "rule": "delta", "keys": "rotated"},
        {"features": "squared", "rule": "paper"},
        {"global_tokens": 12, "rule": "paper"},
        {"targets": ["q_proj", "v_proj", "down_proj"], "rule": "sum"},
    ]
    jobs = [
        Job(random_tokens(40, 500, i), LENGTH, lora(f"v{i}", adapters(model, rank=8, **v), i + 1))
        for i, v in enumerate(variants)
    ]
    paper = adapters(model, rank=8, rule="paper")
    for i, rule in enumerate(RULE_NAMES):
        adapter = lora("override", paper, 90)
        jobs.append(Job(random_tokens(33, 500, 50 + i), LENGTH, adapter, {"pte_update": rule}))
    engine = Engine(model, window_tokens=WINDOW, lora_rank=16, max_loras=10)
    try:
        assert_parity(model, engine.run(jobs), WINDOW, min_folds=8)
    finally:
        engine.close()


def test_slots_that_squared_and_other_adapters_reuse(
    tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    """More jobs than the two slots, both squared first; every rule on an adapter that squares."""
    model, length = tiny("llama"), SMALL_WINDOW + 5 * BLOCK + 3
    made = {
        "squared": adapters(model, rank=8, rule="ridge", features="squared"),
        "linear": adapters(model, rank=8, rule="ridge"),
        "rows": adapters(model, rank=8, rule="paper", features="squared", global_tokens=12),
        "plain": adapters(model, plain=True),
    }
    loras = {name: lora(name, path, i + 1) for i, (name, path) in enumerate(made.items())}
    order = ("squared", "rows", "linear", "linear", "squared", "plain", "linear")
    jobs = [Job(random_tokens(40, 500, 1), length, loras[name]) for name in order]
    jobs.append(Job(random_tokens(40, 500, 1), length))
    for rule in RULE_NAMES:
        prompt = random_tokens(33, 500, 9)
        jobs.append(Job(prompt, length, loras["squared"], {"pte_update": rule}))
    engine = Engine(model, window_tokens=SMALL_WINDOW, lora_rank=16, max_num_seqs=2)

    def preempt(step: int, request_ids: list[str]) -> None:
        if step in (60, 150, 300):
            engine.preempt()

    try:
        assert_parity(model, engine.run(jobs, preempt), SMALL_WINDOW, min_folds=5)
        engine.check_idle()
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("ranks", "folds"), [((8,), 2), pytest.param((8, 32), 8, marks=pytest.mark.slow)]
)
def test_smollm2(
    ranks: tuple[int, ...], folds: int, smollm2: Path, adapters: Callable[..., Path]
) -> None:
    length = SMALL_WINDOW + folds * BLOCK + 7
    engine = Engine(smollm2, window_tokens=SMALL_WINDOW, lora_rank=max(ranks))
    try:
        jobs = [j for rank in ranks for j in _jobs(smollm2, adapters, rank, 40000, length)]
        assert_parity(smollm2, engine.run(jobs), SMALL_WINDOW, min_folds=folds)
        engine.check_idle()
    finally:
        engine.close()


def test_bf16(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> None:
    """States are read in bf16 too; both programs round to it as often."""
    model = tiny("llama")
    jobs = _jobs(model, adapters, 8, 500, SMALL_WINDOW + 5 * BLOCK)
    engine = Engine(model, window_tokens=SMALL_WINDOW, lora_rank=16, dtype="bfloat16")
    try:
        assert engine.runner.pte_pool.states.dtype == torch.bfloat16
        engine.run(jobs)
        engine.check_idle()
    finally:
        engine.close()
    for job in jobs:
        off = difference(model, job, SMALL_WINDOW, dtype=torch.bfloat16)
        print(f"bf16, {job.adapter.lora_name}: mean |Δ log p| {off.mean():.1e}")
        assert off.mean() < DRIFT_LIMITS["bfloat16"] / 2


@pytest.mark.slow
def test_smollm2_bf16(smollm2: Path, adapters: Callable[..., Path]) -> None:
    """bf16 rounds differently in the two programs; the mean says whether they compute the same."""
    length = SMALL_WINDOW + 8 * BLOCK + 7
    linear = _jobs(smollm2, adapters, 32, 40000, length)
    squared = _jobs(smollm2, adapters, 32, 40000, length, features="squared")
    engine = Engine(smollm2, window_tokens=SMALL_WINDOW, lora_rank=32, dtype="bfloat16")
    try:
        engine.run(linear + squared)
    finally:
        engine.close()
    for jobs, bound in ((linear, 5e-2), (squared, 7e-2)):
        offs = [difference(smollm2, job, SMALL_WINDOW, dtype=torch.bfloat16) for job in jobs]
        for job, off in zip(jobs, offs, strict=True):
            name = job.adapter.lora_name
            print(f"bf16, {name}: mean |Δ log p| {off.mean():.1e}, max {off.max():.1e}")
            assert off.mean() < DRIFT_LIMITS["bfloat16"], name
        assert torch.cat(offs).mean() < bound
