"""Flags that several benchmarks share: what their adapters are like. Standard library only."""

from __future__ import annotations

import argparse

from pte_vllm.adapter.defaults import NEW_RULE, new_features
from pte_vllm.method.names import FEATURES, RULES, Features


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """What the adapters of a benchmark are like."""
    parser.add_argument(
        "--rule", choices=RULES, default=NEW_RULE, help="update rule of the PTE arm"
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default=argparse.SUPPRESS,
        help="of its keys (default: as `pte-vllm adapter init` makes them for the rule)",
    )
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")


def adapter_features(args: argparse.Namespace) -> Features:
    """As given by `--features`, or as a new adapter of the rule has them, its start aligned."""
    return getattr(args, "features", None) or new_features(args.rule)
