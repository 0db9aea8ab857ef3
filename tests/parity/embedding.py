"""An adapter of the embedding, which is not a linear of the decoder, beside PEFT's own."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.harness.engine import Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE


def assert_embedding_adapter(engine: Engine, model: Path, tmp_path: Path) -> None:
    """Assert that log-probs of an engine are PEFT's."""
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
