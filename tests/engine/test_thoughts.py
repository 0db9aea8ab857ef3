"""Thoughts in the engine: a preempted sequence starts over, and finished ones are bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.engine.thoughts import Thoughts, ThoughtStore
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import load_model

WINDOW = 2 * BLOCK


def test_preempted_sequences_start_over(
    tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    model = tiny("llama")
    path = adapters(model, rank=8, rule="ridge")
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8)
    job = Job(random_tokens(40, 500, 1), 200, lora("ridge", path, 1))
    seen: list[int] = []

    def on_step(step: int, request_ids: list[str]) -> None:
        thoughts = engine.worker.pte_thoughts(request_ids[0])
        seen.append(0 if thoughts is None else thoughts["folds"])
        if step == 150:
            engine.preempt()

    try:
        engine.run([job], on_step)
        found = engine.worker.pte_thoughts("job-0")
        engine.check_idle()
    finally:
        engine.close()
    assert max(seen[:151]) >= 2 and 0 in seen[151:155]
    attached = PTEModel(load_model(model), Adapter.load(path))
    try:
        folds = log_probs(attached, job.prompt + job.tokens[:-1], job.plan(WINDOW)).folds[0]
    finally:
        attached.detach()
    assert found["status"] == "finished" and len(folds) >= 4
    assert found["rho"] == pytest.approx([fold.rho.mean().item() for fold in folds], rel=1e-3)


def _thoughts(name: str, numbers: int) -> Thoughts:
    return Thoughts(
        request_id=name,
        finished=True,
        plan=FoldPlan(pin_tokens=0, window_tokens=64, block_size=32),
        adapter=None,
        rule="paper",
        num_tokens=0,
        folded_blocks=0,
        held_blocks=0,
        peak_blocks=0,
        state=torch.zeros(1, 1, numbers),  # 4 bytes each
    )


def test_kept_thoughts_are_bounded_by_count_and_bytes() -> None:
    store = ThoughtStore(max_count=3, max_bytes=400)
    for i in range(5):
        store.add(_thoughts(f"r{i}", 10))
    assert [store.find(f"r{i}") is not None for i in range(5)] == [False, False, True, True, True]
    store.add(_thoughts("big", 90))
    assert store.find("r4") is not None and store.find("r3") is None
    store.add(_thoughts("too big", 101))
    assert store.find("too big") is None
    store.add(_thoughts("again", 100))
    store.forget("again")
    store.add(_thoughts("again", 100))
    assert store.find("again") is not None
    marks = (None, torch.zeros(150, dtype=torch.uint8))  # what folds kept takes memory as well
    for i in range(3):
        store.add(replace(_thoughts(f"kept{i}", 10), survivals=marks))
    assert [store.find(f"kept{i}") is not None for i in range(3)] == [False, True, True]
    assert replace(_thoughts("shown", 10), survivals=marks).without_state().num_bytes == 0
    none = ThoughtStore(max_count=0, max_bytes=400)
    none.add(_thoughts("r", 1))
    assert none.find("r") is None
