"""The engine on its device against the replay in plain transformers, fp32: largest |Δ log p|.

A tiny random model, every update rule and squared features, eight folds and more. On a GPU that is
the whole path: the fold kernel, modulation, gaps cut for attention, and CUDA graphs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.bench.gpu.setup import TINY, random_adapter, write_model
from pte_vllm.bench.gpu.spec import Spec, build
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.plan import FoldPlan

TOLERANCE = 2e-4
_ARMS = {**{rule: (rule, "linear") for rule in RULE_NAMES}, "ridge squared": ("ridge", "squared")}
"""Rule and features of each adapter."""


def parity(spec: Spec) -> dict[str, Any]:
    """By adapter the largest difference in log-prob of a sampled token."""
    from transformers import AutoModelForCausalLM

    from pte_vllm.train.replay.modeling import PTEModel
    from pte_vllm.train.replay.segments import log_probs

    root, size = Path(spec.scratch) / "parity", spec.block_size
    model = write_model(root / "model", TINY, weights=True)
    adapters = {
        name: random_adapter(
            model,
            root / name.replace(" ", "-"),
            rank=8,
            rule=rule,
            features=features,
            dtype=torch.float32,
            seed=i,
        )
        for i, (name, (rule, features)) in enumerate(_ARMS.items())
    }
    window_blocks, num_folds = (2, 2) if spec.dry_run else (4, 9)
    window = window_blocks * size
    sampled = _generate(spec, model, adapters, window, window + num_folds * size + 7)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    worst: dict[str, float] = {}
    folds: dict[str, int] = {}
    for name, (prompt, tokens, logprobs) in sampled.items():
        plan = FoldPlan(pin_tokens=len(prompt), window_tokens=window, block_size=size)
        attached = PTEModel(network, Adapter.load(adapters[name]))
        with torch.no_grad():
            scores = log_probs(attached, prompt + tokens, plan).logprobs[0, len(prompt) :]
        attached.detach()
        worst[name] = (torch.tensor(logprobs) - scores.float()).abs().max().item()
        last = len(prompt) + len(tokens) - 1
        folds[name] = plan.folded_blocks(last) // plan.evict_blocks
    return {"largest_difference": worst, "folds": folds, "tolerance": TOLERANCE}


def _generate(
    spec: Spec, model: str, adapters: dict[str, str], window: int, num_tokens: int
) -> dict[str, tuple[list[int], list[int], list[float]]]:
    """By adapter the prompt, the tokens sampled in one mixed batch, and their log-probs."""
    from dataclasses import replace

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, _ = build(
        replace(
            spec,
            model=model,
            adapter=adapters["paper"],
            window_tokens=window,
            rollouts=[2048],
            dtype="float32",
            rank=8,
            max_num_seqs=8,
            memory_utilization=min(spec.memory_utilization, 0.3),
        ),
        load_format="auto",
        max_loras=len(adapters),
    )
    prompts = {}
    for i, (name, path) in enumerate(adapters.items()):
        rng = random.Random(i)
        prompts[name] = [rng.randrange(2, TINY["vocab_size"]) for _ in range(19 + 23 * i)]
        engine.add_request(
            name,
            {"prompt_token_ids": prompts[name]},
            SamplingParams(
                max_tokens=num_tokens,
                temperature=1.0,
                seed=i,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            ),
            lora_request=LoRARequest(lora_name=name, lora_int_id=i + 1, lora_path=path),
        )
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            scores = [
                entry[token].logprob
                for token, entry in zip(tokens, completion.logprobs, strict=True)
            ]
            found[output.request_id] = prompts[output.request_id], tokens, scores
    return found
