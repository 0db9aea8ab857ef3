"""What the scheduler sends to the worker with every step, as attributes of vLLM's output."""

from __future__ import annotations

from dataclasses import dataclass, field

from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class SequenceStart:
    """How a sequence folds; sent when it starts, and when it starts over after a preemption."""

    plan: FoldPlan
    rule: str | None = None
    """The update rule that the request chose; None: the adapter's."""
    kept: KeptRecord = ()
    """What its first folds have to keep, as an earlier run recorded it."""
    return_kept: bool = False
    """Whether to remember what it kept when it has ended."""


@dataclass(frozen=True, kw_only=True)
class PoolReport:
    """The pool after a step was scheduled; rides on the scheduler's output to the worker."""

    usable_blocks: int
    free_blocks: int
    held_blocks: dict[str, int] = field(default_factory=dict)
    """How many blocks each request holds; shared prefix blocks count for each holder."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that running and waiting requests use, sorted."""
    errors: tuple[str, ...] = ()
    """What `check_integrity` found wrong."""


@dataclass(frozen=True, kw_only=True)
class SnapshotOrders:
    """What the worker does with thought states in a step, in the order of the fields."""

    keep: dict[str, bytes] = field(default_factory=dict)
    """The requests that ended, and the key under which the state of each is kept."""
    restore: dict[str, bytes] = field(default_factory=dict)
    """The new requests that start from a kept state, and its key."""
    forget: tuple[bytes, ...] = ()
    """The keys of kept states that can go."""
