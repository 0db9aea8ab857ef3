"""What the scheduler sends to the worker with every step, as attributes of vLLM's output."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PoolReport:
    """The pool after a step was scheduled; rides on the scheduler's output to the worker."""

    usable_blocks: int
    free_blocks: int
    held_blocks: dict[str, int] = field(default_factory=dict)
    """By request: blocks of the pool it holds. Shared prefix blocks count for each holder."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that running and waiting requests use, sorted."""
    errors: tuple[str, ...] = ()
    """What `check_integrity` found wrong."""


@dataclass(frozen=True, kw_only=True)
class SnapshotOrders:
    """What the worker does with thought states in a step, in this order; the keys name them."""

    keep: dict[str, bytes] = field(default_factory=dict)
    """By request that ended: keep its state under this key."""
    restore: dict[str, bytes] = field(default_factory=dict)
    """By new request: start from the state under this key."""
    forget: tuple[bytes, ...] = ()
