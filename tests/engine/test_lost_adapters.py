"""An adapter whose files are gone when it is loaded again fails its own requests, and no others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ridge"])
def test_a_lost_adapter_fails_alone(
    kind: str,
    async_scheduling: bool,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = tiny("llama")
    source = adapters(model, rank=8, **({"plain": True} if kind == "plain" else {"rule": kind}))
    shutil.copytree(source, tmp_path / "lost")
    lost, other = lora("lost", tmp_path / "lost", 1), lora("other", adapters(model, rank=8), 2)
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        max_loras=2,
        max_cpu_loras=2,
        async_scheduling=async_scheduling,
    )
    third = lora("third", adapters(model, rank=8, rule="paper", seed=3), 3)
    try:
        prompt = random_tokens(2 * BLOCK + 5, 500, 1)
        for adapter in (lost, other, third):  # the third drops the first
            assert_parity(model, engine.run([Job(prompt, 20, adapter)]), WINDOW)
        assert 1 not in engine.engine.list_loras()
        shutil.rmtree(tmp_path / "lost")
        for length in (1, 60):
            failing = [Job(prompt, length, lost), Job(random_tokens(9, 500, 2), length, lost)]
            beside = [Job(prompt, 100, other), Job(random_tokens(40, 500, 3), 100)]
            engine.run([*failing, *beside])
            assert [job.finish_reason for job in failing] == ["error", "error"]
            assert [job.tokens for job in failing] == [[], []]
            assert_parity(model, beside, WINDOW, min_folds=1)
            engine.run([Job(prompt, 5, third)])  # so that the next loop has to load again
        engine.check_idle()
        # Once it is back, it is found again, and nothing of the failed step is.
        shutil.copytree(source, tmp_path / "lost")
        back = [Job(prompt, 60, lost)]
        assert_parity(model, engine.run(back), WINDOW)
        engine.check_idle()
    finally:
        engine.close()
