"""Values that options take by name, such as the update rules; imports nothing of the project."""

from __future__ import annotations

from typing import Literal, get_args

RuleName = Literal["paper", "sum", "none", "ridge", "delta"]
Read = Literal["key", "value"]
Normalize = Literal["matrix", "row"]
Keys = Literal["unrotated", "rotated"]
Features = Literal["linear", "squared"]
Evict = Literal["oldest", "random"]
KeepScore = Literal["expected", "random"]
Pin = Literal["prompt", "first_and_last_user"]
Init = Literal["aligned", "aligned_mean", "aligned_key", "random"]

RULE_NAMES: tuple[str, ...] = get_args(RuleName)
READS: tuple[str, ...] = get_args(Read)
NORMALIZES: tuple[str, ...] = get_args(Normalize)
KEYS: tuple[str, ...] = get_args(Keys)
FEATURES: tuple[str, ...] = get_args(Features)
EVICTS: tuple[str, ...] = get_args(Evict)
KEEP_SCORES: tuple[str, ...] = get_args(KeepScore)
PINS: tuple[str, ...] = get_args(Pin)
INITS: tuple[str, ...] = get_args(Init)
