"""Flags and numbers that several benchmarks read alike. Standard library only."""

from __future__ import annotations

import argparse

from pte_vllm.adapter.defaults import new_features
from pte_vllm.adapter.flags import add_flags
from pte_vllm.method.names import Features


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what the adapters of a benchmark are like."""
    add_flags(parser, only=("rank", "rule", "features"))


def adapter_features(args: argparse.Namespace) -> Features:
    """As given by `--features`, or as a new adapter of the rule has them, its start aligned."""
    return getattr(args, "features", None) or new_features(args.rule)


def parse_tokens(text: str, *, least: int = 1) -> int:
    """Read a number of tokens: `32k` is 32768, `2000` is 2000.

    Raises:
        ValueError: If it is no number, or below `least`.
    """
    number = text.strip().lower()
    factor = 1024 if number.endswith("k") else 1
    digits = number.removesuffix("k")
    if not digits.isdigit() or int(digits) < least:
        raise ValueError(f"{text!r} is no number of tokens such as 2000 or 32k")
    return int(digits) * factor
