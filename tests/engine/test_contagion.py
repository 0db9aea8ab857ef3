"""A sequence whose numbers overflow harms no other, beside it or in the blocks that it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import enlarge, random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK


@pytest.fixture(params=["plain", "ridge"])
def overflowing(
    request: pytest.FixtureRequest,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    model, plain = tiny("llama"), request.param == "plain"
    options = {"plain": True} if plain else {"rule": "ridge"}
    return enlarge(adapters(model, rank=8, **options), tmp_path / "bad", 1e18)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_overflows_stays_alone(
    async_scheduling: bool,
    overflowing: Path,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
) -> None:
    model = tiny("llama")
    good = lora("good", adapters(model, rank=8, rule="paper"), 1)
    bad = lora("bad", overflowing, 2)

    def jobs() -> list[Job]:
        return [
            Job(random_tokens(7, 500, 1), 150, good),
            Job(random_tokens(BLOCK + 3, 500, 2), 150),
            Job(random_tokens(40, 500, 3), 150, good, {"pte_window": 0}),
        ]

    # So few blocks that each is used again, soon after and by somebody else.
    sizes = {"num_blocks": 24, "max_num_seqs": 6, "max_model_len": 512, "max_prompt_tokens": 128}
    sizes["async_scheduling"] = async_scheduling
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, **sizes)
    try:
        for _ in range(2):
            beside = jobs()
            spoiled = [Job(random_tokens(20 + 9 * i, 500, i), 100, bad) for i in range(3)]
            engine.run([*spoiled, *beside])
            assert [job.finish_reason for job in spoiled] == ["error"] * 3
            assert_parity(model, beside, WINDOW)
            after = jobs()
            engine.run(after)
            assert_parity(model, after, WINDOW)
            engine.check_idle()
    finally:
        engine.close()
