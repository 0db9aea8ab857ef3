"""`pte-vllm eval ...`: finds what runs a command. Standard library only until one runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "run": ("pte_vllm.eval.flags", "accuracy under windows, adapters and controls"),
    "thoughts": ("pte_vllm.eval.thoughts", "sample a model's own answers under full attention"),
    "fidelity": ("pte_vllm.eval.fidelity", "how well windows and adapters predict such answers"),
}
"""By name: the module whose `main` takes the arguments after it, and what the command is for."""


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm eval COMMAND ...`; returns the exit status.

    Raises:
        ValueError: if there is no such command.
    """
    if arguments and arguments[0] in _COMMANDS:
        module = importlib.import_module(_COMMANDS[arguments[0]][0])
        status: int = module.main(list(arguments[1:]))
        return status
    if arguments and arguments[-1] in ("-h", "--help"):
        print(_usage())
        return 0
    if not arguments:
        print(_usage(), file=sys.stderr)
        return 2
    raise ValueError(
        f"pte-vllm eval {arguments[0]}: there is no such command, only {', '.join(_COMMANDS)}"
    )


def _usage() -> str:
    lines = "\n".join(f"  {name:<10} {about}" for name, (_, about) in _COMMANDS.items())
    return (
        "usage: pte-vllm eval COMMAND ...\n\n"
        "Measure accuracy and fidelity under a cache budget.\n\n"
        f"commands:\n{lines}\n\n"
        "Each has its own --help."
    )
