"""The `pte-vllm` command: finds the module of a command group, and says what went wrong in a line.

Imports the standard library only; each group imports what it needs when one of its commands runs,
so that help and mistakes on the command line are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from pte_vllm import __version__

_COMMANDS = {
    "serve": ("pte_vllm.cli.serve", "start the OpenAI-compatible server"),
    "train": ("pte_vllm.cli.train", "train adapters: grpo, distill, ..."),
    "demo": ("pte_vllm.demo.run", "watch chats with and without a window"),
    "doctor": ("pte_vllm.cli.doctor", "check installation and machine"),
    "bench": ("pte_vllm.cli.bench", "measure speed against vLLM as it is"),
    "eval": ("pte_vllm.cli.eval", "measure accuracy and fidelity under a cache budget"),
    "adapter": ("pte_vllm.cli.adapter", "make or check an adapter"),
    "plan": ("pte_vllm.cli.plan", "what a window buys on given hardware"),
    "model": ("pte_vllm.cli.model", "get a small model to try things with"),
}
"""By name: the module whose `main` takes the arguments after it, and what the command is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] not in _COMMANDS:
            _parser().parse_args(args)  # prints help or version, or says what is wrong, and exits
        module = importlib.import_module(_COMMANDS[args[0]][0])
        return module.main(args[1:]) or 0
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pte-vllm's extras are cpu, cuda, train, eval and demo")
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    if os.environ.get("PTE_TRACEBACK"):
        traceback.print_exc()
    # One line, whatever a library packed into its message.
    print(f"pte-vllm: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm",
        description="Progressive Thought Encoding (arXiv 2602.16839) on vLLM.",
        epilog="PTE_TRACEBACK=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"pte-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, about) in _COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    return parser
