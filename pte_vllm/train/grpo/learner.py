"""One GRPO step on a batch of rollouts: replay, compare with the sampler, learn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.method.keep_marks import marks_of
from pte_vllm.train.grpo.loss import (
    LossStats,
    PolicyLoss,
    ScoredRollout,
    check_drift,
    importance_weights,
)
from pte_vllm.train.grpo.micro_batches import MicroBatch, split
from pte_vllm.train.grpo.seen import Seen, mean_or_nan
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.keeping import Keeper, Marks
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import ReplayResult, TokenLoss
from pte_vllm.train.replay.segments import Backward, replay


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step found in the rollouts that it replayed. A mean over no tokens is NaN.

    Groups whose rewards are all equal teach nothing and are not replayed; where all groups are such
    ones, some rollouts are, for the drift.
    """

    loss: float
    """The loss of the first inner step, before any update."""
    drift: float
    """The mean |Δ log p| between sampler and replay, over tokens of the learner's version."""
    drift_max: float
    drift_p99: float
    """What 99 % of these differences do not exceed: a policy that diverges shows in the tail."""
    drift_tokens: int
    kept_agreement: float
    """How much of what rollouts kept the replay would have kept by itself; NaN if nothing is."""
    importance_mean: float
    importance_max: float
    """Mean and largest importance weight as used, over tokens that carry loss."""
    ratio_mean: float
    ratio_off: float
    """The largest |ratio - 1| over all inner steps."""
    clipped_low: float
    clipped_high: float
    """The shares of tokens whose gradient the clip cut off, below and above."""
    kl: float
    """The estimate k3 of the KL to the reference; NaN without a reference."""
    entropy: float
    """The entropy of the policy, in nats per sampled token."""
    grad_norm: float
    """The gradient's norm in the last inner step, before clipping."""
    rho: float
    """The mean of ‖ΔS‖ / ‖S‖ over folds and layers; NaN without folds."""
    folds: float
    """The mean number of folds of a rollout."""
    trained_tokens: int
    """How many sampled tokens carried loss in the replay."""
    replayed_tokens: int
    """How many tokens were replayed, questions included."""
    seconds: float

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


