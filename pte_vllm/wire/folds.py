"""A record tells the folds of its sequence, which follow from its plan and its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.plan import FoldPlan

_Count = Annotated[int, Field(ge=0)]
_present = Field(exclude_if=lambda value: value is None)  # a line has one of the two


@dataclass(frozen=True, kw_only=True)
class FoldEvent:
    """Before the token at position `at` was computed, blocks were folded."""

    at: _Count
    blocks: Annotated[tuple[_Count, _Count] | None, _present] = None
    """They are `[first, end)`; None where they are several ranges, or were drawn at random."""
    spans: Annotated[tuple[tuple[_Count, _Count], ...] | None, _present] = None
    """The ranges `[first, end)` in order, where `blocks` is None."""
    rho: Annotated[float, Field(ge=0)] | None = None
    """‖ΔS‖ / ‖S‖, the mean over layers with a state; None without a state, or where it is
    unknown. Records of earlier versions lack it."""


def num_folds(plan: FoldPlan, num_tokens: int) -> int:
    """Return how many folds lie behind the log-probs of a sequence, question included.

    The last token is predicted and never computed, so a boundary at its position does not count.
    """
    return plan.folds(num_tokens - 2)


def fold_events(
    plan: FoldPlan, num_tokens: int, rho: Sequence[float] | None = None
) -> tuple[FoldEvent, ...]:
    """Return the folds that `num_folds` counts, in order.

    Args:
        plan: the sequence's plan.
        num_tokens: its length, question included.
        rho: what was measured at each fold; None where that is unknown.
    """
    held, events = HeldBlocks(plan), []
    for i in range(num_folds(plan, num_tokens)):
        spans = held.fold_to(i + 1)
        where: dict[str, Any] = {"spans": spans}
        if plan.evict == "oldest" and len(spans) == 1:
            where = {"blocks": spans[0]}
        at, value = plan.fold_at(i), None if rho is None else rho[i]
        events.append(FoldEvent(at=at, **where, rho=value))
    return tuple(events)


def rho_of_folds(
    plan: FoldPlan, num_tokens: int, measured: Sequence[float] | None
) -> tuple[float, ...] | None:
    """Return the engine's values for the folds of a sequence; None unless there is one for each.

    The engine may have folded once more, for a token that came after the last of the answer.
    """
    count = num_folds(plan, num_tokens)
    if not count or measured is None or len(measured) < count:
        return None
    return tuple(measured[:count])
