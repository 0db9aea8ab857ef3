"""Trains probes: queries by which a fold chooses what it keeps (`method.keep`).

Sampled probes stand for any later query. Trained ones have seen which tokens later queries did
attend to: layer by layer, apart from all others, the scores of the tokens that left come to be
distributed as their worth is (`future_attention.Future`). For one fold of one KV head

    loss = Σ_c w_c log(w_c / s_c)

with w and s the worth and the score of its candidates, each divided by its sum. Losses are
weighted by what the candidates are worth in all, so that heads that look back count most.

No gradient passes through the choice itself, and none through the model: minutes on two cores.

Letters in shapes: L layers, H KV heads, D head size, n probes, C candidates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.future_attention import Future, look_ahead
from pte_vllm.adapter.probe_scoring import rotated, scale_of
from pte_vllm.method import keep
from pte_vllm.method.plan import FoldPlan

_CANDIDATES = 256
"""Most candidates of a fold that training looks at; of more it draws so many."""
_HELD = 8
"""Most answers that are measured on, and not trained on: a quarter of them at most."""
_TINY = 1e-9


class TooFewAnswers(ValueError):
    """Probes cannot be trained on these answers."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What training found on held-out folds, before and after."""

    loss_before: float
    loss_after: float
    """In nats, as the module says."""
    caught_before: float
    caught_after: float
    """Share of the squared worth of all candidates that the chosen ones have, 1 at best."""
    folds: int
    """Folds that were trained on."""

    def in_words(self) -> str:
        """Return what was found, in a line."""
        return (
            f"probes: of what later tokens attend to, those that are kept have "
            f"{self.caught_after:.3f}, and {self.caught_before:.3f} before training; loss "
            f"{self.loss_after:.4f}, before {self.loss_before:.4f} ({self.folds} folds)"
        )


