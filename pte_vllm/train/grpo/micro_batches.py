"""Rollouts of similar length side by side, with what is known of each of their tokens.

Shapes: B sequences of a micro-batch, T tokens of its longest one, question included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pte_vllm.train.grpo.loss import (
    ScoredRollout,
    staleness,
    token_weights,
    trained_marks,
    version_marks,
)
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.aligned import AlignedBatch


@dataclass(kw_only=True)
class MicroBatch:
    """Rollouts that are replayed at once.

    All tensors are `[B, T]`, by sequence and token, unless noted.
    """

    batch: AlignedBatch
    samples: list[ScoredRollout]
    sampler: Tensor  # log-probs of the sampler
    sampled: Tensor  # bool: tokens the policy sampled
    current: Tensor  # bool: those that the learner's own version sampled
    weights: Tensor  # of the loss; 0 where a token carries none
    advantages: Tensor  # [B]
    old: Tensor | None = None
    """The learner's log-probs before the step."""
    reference: Tensor | None = None
    """The reference policy's log-probs."""

    @property
    def idle(self) -> bool:
        """Whether its gradient is zero, unless there is a KL term."""
        return not bool((self.weights * self.advantages[:, None]).any())


def split(
    samples: Sequence[ScoredRollout],
    options: GrpoOptions,
    *,
    version: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Put rollouts into micro-batches; those that teach nothing are kept apart from the others.

    Args:
        samples: scored rollouts with advantages.
        options: the options of the algorithm.
        version: the learner's version of the adapter.
        device: where the tensors are put.

    Raises:
        ValueError: if a rollout is staler than the options allow, or newer than the learner.
    """
    for sample in samples:
        age = staleness(sample.rollout, version)
        newest = max((span.version for span in sample.rollout.weight_versions), default=version)
        if age > options.max_staleness or newest > version:
            raise ValueError(
                f"a rollout of group {sample.rollout.group_id} has versions {version - age} to "
                f"{newest}; the learner's is {version}, max_staleness {options.max_staleness}"
            )
    counts = [sum(trained_marks(s.rollout, options)) for s in samples]
    weights = token_weights(counts, options.loss_level)

    def kind(i: int) -> tuple[object, ...]:
        """Return what the rollouts of one micro-batch must share."""
        plan = samples[i].rollout.plan
        idle = options.kl_coef == 0 and (not counts[i] or samples[i].advantage == 0)
        choices = plan.evict, plan.evict_seed, plan.keep_tokens, plan.keep_score
        pinned = plan.pinned_blocks * plan.block_size
        questions = tuple((first - pinned, end - pinned) for first, end in plan.pin_spans)
        return plan.window_tokens, plan.evict_ratio, plan.block_size, *choices, questions, idle

    parts: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: (kind(i), _shape(samples[i]))):
        part = parts[-1] if parts else []
        if 0 < len(part) < options.micro_batch_sequences and kind(part[0]) == kind(i):
            part.append(i)
        else:
            parts.append([i])
    return [
        _micro([samples[i] for i in part], [weights[i] for i in part], options, version, device)
        for part in parts
    ]


def _shape(sample: ScoredRollout) -> tuple[int, int]:
    """Count the columns after the pinned part, which ends together for all, then those before."""
    plan = sample.rollout.plan
    pinned = plan.pinned_blocks * plan.block_size
    return len(sample.rollout.token_ids) - pinned, pinned


def _micro(
    samples: list[ScoredRollout],
    weights: list[float],
    options: GrpoOptions,
    version: int,
    device: torch.device,
) -> MicroBatch:
    rollouts = [sample.rollout for sample in samples]
    size = len(rollouts), max(len(r.token_ids) for r in rollouts)
    sampler = torch.zeros(size)
    sampled, current, trained = (torch.zeros(size, dtype=torch.bool) for _ in range(3))
    for b, rollout in enumerate(rollouts):
        first, end = len(rollout.prompt_ids), len(rollout.token_ids)
        sampler[b, first:end] = torch.tensor(rollout.logprobs)
        sampled[b, first:end] = torch.tensor(rollout.mask, dtype=torch.bool)
        current[b, :end] = torch.tensor(version_marks(rollout, version))
        trained[b, :end] = torch.tensor(trained_marks(rollout, options))
    batch = AlignedBatch.align(
        [rollout.token_ids for rollout in rollouts],
        [rollout.plan for rollout in rollouts],
        [sampled[b, : len(r.token_ids)].tolist() for b, r in enumerate(rollouts)],
    )
    return MicroBatch(
        batch=batch.to(device),
        samples=samples,
        sampler=sampler.to(device),
        sampled=sampled.to(device),
        current=current.to(device),
        weights=(trained * torch.tensor(weights)[:, None]).to(device),
        advantages=torch.tensor([s.advantage for s in samples], device=device),
    )