class Learner:
    """Owns the updates of a model's adapter.

    Args:
        model: the model whose adapter learns.
        optimizer: an optimizer over `model.trainable_parameters()`.
        options: the options of the algorithm.
        temperature: the temperature that rollouts are sampled with.
        max_drift: the largest mean |Δ log p| that is allowed between sampler and replay.
        max_grad_norm: the L2 norm to which gradients are scaled down.
        initial: the reference policy's adapter, if `options.reference` is `initial`.
        keeper: the model's probes, for rollouts that keep tokens by the score `expected`.

    Raises:
        ValueError: if the reference needs `initial` and there is none.
    """

    def __init__(
        self,
        model: PTEModel,
        optimizer: torch.optim.Optimizer,
        options: GrpoOptions,
        *,
        temperature: float = 1.0,
        max_drift: float,
        max_grad_norm: float = 1.0,
        initial: Adapter | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        if options.kl_coef > 0 and options.reference == "initial" and initial is None:
            raise ValueError("reference 'initial' needs the adapter that the run started from")
        self.model, self.optimizer, self.options = model, optimizer, options
        self._temperature = temperature
        self._max_drift = max_drift
        self._max_grad_norm = max_grad_norm
        self._initial, self._keeper = initial, keeper
        self.updating = False
        """Whether a step has begun to change the adapter and has not returned."""

    def step(self, samples: Sequence[ScoredRollout], version: int) -> StepResult:
        """Learn from rollouts: `inner_steps` optimizer steps on all of them.

        Args:
            samples: scored rollouts with advantages, none staler than the options allow.
            version: the version of the adapter that the model now holds.

        Raises:
            ValueError: if a rollout is staler than the bound or was sampled under another rule than
                the adapter's, or there is none.
            DriftError: before anything is changed, if sampler and replay disagree.
            FloatingPointError: before the inner step's update, if its gradient is not finite.
        """
        if not samples:
            raise ValueError("a step needs at least one rollout")
        began, options = time.monotonic(), self.options
        self._check_rules(samples)
        micros = split(samples, options, version=version, device=self.model.device)
        with_kl = options.kl_coef > 0
        idle = [micro for micro in micros if micro.idle and not with_kl]
        active = [micro for micro in micros if not micro.idle or with_kl]
        # What teaches nothing is not replayed, but for a few where there is nothing else: a sampler
        # that drifts must not go on unseen.
        idle = [] if active else idle[:1]
        replayed = [*idle, *active]
        if with_kl:
            with self._reference():
                for micro in active:
                    micro.reference = self._replay(micro).logprobs
        # The first inner step's gradients and what is seen of the rollouts come from one replay:
        # until that step ends, the learner is the old policy.
        seen, stats = Seen(), LossStats()
        for micro in idle:
            seen.add(micro, self._replay(micro, seen))
        losses = [self._gradients(active, stats, seen)]
        check_drift(seen.drift, self._max_drift, version, tokens=seen.drift_tokens)
        norm = self._update(active, done=0)
        for done in range(1, options.inner_steps):
            losses.append(self._gradients(active, stats))
            norm = self._update(active, done)
        weights = torch.cat([self._importance(m)[m.weights > 0] for m in replayed])
        rollouts = [sample.rollout for micro in replayed for sample in micro.samples]
        result = StepResult(
            loss=losses[0],
            drift=seen.drift,
            drift_max=seen.drift_max,
            drift_p99=seen.drift_p99,
            drift_tokens=seen.drift_tokens,
            kept_agreement=mean_or_nan(seen.agreement_sum, seen.agreement_count),
            importance_mean=float(weights.mean()) if len(weights) else math.nan,
            importance_max=float(weights.max()) if len(weights) else math.nan,
            ratio_mean=mean_or_nan(stats.ratio_sum, stats.tokens),
            ratio_off=stats.ratio_off,
            clipped_low=mean_or_nan(stats.clipped_low, stats.tokens),
            clipped_high=mean_or_nan(stats.clipped_high, stats.tokens),
            kl=mean_or_nan(stats.kl_sum, stats.tokens) if with_kl else math.nan,
            entropy=mean_or_nan(seen.entropy_sum, seen.sampled_tokens),
            grad_norm=norm,
            rho=mean_or_nan(seen.rho_sum, seen.rho_count),
            folds=seen.folds / len(rollouts),
            trained_tokens=len(weights),
            replayed_tokens=sum(len(rollout.token_ids) for rollout in rollouts),
            seconds=time.monotonic() - began,
        )
        self.updating = False
        return result

    def _check_rules(self, samples: Sequence[ScoredRollout]) -> None:
        """Refuse rollouts whose folds the replay would not repeat."""
        own = self.model.config.rule if self.model.config is not None else None
        for rollout in (sample.rollout for sample in samples):
            if rollout.rule not in (None, own):
                raise ValueError(
                    f"a rollout of group {rollout.group_id} was sampled under the rule "
                    f"{rollout.rule}, but the adapter that learns has "
                    f"{own or 'no thought state'}: ask for rollouts without update"
                )

    def _replay(
        self, micro: MicroBatch, loss: TokenLoss | None = None, backward: Backward = "none"
    ) -> ReplayResult:
        return replay(
            *(self.model, micro.batch),
            temperature=self._temperature,
            backward=backward,
            loss=loss,
            keeper=self._keeper,
            marks=self._marks(micro),
        )

    def _marks(self, micro: MicroBatch) -> list[Marks] | None:
        """Return what the folds of each rollout kept; None where nothing is kept.

        Raises:
            ValueError: if a record does not fit its plan and the model.
        """
        if not micro.batch.plan.keep_tokens:
            return None
        shape = ModelShape.from_hf(self.model.base.config)
        return [
            marks_of(rollout.kept or (), rollout.plan, shape.num_layers, shape.num_kv_heads)
            for rollout in (sample.rollout for sample in micro.samples)
        ]

    def _importance(self, micro: MicroBatch) -> Tensor:
        assert micro.old is not None
        options = self.options
        return importance_weights(micro.old, micro.sampler, options.is_mode, options.is_cap)

    def _gradients(
        self, micros: Sequence[MicroBatch], stats: LossStats, seen: Seen | None = None
    ) -> float:
        """Compute the gradients of an inner step, in place of those before; returns the loss.

        With `seen` it is the first one, and `seen` is shown what is replayed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in micros:
            policy = PolicyLoss(
                options=self.options,
                advantages=micro.advantages,
                weights=micro.weights,
                sampler=micro.sampler,
                old=micro.old,
                reference=micro.reference,
                stats=stats,
            )
            loss = policy if seen is None else seen.beside(policy)
            result = self._replay(micro, loss, "segments")
            if seen is not None:
                seen.add(micro, result)
            total += result.loss
        return total

    def _update(self, micros: Sequence[MicroBatch], done: int) -> float:
        """Take an optimizer step, after `done` others; returns the norm before clipping."""
        parameters = self.model.trainable_parameters()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if not math.isfinite(norm):
            left = f"as inner step {done} left it" if done else "unchanged"
            raise FloatingPointError(f"the gradient's norm is {norm}; the adapter is {left}")
        if micros:  # without a gradient, momentum alone would still move the adapter
            self.updating = True
            self.optimizer.step()
        return norm

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """Let the model be the reference policy inside the block."""
        if self.options.reference == "base":
            with self.model.adapter_disabled():
                yield
            return
        assert self._initial is not None
        current = self.model.adapter()
        self.model.load_adapter_weights(self._initial)
        try:
            yield
        finally:
            self.model.load_adapter_weights(current)
