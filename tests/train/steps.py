"""A GRPO step to try: a policy, two groups of its rollouts, and a learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.grpo.learner import Learner
from pte_vllm.train.grpo.loss import ScoredRollout, with_advantages
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import replay
from pte_vllm.wire.rollout import Rollout
from tests.train.rollouts import make_rollout

TEMPERATURE = 0.9


def policy(path: Path, adapters: Callable[..., Path]) -> PTEModel:
    """The model of a directory, with an adapter of rule `paper`."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PTEModel(base, Adapter.load(adapters(path, rule="paper")))


def a_step(model: PTEModel, **options: Any) -> list[ScoredRollout]:
    """Two groups of three; lengths differ, and all sequences fold."""
    samples = []
    for group, rewards in enumerate([(1.0, 0.0, 0.5), (0.0, 0.0, 1.0)]):
        for index, reward in enumerate(rewards):
            rollout = make_rollout(
                model,
                group=group,
                index=index,
                prompt_tokens=(21, 40)[group],
                tokens=80 + 11 * index,
                temperature=TEMPERATURE,
                **options,
            )
            samples.append(ScoredRollout(rollout=rollout, reward=reward, shaped_reward=reward))
    return with_advantages(samples, "group")


def shifted(rollout: Rollout, scale: float, seed: int = 0) -> Rollout:
    """The same tokens from a sampler that disagrees."""
    noise = torch.randn(len(rollout.logprobs), generator=torch.Generator().manual_seed(seed))
    moved = torch.tensor(rollout.logprobs) + scale * noise
    return replace(rollout, logprobs=tuple(moved.clamp(max=0).tolist()))


def learner(model: PTEModel, lr: float = 0.0, **options: Any) -> Learner:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr)
    initial = options.pop("initial", None)
    max_drift = options.pop("max_drift", 1e-4)
    return Learner(
        model,
        optimizer,
        GrpoOptions(**options),
        temperature=TEMPERATURE,
        max_drift=max_drift,
        max_grad_norm=1e9,
        initial=initial,
    )


def logprobs_of(model: PTEModel, rollout: Rollout) -> torch.Tensor:
    """Of the answer's tokens, `[N]`."""
    batch = AlignedBatch.align([rollout.token_ids], [rollout.plan])
    return replay(model, batch, temperature=TEMPERATURE).logprobs[0, len(rollout.prompt_ids) :]


def gradients(model: PTEModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_trainable() if p.grad is not None}
