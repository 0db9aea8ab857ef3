"""Finds the command of a group, such as `pte-vllm train` or `eval`. Standard library only.

Each command imports what it needs when it runs: help and mistakes do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Run = Callable[[Sequence[str]], int]
"""Takes the arguments after a command's words; returns the exit status."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Commands that share their first word."""

    name: str
    """That word."""
    about: str
    """What its help says above the commands."""
    commands: Mapping[tuple[str, ...], tuple[Run, str]]
    """By the words of a command: what runs it, and what it is for."""
    epilog: str = "Each has its own --help."

    def main(self, arguments: Sequence[str]) -> int:
        """Run the command that the arguments begin with; returns the exit status.

        Raises:
            ValueError: if there is no such command.
        """
        words = tuple(arguments)
        for command, (run, _) in self.commands.items():
            if words[: len(command)] == command:
                return run(words[len(command) :])
        if words and words[-1] in ("-h", "--help"):
            print(self.usage())
            return 0
        if not words:
            print(self.usage(), file=sys.stderr)
            return 2
        longer = {command[0] for command in self.commands if len(command) > 1}
        given = " ".join(words[:2] if words[0] in longer else words[:1])
        names = ", ".join(" ".join(command) for command in self.commands)
        raise ValueError(f"pte-vllm {self.name} {given}: there is no such command, only {names}")

    def usage(self) -> str:
        """Return what `--help` prints."""
        width = max(len(" ".join(command)) for command in self.commands)
        lines = [f"  {' '.join(c):<{width}} {about}" for c, (_, about) in self.commands.items()]
        return (
            f"usage: pte-vllm {self.name} COMMAND ...\n\n{self.about}\n\ncommands:\n"
            + "\n".join(lines)
            + f"\n\n{self.epilog}"
        )


def later(module: str) -> Run:
    """Return a function that imports a module when the command runs, and calls its `main`."""

    def run(arguments: Sequence[str]) -> int:
        status: int = importlib.import_module(module).main(list(arguments))
        return status

    return run
