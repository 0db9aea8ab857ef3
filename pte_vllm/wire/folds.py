"""A record tells the folds of its sequence, which follow from its plan and its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pte_vllm.method.plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class FoldEvent:
    """Before the token at position `at` was computed, blocks `[first, end)` were folded."""

    at: Annotated[int, Field(ge=0)]
    blocks: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    rho: Annotated[float, Field(ge=0)] | None = None
    """‖ΔS‖ / ‖S‖, the mean over layers with a state; None without a state, or where it is
    unknown. Records of earlier versions lack it."""


def num_folds(plan: FoldPlan, num_tokens: int) -> int:
    """Return how many folds lie behind the log-probs of a sequence, question included.

    The last token is predicted and never computed, so a boundary at its position does not count.
    """
    return plan.folded_blocks(num_tokens - 2) // plan.evict_blocks


def fold_events(
    plan: FoldPlan, num_tokens: int, rho: Sequence[float] | None = None
) -> tuple[FoldEvent, ...]:
    """Return the folds that `num_folds` counts, in order.

    Args:
        plan: the sequence's plan.
        num_tokens: its length, question included.
        rho: what was measured at each fold; None where that is unknown.
    """
    events: list[FoldEvent] = []
    for start, _ in plan.segments(num_tokens - 1):
        end = plan.pinned_blocks + plan.folded_blocks(start)
        first = events[-1].blocks[1] if events else plan.pinned_blocks
        if end > first:
            value = None if rho is None else rho[len(events)]
            events.append(FoldEvent(at=start, blocks=(first, end), rho=value))
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
