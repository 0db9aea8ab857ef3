"""Flags that several benchmarks share: what their adapters are like. Standard library only."""

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
