"""The ledger of what we rely on in vLLM, `hooks.toml`, and the check that it still holds.

    python -m pte_vllm.compat.hooks --refresh      (or: make hooks)

writes the hashes of the installed vLLM; do so once what changed has been read. Needs neither torch
nor vLLM to be importable: see `upstream.py`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pte_vllm.compat.upstream import SourceTree, normalise, source_sha256

LEDGER = Path(__file__).with_name("hooks.toml")
DIGITS = 16
"""Of the SHA-256, kept in the ledger: it guards against change, not against an attack."""
_ENTRY = re.compile(r'"(?P<name>[\w.]+)" = \{ sha = "(?P<sha>\w*)", ')
_SECTION = re.compile(r'\["(?P<module>[\w.]+)"\]')


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One symbol of vLLM that our code relies on."""

    symbol: str
    sha: str
    by: str
    """Our module, below `pte_vllm`."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A symbol whose source is not what the ledger says."""

    hook: Hook
    missing: str | None = None
    """What was not found; None: it is there, and differs."""

    def __str__(self) -> str:
        what = f"is gone ({self.missing})" if self.missing else "has changed"
        return f"{self.hook.symbol} {what}; pte_vllm.{self.hook.by} relies on it: {self.hook.why}"


@cache
def load_hooks() -> tuple[Hook, ...]:
    """The ledger, in its order."""
    with LEDGER.open("rb") as file:
        modules = tomllib.load(file)
    return tuple(
        Hook(symbol=f"{module}.{name}", **entry)
        for module, entries in modules.items()
        for name, entry in entries.items()
    )


def check_hooks(tree: SourceTree, hooks: Sequence[Hook] | None = None) -> list[Drift]:
    """Every hook whose source in `tree` differs from the ledger, or is gone."""
    found = []
    for hook in load_hooks() if hooks is None else hooks:
        try:
            if _sha(tree, hook.symbol) != hook.sha:
                found.append(Drift(hook=hook))
        except LookupError as error:
            found.append(Drift(hook=hook, missing=str(error)))
    return found


def diff(symbol: str, before: SourceTree, after: SourceTree) -> str:
    """What changed in a symbol that both trees have; comments and docstrings aside."""
    old, new = (normalise(tree.source(symbol)).splitlines() for tree in (before, after))
    lines = difflib.unified_diff(old, new, symbol, symbol, lineterm="", n=2)
    return "\n".join(lines)


def refresh(tree: SourceTree, ledger: Path = LEDGER) -> list[str]:
    """Write the hashes of `tree` into the ledger; returns the symbols whose hash changed.

    Raises:
        LookupError: if a symbol is gone: the ledger, and what relies on it, must change by hand.
    """
    lines, module, changed = ledger.read_text(encoding="utf-8").splitlines(), "", []
    for i, line in enumerate(lines):
        if section := _SECTION.match(line):
            module = section["module"]
        elif entry := _ENTRY.match(line):
            symbol = f"{module}.{entry['name']}"
            sha = _sha(tree, symbol)
            if sha != entry["sha"]:
                changed.append(symbol)
                lines[i] = line[: entry.start("sha")] + sha + line[entry.end("sha") :]
    ledger.write_text("\n".join(lines) + "\n", encoding="utf-8")
    load_hooks.cache_clear()
    return changed


def _sha(tree: SourceTree, symbol: str) -> str:
    return source_sha256(tree.source(symbol))[:DIGITS]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pte_vllm.compat.hooks", description="Ledger of hooks"
    )
    parser.add_argument(
        "--refresh",
        action="store_true",
        required=True,
        help="write the hashes of the installed vLLM into hooks.toml",
    )
    parser.parse_args(argv)
    try:
        changed = refresh(SourceTree.installed())
    except LookupError as error:
        print(f"hooks: {error}; the ledger was left as it is", file=sys.stderr)
        return 1
    for symbol in changed:
        print(symbol)
    print(f"hooks: {len(changed)} of {len(load_hooks())} changed in {LEDGER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
