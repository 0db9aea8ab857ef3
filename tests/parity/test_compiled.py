"""Under torch.compile, which vLLM leaves out for LoRA on a CPU: the same numbers, every adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm.config import CompilationMode

from pte_vllm.kernels import native
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, assert_parity

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
    torch.manual_seed(0)
    config = LoraConfig(
        r=8, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, lora_alpha=8
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    attached = get_peft_model(base, config)
    attached.save_pretrained(tmp_path)
    job = Job(random_tokens(20, 500, 7), 30, lora("embedding", tmp_path, 4), {"pte_window": 0})
    engine.run([job])
    with torch.no_grad():
        logits = attached(torch.tensor([job.prompt + job.tokens])).logits[0].log_softmax(-1)
    rows = torch.arange(len(job.prompt) - 1, len(job.prompt) + len(job.tokens) - 1)
    expected = logits[rows, torch.tensor(job.tokens)]
    assert (torch.tensor(job.logprobs) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("reason", ["asked", "no compiler"])
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