def train_probes(
    model: Any,
    answers: Sequence[tuple[Sequence[int], FoldPlan]],
    queries: Tensor,
    *,
    steps: int,
    lr: float = 0.05,
    batch_folds: int = 4,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Tensor, ProbeReport]:
    """Train probes on what a model attended to in its own answers.

    Memory: `2 · (D + F + 1) · H · L` bytes a token of all answers, F the folds of its sequence.

    Args:
        model: a transformers causal LM, an adapter switched off.
        answers: token ids, question included, each with the plan under which tokens are kept; in
            some of them a fold must have to choose.
        queries: where to start, `[L, H, n, D]`: sampled probes.
        steps: optimizer steps.
        lr: highest learning rate of Adam, as a share of the root mean square of the queries.
        batch_folds: folds in a step.
        seed: of their order.
        progress: hears what is done, how much of it, and of how much.

    Returns:
        The trained probes, `[L, H, n, D]` fp32 on the host, and what training found.

    Raises:
        TooFewAnswers: if too few of them reach a fold that chooses.
        FloatingPointError: if the loss is not finite.
    """
    futures = []
    for i, (token_ids, plan) in enumerate(answers):
        future = look_ahead(model, token_ids, plan)
        if future is not None:
            futures.append(future)
        progress("reading", i + 1, len(answers))
    if len(futures) < 2:
        raise TooFewAnswers(
            f"{len(futures)} answers are long enough that a fold chooses; training probes takes "
            "two at least, and a hundred to be good: sample more or longer answers, or keep fewer "
            "tokens"
        )
    held = max(1, min(_HELD, len(futures) // 4))
    held_out, futures = futures[:held], futures[held:]
    events = [(future, i) for future in futures for i in range(len(future.folds))]
    scorer = _Scorer(model)
    probes = queries.to(model.device, torch.float32).clone().requires_grad_()
    before = _measure(scorer, probes, held_out)
    rate = lr * float(probes.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([probes], lr=rate, betas=(0.9, 0.99))
    rng, warmup = random.Random(seed), min(20, steps)
    for step in range(steps):
        optimizer.zero_grad()
        for future, i in rng.choices(events, k=batch_folds):
            scores, worth = scorer.of(probes, future, i, rng)
            loss = _loss(scores, worth) / batch_folds
            if not math.isfinite(float(loss.detach())):
                raise FloatingPointError(f"the loss of step {step + 1} is {float(loss.detach())}")
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * (1 - step / steps)
        optimizer.step()
        progress("training", step + 1, steps)
    after = _measure(scorer, probes, held_out)
    return probes.detach().cpu(), ProbeReport(
        loss_before=before[0],
        loss_after=after[0],
        caught_before=before[1],
        caught_after=after[1],
        folds=len(events),
    )


class _Scorer:
    """Scores what left the window before a fold, as the fold scores its candidates."""

    def __init__(self, model: Any) -> None:
        self._model = model
        shape = ModelShape.from_hf(model.config)
        self._scales = [scale_of(model, i, shape) for i in range(shape.num_layers)]

    def of(
        self, probes: Tensor, future: Future, index: int, rng: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log scores and worth of candidates of `future.folds[index]`, each `[L, H, C]`.

        Args:
            probes: `[L, H, n, D]`.
            future: the sequence.
            index: of the fold.
            rng: draws candidates where there are many; None: all count.
        """
        plan, fold = future.plan, future.folds[index]
        device = probes.device
        left = plan.stride * (fold + 1)
        start = plan.first_fold + plan.stride * fold
        newest = start - plan.pinned_blocks * plan.block_size
        places = torch.arange(left)
        if rng is not None and left > _CANDIDATES:
            places = torch.tensor(sorted(rng.sample(range(left), _CANDIDATES)))
        keys = future.keys[:, :, places].to(device).float()
        norms = future.norms[:, :, places].to(device).float()
        window = future.keys[:, :, newest - plan.stride : newest].to(device).float()
        positions = keep.probe_positions(
            torch.tensor([start], device=device),
            probes.shape[2],
            self._model.config.max_position_embeddings,
        )
        scores = [
            log_shares(
                rotated(self._model, probes[i], positions, keys)[0], keys[i], window[i], scale
            )
            for i, scale in enumerate(self._scales)
        ]
        worth = future.worth[:, :, index, places].to(device).float()
        return torch.stack(scores) + norms.clamp(min=_TINY).log(), worth


def log_shares(probes: Tensor, keys: Tensor, newest: Tensor, scale: float) -> Tensor:
    """Return the logarithm of what `keep.expected_scores` has beside the norms, `[*, C]`.

    The arguments are its own. A share may be too small for a number, and a root has no gradient
    there; its logarithm has.
    """
    logits = probes @ keys.mT * scale  # [*, n, C]
    others = probes @ newest.mT * scale  # [*, n, m]
    total = torch.cat((logits, others), -1).logsumexp(-1, keepdim=True)
    squares = 2 * (logits - total)
    return (squares.logsumexp(-2) - math.log(probes.shape[-2])) / 2


def _loss(scores: Tensor, worth: Tensor) -> Tensor:
    """Return the loss of one fold, as the module says, of `[L, H, C]` each, scores as logs."""
    total = worth.sum(-1, keepdim=True)
    wanted = worth / (total + _TINY)
    found = scores.log_softmax(-1)
    losses = (wanted * ((wanted + _TINY).log() - found)).sum(-1)
    weights = total[..., 0]
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def _measure(scorer: _Scorer, probes: Tensor, futures: Sequence[Future]) -> tuple[float, float]:
    """Return the mean loss, and the mean share of squared worth that is chosen."""
    losses, caught = [], []
    for future in futures:
        for i in range(len(future.folds)):
            scores, worth = scorer.of(probes, future, i)
            losses.append(_loss(scores, worth))
            chosen = worth.gather(-1, keep.best(scores, future.plan.keep_tokens))
            total = worth.square().sum(-1)
            caught.append((chosen.square().sum(-1) / (total + _TINY)).mean())
    return float(torch.stack(losses).mean()), float(torch.stack(caught).mean())
