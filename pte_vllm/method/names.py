"""Names shared by every part; imports nothing of the project."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Rule = Literal["paper", "sum", "none", "ridge", "delta"]
Read = Literal["key", "value"]
Normalize = Literal["matrix", "row"]
Keys = Literal["unrotated", "rotated"]
Features = Literal["linear", "squared"]
Init = Literal["aligned", "aligned_mean", "aligned_key", "random"]

RULES: tuple[str, ...] = get_args(Rule)
READS: tuple[str, ...] = get_args(Read)
NORMALIZES: tuple[str, ...] = get_args(Normalize)
KEYS: tuple[str, ...] = get_args(Keys)
FEATURES: tuple[str, ...] = get_args(Features)
INITS: tuple[str, ...] = get_args(Init)


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
