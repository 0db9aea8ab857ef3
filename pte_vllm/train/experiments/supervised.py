"""Trains an adapter on answers that are known, and scores it; the experiments share this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pte_vllm.train.distill.examples import Example
from pte_vllm.train.distill.step import accumulate_gradient
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import Backward, replay


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How AdamW is run: the rate rises over the first steps, then falls linearly."""

    steps: int
    learning_rate: float = 3e-3
    warmup_steps: int = 5
    final_fraction: float = 0.1
    max_grad_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of step 1, 2, …"""
        decay = max(self.final_fraction, 1 - step / self.steps)
        return self.learning_rate * min(1.0, step / self.warmup_steps) * decay


def train_answers(
    model: PTEModel,
    next_batch: Callable[[], AlignedBatch],
    schedule: Schedule,
    *,
    backward: Backward = "segments",
    progress: Callable[[int, float], None] | None = None,
    next_text: Callable[[], Sequence[Example]] | None = None,
    keeper: Keeper | None = None,
) -> list[float]:
    """Train on the mean cross-entropy of a batch's wanted tokens; returns it by step.

    Args:
        model: the model whose adapter is trained.
        next_batch: returns the batch of the next step.
        schedule: how many steps are taken, and at what rate.
        backward: how gradients flow between segments, as in `replay`.
        progress: is called with each step and its loss.
        next_text: returns examples of ordinary text, on which the full cache's predictions are
            distilled as well: the KL of `distill.step` is added to the loss, but not to what is
            returned. None: there is no such text.
        keeper: the model's probes; needed where tokens are kept by the score `expected`.
    """
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(1, schedule.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = next_batch()
        count = int(batch.wanted.sum())

        def loss(scores: Scores, count: int = count) -> Tensor:
            return -scores.logprobs.sum() / count

        optimizer.zero_grad(set_to_none=True)
        losses.append(replay(model, batch, backward=backward, loss=loss, keeper=keeper).loss)
        if next_text is not None:
            text = next_text()
            accumulate_gradient(model, text, micro_batch_sequences=len(text), keeper=keeper)
        nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
        optimizer.step()
        if progress is not None:
            progress(step, losses[-1])
    return losses


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """How well all wanted tokens are predicted."""

    accuracy: float
    """Share of tokens for which the right one is the most likely."""
    loss: float
    """Mean negative log-probability of the right token."""


def score_answers(
    model: PTEModel, batches: Iterable[AlignedBatch], *, keeper: Keeper | None = None
) -> AnswerScore:
    """Score known answers, each given the right tokens before it, without gradients.

    Args:
        model: the model, with an adapter or without.
        batches: the answers.
        keeper: the model's probes; needed where tokens are kept by the score `expected`.
    """
    right, lost, count = 0.0, 0.0, 0
    for batch in batches:
        ids = batch.ids.to(model.device)
        left = batch.left.to(model.device)

        def look(scores: Scores, ids: Tensor = ids, left: Tensor = left) -> Tensor:
            nonlocal right, count
            targets = ids[scores.rows, scores.tokens + left[scores.rows]]
            right += float((scores.logits.argmax(-1) == targets).sum())
            count += len(targets)
            return -scores.logprobs.sum()

        lost += replay(model, batch, keeper=keeper, loss=look).loss
    return AnswerScore(accuracy=right / count, loss=lost / count)
