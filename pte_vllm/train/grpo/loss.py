"""Cache-aware GRPO: what makes a loss out of rollouts and rewards, as functions of tensors.

Policy and reference are both replayed under the plan the sampler had, so a ratio compares like with
like. For a token of sequence i, with π its log-prob now, π_old before the first inner step, μ that
of the sampler and π_ref that of the reference:

    ratio = exp(π − π_old)
    w     = exp(π_old − μ), truncated or masked at a cap             sampler ≠ learner
    k3    = exp(π_ref − π) − (π_ref − π) − 1                         KL, never negative
    loss  = −w · min(ratio · A_i, clip(ratio, 1 − low, 1 + high) · A_i) + β · k3

weighted per token (`token_weights`) and summed. Sources: GRPO (arXiv 2402.03300), DAPO (arXiv
2503.14476) for clip-higher, token-level loss, overlong shaping and dynamic sampling.

Shapes: N rollouts, B sequences of T tokens, question included; tokens count from 0 in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.results import Scores
from pte_vllm.wire.rollout import Rollout

_TINY = 1e-6
_MAX_LOG_RATIO = 20.0
"""exp(89) overflows in fp32, and what is made of it becomes NaN. A ratio of exp(20) is far beyond
any clip or cap, so that nothing is lost."""


class DriftError(RuntimeError):
    """The server's log-probs are not the replay's: the two do not compute the same policy."""

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift


# -- rewards and groups ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with what it earned."""

    rollout: Rollout
    reward: float
    """The reward of the answer, without the penalty on its length."""
    shaped_reward: float
    """The reward with that penalty, of which advantages are made."""
    advantage: float = 0.0
    """How much better than its group it is; 0 until `with_advantages` says."""


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Compute DAPO's soft penalty: 0 up to `max_tokens - buffer_tokens`, linear to `-penalty`."""
    if buffer_tokens <= 0:
        return 0.0
    over = num_tokens - (max_tokens - buffer_tokens)
    return -penalty * min(max(over / buffer_tokens, 0.0), 1.0)


def group_advantages(rewards: Sequence[float], scale: str) -> list[float]:
    """Compute how much better than its group each answer is; all 0 where all are alike."""
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(c * c for c in centred) / len(rewards))
    if deviation < _TINY:
        return [0.0] * len(rewards)
    return [c / (deviation + _TINY) if scale == "group" else c for c in centred]


def with_advantages(samples: Iterable[ScoredRollout], scale: str) -> list[ScoredRollout]:
    """Return the samples with their advantages, by group in order of appearance."""
    graded = []
    for members in groups(samples).values():
        advantages = group_advantages([s.shaped_reward for s in members], scale)
        graded += [replace(s, advantage=a) for s, a in zip(members, advantages, strict=True)]
    return graded


def groups(samples: Iterable[ScoredRollout]) -> dict[str, list[ScoredRollout]]:
    """Put samples together by `group_id`, in order of appearance."""
    found: dict[str, list[ScoredRollout]] = {}
    for sample in samples:
        found.setdefault(sample.rollout.group_id, []).append(sample)
    return found


def teaches(group: Sequence[ScoredRollout]) -> bool:
    """Say whether the rewards of a group differ, so that there is something to learn."""
    rewards = [sample.shaped_reward for sample in group]
    return max(rewards) - min(rewards) > _TINY


def staleness(rollout: Rollout, version: int) -> int:
    """Count versions from the oldest token to the learner; negative if the learner is behind."""
    return version - min((span.version for span in rollout.weight_versions), default=version)


# -- tokens ---------------------------------------------------------------------------------------


def trained_marks(rollout: Rollout, options: GrpoOptions) -> list[bool]:
    """Mark by token of question and answer whether it carries loss."""
    cut_off = options.mask_truncated and rollout.finish_reason == "length"
    answer = [bool(m) and not cut_off for m in rollout.mask]
    return [False] * len(rollout.prompt_ids) + answer


def version_marks(rollout: Rollout, version: int) -> list[bool]:
    """Mark by token of question and answer whether this version of the adapter sampled it."""
    answer = [False] * len(rollout.completion_ids)
    for span in rollout.weight_versions:
        if span.version == version:
            answer[span.start : span.end] = [bool(m) for m in rollout.mask[span.start : span.end]]
    return [False] * len(rollout.prompt_ids) + answer


