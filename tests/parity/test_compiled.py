"""Under torch.compile, which vLLM leaves out for LoRA on a CPU: the same numbers, every adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.config import CompilationMode

from pte_vllm.kernels import native
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity
from tests.parity.embedding import assert_embedding_adapter

WINDOW = 2 * BLOCK
LENGTH = WINDOW + 8 * BLOCK + 5


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, enforce_eager=False)
    yield engine
    engine.check_idle()
    engine.close()


def test_mixed_batch(engine: Engine, model: Path, adapters: Callable[..., Path]) -> None:
    """The model is traced once, before any adapter is there."""
    assert engine.runner.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    found = [
        lora("ridge", adapters(model, rank=8, rule="ridge"), 1),
        lora("paper", adapters(model, rank=8, rule="paper"), 2),
        lora("squared", adapters(model, rank=8, rule="ridge", features="squared"), 5),
        lora("plain", adapters(model, plain=True, rank=8), 3),
        None,
    ]
    jobs = [
        Job(random_tokens(9 + 31 * i, 500, i), LENGTH, adapter) for i, adapter in enumerate(found)
    ]
    engine.run(jobs)
    assert_parity(model, jobs, WINDOW, min_folds=8)


def test_adapter_of_the_embedding_that_comes_later(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    """Which linears adapters have weights for is known after the trace only."""
    assert_embedding_adapter(engine, model, tmp_path)


@pytest.mark.parametrize("reason", ["asked", pytest.param("no compiler", marks=pytest.mark.slow)])
def test_eager(
    model: Path, adapters: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "no compiler":
        monkeypatch.setattr(native, "load", _no_compiler)
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, enforce_eager=reason == "asked")
    try:
        assert engine.runner.compilation_config.mode == CompilationMode.NONE
        job = Job(random_tokens(20, 500, 1), LENGTH, lora("a", adapters(model, rank=8), 1))
        engine.run([job])
        assert_parity(model, [job], WINDOW, min_folds=8)
    finally:
        engine.close()


def _no_compiler() -> None:
    raise native.NativeError("no C++ compiler")
