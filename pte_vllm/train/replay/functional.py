"""Log-probs under a plan as one differentiable function, for trainers that bring their own loss.

`replay` wants the loss of each token; other trainers (TRL's among them) ask for log-probs, compute
a loss from all of them and call `backward`. A loss only needs to say how it changes with each
log-prob, so the forward pass keeps no graph, and the backward pass replays once more with these
derivatives as weights. Memory stays that of `replay`, for one more forward pass.

Shapes: B sequences, `longest` tokens; columns of a result are tokens, not columns of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper, Marks
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay


class TokenScores(NamedTuple):
    """What a replay says of each wanted token, given those before it; 0 elsewhere."""

    logprobs: Tensor  # [B, longest] fp32
    entropies: Tensor  # [B, longest] of the distribution each token came from, in nats


def differentiable_log_probs(
    model: PTEModel,
    batch: AlignedBatch,
    *,
    rule: str | None = None,
    temperature: float = 1.0,
    backward: Literal["segments", "full"] = "segments",
    keeper: Keeper | None = None,
    marks: Sequence[Marks] | None = None,
) -> TokenScores:
    """Compute log-probs and entropies whose gradients reach the model's trainable parameters.

    The parameters must not change between this call and `backward` of what is made of its result:
    the backward pass computes everything again.

    Args:
        rule: the rule to fold by; None: the adapter's.
        temperature: the temperature of the sampler whose log-probs are wanted.
        backward: how gradients flow between segments, as in `replay`.
        keeper: the model's probes, as in `replay`.
        marks: what each sequence is made to keep, as in `replay`.

    Raises:
        ValueError: if an option does not fit the model.
    """
    options = {"rule": rule, "temperature": temperature, "keeper": keeper, "marks": marks}
    parameters = model.trainable_parameters()
    if not torch.is_grad_enabled() or not parameters:
        return _scores(model, batch, options)[0]
    found = _LogProbs.apply(model, batch, options, backward, *parameters)
    return TokenScores(*found)


class _LogProbs(torch.autograd.Function):
    """A replay as one node of the graph.

    Parameters are its inputs, so that autograd asks for their gradients and adds them up itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: PTEModel,
        batch: AlignedBatch,
        options: dict[str, Any],
        backward: Literal["segments", "full"],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        found, marks = _scores(model, batch, options)
        # What was kept is kept again, even if kernels round otherwise where they keep a graph.
        ctx.call = (model, batch, {**options, "marks": marks}, backward)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        model, batch, options, backward = ctx.call
        by_logprob, by_entropy = gradients  # [B, longest]
        # Entropies are mostly asked for to be logged; their gradient costs a softmax more.
        uses_entropy = bool(by_entropy.any())

        def weighted(scores: Scores) -> Tensor:
            at = (scores.rows, scores.tokens)
            loss = (by_logprob[at] * scores.logprobs).sum()
            if uses_entropy:
                loss = loss + (by_entropy[at] * _entropy(scores.logits)).sum()
            return loss

        parameters = model.trainable_parameters()
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            replay(model, batch, backward=backward, loss=weighted, **options)
            found = [parameter.grad for parameter in parameters]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        return (None, None, None, None, *found)


def _scores(
    model: PTEModel, batch: AlignedBatch, options: dict[str, Any]
) -> tuple[TokenScores, list[Marks] | None]:
    """Replay without gradients; returns what was kept as well, if the plan keeps anything."""
    entropies = torch.zeros(
        len(batch.ids), int(batch.lengths.max()), device=model.device, dtype=torch.float32
    )

    def keep(scores: Scores) -> Tensor:
        entropies[scores.rows, scores.tokens] = _entropy(scores.logits)
        return scores.logprobs.new_zeros(())

    result = replay(model, batch, loss=keep, **options)
    kept: list[Marks] = [[fold.marks for fold in folds] for folds in result.folds]
    return TokenScores(result.logprobs, entropies), kept if batch.plan.keep_tokens else None


def _entropy(logits: Tensor) -> Tensor:
    """Compute the entropies `[N]`, in nats, of distributions given as logits `[N, V]`."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