def token_weights(counts: Sequence[int], level: str) -> list[float]:
    """Compute the weight of a token of each sequence, from how many of its tokens carry loss.

    `token`: 1 / all tokens of the step. `sequence`: 1 / (sequences with a token · own tokens).
    """
    if level == "token":
        return [1.0 / max(sum(counts), 1)] * len(counts)
    answers = max(sum(count > 0 for count in counts), 1)
    return [1.0 / (answers * count) if count else 0.0 for count in counts]


def log_ratio(logprobs: Tensor, others: Tensor) -> Tensor:
    """Compute `logprobs - others` within ± `_MAX_LOG_RATIO`; beyond, its gradient is zero."""
    return (logprobs - others).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def importance_weights(old: Tensor, sampler: Tensor, mode: str, cap: float) -> Tensor:
    """Compute w of each token: its probability for the learner, divided by the sampler's.

    `old` and `sampler` are log-probs without a graph, so w is a constant.
    """
    if mode == "none":
        return torch.ones_like(old)
    ratio = log_ratio(old, sampler).exp()
    if mode == "token_truncate":
        return ratio.clamp(max=cap)
    return torch.where(ratio <= cap, ratio, 0.0)


def kl_k3(reference: Tensor, logprobs: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) from tokens of π, as Schulman does: unbiased and never negative."""
    difference = log_ratio(reference, logprobs)
    return difference.exp() - difference - 1.0


@dataclass
class LossStats:
    """Sums and counts over the tokens that carried loss."""

    tokens: int = 0
    clipped_low: int = 0
    clipped_high: int = 0
    ratio_sum: float = 0.0
    ratio_off: float = 0.0
    """The largest |ratio - 1|."""
    kl_sum: float = 0.0


@dataclass(kw_only=True)
class PolicyLoss:
    """The loss of one batch of sequences, as `replay` wants it; tokens may come in any portions.

    All tensors are without a graph, `[B, T]` by sequence and token unless noted.
    """

    options: GrpoOptions
    advantages: Tensor  # [B]
    weights: Tensor  # `token_weights`; 0 where a token carries no loss
    sampler: Tensor
    old: Tensor | None
    """Log-probs before the first inner step; None: this is the first one, and finds them."""
    reference: Tensor | None = None
    stats: LossStats = field(default_factory=LossStats)

    def __call__(self, scores: Scores) -> Tensor:
        options, at = self.options, (scores.rows, scores.tokens)
        advantages, weights = self.advantages[scores.rows], self.weights[at]
        old = scores.logprobs.detach() if self.old is None else self.old[at]
        importance = importance_weights(old, self.sampler[at], options.is_mode, options.is_cap)
        ratio = log_ratio(scores.logprobs, old).exp()
        clipped = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -importance * gain
        kl = torch.zeros_like(loss)
        if self.reference is not None:
            kl = kl_k3(self.reference[at], scores.logprobs)
            loss = loss + options.kl_coef * kl
        self._count(ratio.detach(), advantages, kl.detach(), weights > 0)
        return (weights * loss).sum()

    def _count(self, ratio: Tensor, advantages: Tensor, kl: Tensor, used: Tensor) -> None:
        stats, options = self.stats, self.options
        if not used.any():
            return
        ratio, advantages = ratio[used], advantages[used]
        stats.tokens += len(ratio)
        stats.ratio_sum += float(ratio.sum())
        stats.ratio_off = max(stats.ratio_off, float((ratio - 1.0).abs().max()))
        stats.kl_sum += float(kl[used].sum())
        low = (ratio < 1.0 - options.clip_low) & (advantages < 0)
        high = (ratio > 1.0 + options.clip_high) & (advantages > 0)
        stats.clipped_low += int(low.sum())
        stats.clipped_high += int(high.sum())


def check_drift(drift: float, max_drift: float, version: int, *, tokens: int) -> None:
    """Refuse a sampler that does not compute the learner's policy.

    Args:
        drift: the mean |Δ log p| over tokens that `version`, the learner's own, sampled.
        max_drift: the largest drift that is allowed.
        version: the learner's version of the adapter.
        tokens: how many tokens the mean is over; without any there is nothing to compare.

    Raises:
        DriftError: if it exceeds `max_drift`, or is not a number.
    """
    if tokens and not drift <= max_drift:  # NaN too
        raise DriftError(
            f"server and replay disagree about version {version}: mean |Δ log p| is {drift:.2e}, "
            f"and --grpo.max_logprob_drift allows {max_drift:.2e}. Check that the server runs the "
            "same base model, dtype, rule and temperature, and reports processed log-probs",
            drift,
        )
