"""Fixtures of the tests of GRPO's loop: a base model with an adapter, and what earns a reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.train.grpo import sampling

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


@pytest.fixture
def reward_by_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are random, so what earns is set here: the first token's lowest bits."""
    monkeypatch.setattr(sampling, "score", lambda problem, text, ids, **_: (ids[0] % 4) / 3)


@pytest.fixture
def start(tiny: Tiny, adapters: Adapters) -> tuple[Path, Path]:
    path = tiny("llama")
    return path, adapters(path, rule="ridge")
