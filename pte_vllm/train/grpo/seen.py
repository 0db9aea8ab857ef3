"""What a step's first replay shows of its rollouts: drift, entropy, folds, and what was kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pte_vllm.train.grpo.micro_batches import MicroBatch
from pte_vllm.train.replay.results import ReplayResult, Scores, TokenLoss


class Seen:
    """Collects what the replay before the first update shows; it is called as a loss is."""

    def __init__(self) -> None:
        self.entropy_sum = 0.0
        self.sampled_tokens = 0
        self.drift_tokens = 0
        self.drift_max = math.nan
        self.rho_sum = 0.0
        self.rho_count = 0
        self.folds = 0
        self.agreement_sum = 0.0
        self.agreement_count = 0
        self._drift_sum = 0.0
        self._off: list[Tensor] = []

    @property
    def drift_p99(self) -> float:
        """What 99 % of the differences between sampler and replay do not exceed."""
        # Sorted by hand: torch.quantile takes no more than 16 million numbers.
        off = torch.cat(self._off).sort().values if self._off else torch.empty(0)
        return float(off[int(0.99 * (len(off) - 1))]) if len(off) else math.nan

    @property
    def drift(self) -> float:
        """The mean difference, |Δ log p|, over tokens of the learner's version."""
        return mean_or_nan(self._drift_sum, self.drift_tokens)

    def __call__(self, scores: Scores) -> Tensor:
        logprobs = scores.logits.detach().log_softmax(-1)  # [N, V]
        self.entropy_sum -= float((logprobs.exp() * logprobs).sum())
        self.sampled_tokens += len(logprobs)
        return logprobs.new_zeros(())

    def beside(self, loss: TokenLoss) -> TokenLoss:
        """Return a loss that shows its tokens here, too."""

        def both(scores: Scores) -> Tensor:
            self(scores)
            return loss(scores)

        return both

    def add(self, micro: MicroBatch, result: ReplayResult) -> None:
        """Note the log-probs of a micro-batch, in it too, and what its folds were."""
        micro.old = result.logprobs
        off = (result.logprobs - micro.sampler).abs()[micro.current]
        if len(off):
            self._drift_sum += float(off.sum())
            self._off.append(off.cpu())
            self.drift_tokens += len(off)
            self.drift_max = max(float(off.max()), _or_zero(self.drift_max))
        for folds in result.folds:
            self.folds += len(folds)
            for fold in folds:
                self.rho_sum += float(fold.rho.sum())
                self.rho_count += len(fold.rho)
                if fold.agreement is not None:
                    self.agreement_sum += float(fold.agreement)
                    self.agreement_count += 1


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def mean_or_nan(total: float, count: int) -> float:
    """Return a mean; NaN over nothing."""
    return total / count if count else math.nan
