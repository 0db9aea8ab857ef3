"""How well a student predicts each token beside its teacher, without a gradient.

Measurements are made of this: those of a distillation, and those of `pte-vllm eval fidelity`.

Shapes: B sequences, `longest` tokens, N tokens that are scored at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill.teacher import Teacher
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay

_COMPARED_AT_ONCE = 128
"""Tokens whose distributions are compared at once: two of a large vocabulary fit into caches."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a student makes of each token that the teacher was asked for; 0 for all others."""

    logprobs: Tensor  # [B, longest] fp32 of the tokens themselves
    kls: Tensor  # [B, longest] fp32 KL(teacher ‖ student), in nats
    same_top: Tensor  # [B, longest] bool: both hold the same token for the most probable one


@torch.no_grad()
def compare(
    model: PTEModel,
    sequences: Sequence[Sequence[int]],
    plans: Sequence[FoldPlan],
    teacher: Teacher,
    *,
    rule: str | None = None,
    same_weights: bool = False,
    keeper: Keeper | None = None,
) -> Agreement:
    """Replay sequences under a student's plans, and compare it with the teacher token by token.

    Args:
        model: the student; its base is the teacher's.
        sequences: the token ids that the teacher was asked about, in the same order.
        plans: the student's plan of each; those that differ in more than `pin_tokens` are replayed
            apart.
        teacher: what full attention says; it says which tokens are compared, whatever the plans.
        rule: the rule to fold by; None: the adapter's.
        same_weights: whether the student is the base model itself, its adapter off. Until its first
            fold it then says what the teacher says, whose KV cache is taken over if it has one.
        keeper: the model's probes, for plans that keep tokens by the score `expected`.

    Raises:
        ValueError: if an option does not fit the model.
    """
    wanted = (teacher.index >= 0).cpu()
    device = teacher.index.device
    logprobs = torch.zeros(wanted.shape, device=device)
    kls = torch.zeros(wanted.shape, device=device)
    same_top = torch.zeros(wanted.shape, dtype=torch.bool, device=device)
    for rows in _alike(plans):
        own = torch.tensor(rows, device=device)

        def look(scores: Scores, own: Tensor = own) -> Tensor:
            for first in range(0, len(scores.rows), _COMPARED_AT_ONCE):
                part = slice(first, first + _COMPARED_AT_ONCE)
                some = Scores(
                    logits=scores.logits[part],
                    logprobs=scores.logprobs[part],
                    rows=own[scores.rows[part]],
                    tokens=scores.tokens[part],
                )
                at = (some.rows, some.tokens)
                logprobs[at], kls[at] = some.logprobs, teacher.kl(some)
                same_top[at] = some.logits.argmax(-1) == teacher.best[teacher.index[at]]
            return scores.logprobs.new_zeros(())

        batch = AlignedBatch.align(
            [sequences[b] for b in rows],
            [plans[b] for b in rows],
            [wanted[b, : len(sequences[b])].tolist() for b in rows],
        )
        known = None
        if same_weights and teacher.cache is not None and batch.plan.bounded:
            first = min(batch.plan.first_fold, batch.ids.shape[1])
            known = teacher.cache.shifted(rows, batch.left.tolist(), first)
            for b in rows:
                before = slice(0, plans[b].first_fold + 1)
                logprobs[b, before] = teacher.logprobs[b, before]
                same_top[b, before] = teacher.index[b, before] >= 0
        replay(model, batch, loss=look, rule=rule, before_fold=known, keeper=keeper)
    return Agreement(logprobs=logprobs, kls=kls, same_top=same_top)


def _alike(plans: Sequence[FoldPlan]) -> list[list[int]]:
    """Group the indices of plans that may share a batch."""
    groups: dict[FoldPlan, list[int]] = {}
    for b, plan in enumerate(plans):
        groups.setdefault(replace(plan, pin_tokens=0), []).append(b)
    return list(groups.values())
