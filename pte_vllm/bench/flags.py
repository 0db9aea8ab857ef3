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


def parse_tokens(text: str, *, flag: str, least: int = 1) -> int:
    """Read a number of tokens: `32k` is 32768, `2000` is 2000.

    Raises:
        ValueError: If it is no number, or below `least`; the message names the flag.
    """
    number = text.strip().lower()
    digits = number.removesuffix("k")
    if not digits.isdecimal():
        raise ValueError(f"{flag}: {text!r} is no number of tokens such as 2000 or 32k")
    if int(digits) < least:
        raise ValueError(f"{flag} must be at least {least}, got {text}")
    return int(digits) * (1024 if number.endswith("k") else 1)


def parse_token_list(text: str, *, flag: str, least: int = 1) -> list[int]:
    """Read numbers of tokens between commas; one that is repeated appears once.

    Raises:
        ValueError: As `parse_tokens`.
    """
    numbers = (parse_tokens(part, flag=flag, least=least) for part in text.split(","))
    return list(dict.fromkeys(numbers))
