"""Arms: which there are, what they ask a server for, and how much cache an answer takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pte_vllm.eval.arms import Arm, Pins, make_arms, peak_tokens
from pte_vllm.eval.prompts import has_turns

BLOCK = 32


def test_all_axes() -> None:
    arms = make_arms(
        [0, 64, 128],
        adapters=["a", "b"],
        rules=[None, "delta"],
        evict=["oldest", "random"],
        sinks=True,
        keep=[32, 96],
        keep_scores=["expected", "random"],
        plain_windows=[96],
        state_tokens={"a": 40, "b": 0},
        block_size=BLOCK,
    )
    keys = [arm.key for arm in arms]
    assert keys[0] == "full" and len(set(keys)) == len(keys)
    for window in (64, 128):
        assert {
            f"w{window}",
            f"w{window}-random",
            f"w{window}-sinks",
            f"w{window}-a",
            f"w{window}-a-delta",
            f"w{window}-b",
            f"w{window}-keep32",
            f"w{window}-keep96",
            f"w{window}-keep32-random",
            f"w{window}-keep96-random",
        } <= set(keys)
        # A state of 40 tokens weighs as much as two blocks; one of nothing as no block.
        assert {f"w{window + 64}-as-a", f"w{window}-as-b"} <= set(keys)
    assert "w96" in keys and len(keys) == 1 + 2 * 13 + 1


def test_what_is_asked() -> None:
    def asked(arm: Arm, knows_keep: bool = False) -> dict[str, object]:
        plan = arm.plan(70, block_size=BLOCK, evict_ratio=0.25, seed=9)
        return arm.request_args(plan, knows_keep=knows_keep)

    assert asked(Arm(window_tokens=0)) == {"pte_window": 0}
    assert asked(Arm(window_tokens=64, adapter="a", rule="delta")) == {
        "pte_window": 64,
        "pte_update": "delta",
    }
    assert asked(Arm(window_tokens=64, evict="random")) == {
        "pte_window": 64,
        "pte_evict": "random",
        "pte_evict_seed": 9,
    }
    # The question has three blocks; one of them is a sink, and the window gets the other two.
    assert asked(Arm(window_tokens=64, sinks=True)) == {"pte_window": 128, "pte_pin_tokens": 4}
    kept = Arm(window_tokens=64, keep_tokens=32)
    expected = {"pte_window": 64, "pte_keep": 32, "pte_keep_score": "expected"}
    assert asked(kept, knows_keep=True) == expected
    assert asked(replace(kept, keep_score="random"), knows_keep=True) == {
        **expected,
        "pte_keep_score": "random",
        "pte_evict_seed": 9,
    }
    # A server may keep tokens where a request does not say.
    assert asked(Arm(window_tokens=64), knows_keep=True) == {"pte_window": 64, "pte_keep": 0}
    assert asked(Arm(window_tokens=0), knows_keep=True) == {"pte_window": 0, "pte_keep": 0}


def test_names_in_tables() -> None:
    kept = Arm(window_tokens=64, keep_tokens=32)
    assert kept.title == "window 64, keeping 32"
    assert replace(kept, keep_score="random").title == "window 64, keeping 32 at random"
    assert replace(kept, adapter="a").title == "window 64, a, keeping 32"


def test_adapters_that_keep() -> None:
    arms = make_arms(
        [64],
        adapters=["a"],
        adapter_keep=[0, 32],
        state_tokens={"a": 40},
        block_size=BLOCK,
    )
    # A window of the same bytes holds what is kept, and what the state weighs.
    assert [arm.key for arm in arms] == ["full", "w64", "w64-a", "w64-keep32-a", "w160-as-a"]
    plan = arms[3].plan(70, block_size=BLOCK, evict_ratio=0.25)
    assert (plan.keep_tokens, plan.keep_score) == (32, "expected")


def test_where_something_is_drawn() -> None:
    def draws(window: int, ratio: float = 0.25) -> bool:
        arm = Arm(window_tokens=window, evict="random")
        return arm.draws(block_size=BLOCK, evict_ratio=ratio)

    assert not draws(64) and draws(96) and draws(128)
    assert not draws(128, 0.75)  # three of four leave, and the newest stays
    assert not Arm(window_tokens=128).draws(block_size=BLOCK, evict_ratio=0.25)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 70, 160, 161, 192, 500, 512])
def test_peak_is_the_most_that_is_held(sinks: bool, num_tokens: int) -> None:
    if not sinks:
        for keep_tokens in (32, 96, 1024):
            arm = Arm(window_tokens=64, keep_tokens=keep_tokens)
            plan = arm.plan(70, block_size=BLOCK, evict_ratio=0.25)
            held = max(plan.held_blocks(pos) for pos in range(num_tokens))
            assert peak_tokens(plan, num_tokens) == held * BLOCK
    plan = Arm(window_tokens=64, sinks=sinks).plan(70, block_size=BLOCK, evict_ratio=0.25)
    held = max(plan.held_blocks(pos) for pos in range(num_tokens))
    assert peak_tokens(plan, num_tokens) == held * BLOCK
    assert plan.peak_blocks(500) == 6  # with and without sinks


@pytest.mark.parametrize("num_tokens", [1, 95, 300, 301, 340, 700])
def test_peak_of_a_chat_of_several_turns(num_tokens: int) -> None:
    """Its first question and its newest one are pinned, in every arm that pins questions."""
    pins = Pins(pin_tokens=40, pin_spans=((150, 170), (280, 340)))
    options: dict[str, Any] = {"block_size": BLOCK, "evict_ratio": 0.25, "pins": pins}
    peaks = {}
    for name, arm in {
        "plain": Arm(window_tokens=96),
        "keep": Arm(window_tokens=96, keep_tokens=64),
        "sinks": Arm(window_tokens=96, sinks=True),
        "random": Arm(window_tokens=96, evict="random"),
        "full": Arm(window_tokens=0),
    }.items():
        plan = arm.plan(340, **options)
        held = max(plan.held_blocks(pos) for pos in range(num_tokens))
        assert peak_tokens(plan, num_tokens) == held * BLOCK, name
        peaks[name] = held
    assert peaks["plain"] <= peaks["keep"] <= peaks["full"]
    plan = Arm(window_tokens=96).plan(340, **options)
    assert (plan.pin_tokens, plan.pin_spans) == (40, pins.pin_spans)
    sinks = Arm(window_tokens=96, sinks=True).plan(340, **options)
    assert (sinks.pin_tokens, sinks.pin_spans) == (4, ())
    assert sinks.peak_blocks(700) == plan.peak_blocks(700)
    # No questions are looked for where blocks leave at random.
    assert Arm(window_tokens=96, evict="random").plan(340, **options).pin_tokens == 340
    fixed = Pins(pin_tokens=7, by_questions=False)
    options["pins"] = fixed
    assert Arm(window_tokens=96, evict="random").plan(340, **options).pin_tokens == 7


def test_which_chats_have_turns() -> None:
    def chat(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": "a"} for role in roles]

    assert not any(map(has_turns, (chat("user"), chat("system", "user"), chat("user", "user"))))
    assert has_turns(chat("user", "assistant", "user")) and has_turns(chat("user", "assistant"))
    assert has_turns(chat("system", "user", "system", "user"))
