"""Conversations that read all of their history again at every turn, in chunks that end anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.conversations import WINDOW, conversations, talk
from tests.harness.engine import Engine


@pytest.mark.parametrize("chunk", [pytest.param(16, marks=pytest.mark.slow), 50])
def test_chunks(chunk: int, model: Path, probes: Path, adapters: Callable[..., Path]) -> None:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        probes=probes,
        max_num_batched_tokens=chunk,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    started = conversations(model, adapters)
    try:
        talk(engine, started)
        engine.check_idle()
    finally:
        engine.close()
    for conversation in started:
        conversation.assert_parity(model)
