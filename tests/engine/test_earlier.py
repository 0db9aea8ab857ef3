"""Earlier requests by id: the names that clients have for them, and how many are remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from pte_vllm.engine.earlier import (
    EARLIER,
    MAX_EARLIER,
    ONLY_CHECKED,
    EarlierRequest,
    EarlierRequests,
)
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import RequestOptions
from pte_vllm.server.rollouts.generation import validate
from tests.harness.engine import Engine, Job


def _request(pin_tokens: int, choices: int = 1) -> EarlierRequest:
    return EarlierRequest.of(
        RequestOptions(),
        plan=FoldPlan(pin_tokens=pin_tokens, window_tokens=64, block_size=16),
        adapter=None,
        choices=choices,
        prompt=range(100),
    )


def test_names() -> None:
    earlier = EarlierRequests()
    for i, (request_id, choices) in enumerate(
        [("cmpl-a-0", 1), ("cmpl-a-1", 1), ("cmpl-b-0", 3), ("chatcmpl-c", 2), ("cmpl-job-7-0", 1)]
    ):
        earlier.add(request_id, _request(i, choices))
    for name, index in {
        "cmpl-a": 0,
        "cmpl-a-1": 1,
        "cmpl-a-1-0": 1,
        "cmpl-b": 2,
        "cmpl-b-2": 2,
        "cmpl-b-0-2": 2,
        "2_cmpl-b-0-0123abcd": 2,
        "chatcmpl-c": 3,
        "chatcmpl-c-1": 3,
        "chatcmpl-c-0123abcd": 3,
        "cmpl-job-7": 4,
    }.items():
        assert earlier.get(name).pin_tokens == index, name
    for name in ("cmpl-a-2", "cmpl-b-3", "chatcmpl-c-2", "chatcmpl", "x", "cmpl-a-0-1"):
        with pytest.raises(ValueError, match="pte_pin_tokens"):
            earlier.get(name)
    earlier.forget("cmpl-b-1")
    earlier.forget("cmpl-b-1")
    with pytest.raises(ValueError, match="forgotten"):
        earlier.get("cmpl-b")


def test_the_oldest_leave() -> None:
    earlier = EarlierRequests()
    for i in range(MAX_EARLIER + 2):
        earlier.add(f"cmpl-{i}x-0", _request(i))
    with pytest.raises(ValueError, match="forgotten"):
        earlier.get("cmpl-1x")
    assert earlier.get("cmpl-2x").pin_tokens == 2


def test_what_is_only_checked_is_not_remembered(tiny: Callable[[str], Path]) -> None:
    engine = Engine(tiny("qwen3"))
    try:
        EARLIER.forget("job-0")  # of another engine in this process
        prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
        service, base = SimpleNamespace(engine=engine.engine), SimpleNamespace(lora=None)
        validate(service, prompt, SamplingParams(max_tokens=5), base)
        with pytest.raises(ValueError, match="forgotten"):
            EARLIER.get(ONLY_CHECKED)
        engine.run([Job([1, 2, 3], max_tokens=5)])
        assert EARLIER.get("job-0").num_prompt_tokens == 3
    finally:
        engine.close()
