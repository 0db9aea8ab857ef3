"""The ledger of what we rely on in vLLM, `hooks.toml`, and the check that it still holds.

    python -m pte_vllm.compat.hooks --refresh      (or: make hooks)
    python -m pte_vllm.compat.hooks --refresh --vllm-source DIR

writes the hashes of the installed vLLM, or of another one that is supported; do so once what
changed has been read. Needs neither torch nor vLLM to be importable: see `upstream.py`.

`hooks.toml` is of the version that all tests run on. For every other one `hooks-VERSION.toml` has a
hash of each symbol, and where those are that have moved.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pte_vllm.compat.upstream import SourceTree, normalise, source_sha256
from pte_vllm.compat.versions import MAIN, SUPPORTED, base, in_words

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
    at: str | None = None
    """Where another version has it; None: under the same name."""


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
def load_hooks(version: str = MAIN) -> tuple[Hook, ...]:
    """The ledger of a supported version, in its order.

    Raises:
        LookupError: if a symbol has no hash for another version: what is new in the ledger was not
            read there.
    """
    if version != MAIN:
        with ledger_of(version).open("rb") as file:
            found = tomllib.load(file)
        return tuple(
            replace(hook, sha=found["sha"][hook.symbol], at=found["moved"].get(hook.symbol))
            for hook in load_hooks()
        )
    with LEDGER.open("rb") as file:
        modules = tomllib.load(file)
    return tuple(
        Hook(symbol=f"{module}.{name}", **entry)
        for module, entries in modules.items()
        for name, entry in entries.items()
    )


def check_hooks(tree: SourceTree, hooks: Sequence[Hook] | None = None) -> list[Drift]:
    """Every hook whose source in `tree` differs from the ledger of its version, or is gone.

    A version that is not supported is held against the main one.
    """
    found = []
    if hooks is None:
        version = base(tree.version() or MAIN)
        hooks = load_hooks(version) if version in SUPPORTED else load_hooks()
    for hook in hooks:
        try:
            if _sha(tree, hook.at or hook.symbol) != hook.sha:
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


def refresh_other(tree: SourceTree, version: str) -> list[str]:
    """Write the ledger of another supported version; returns the symbols that differ from the main.

    Raises:
        LookupError: if a symbol is gone: what has moved is said by hand, under `[moved]`.
    """
    file = ledger_of(version)
    moved = tomllib.loads(file.read_text())["moved"] if file.is_file() else {}
    shas = {h.symbol: _sha(tree, moved.get(h.symbol, h.symbol)) for h in load_hooks()}
    tables = {"moved": moved, "sha": shas}
    text = f"# Of vLLM {version}: written by `python -m pte_vllm.compat.hooks --refresh`.\n"
    for name, table in tables.items():
        text += f"\n[{name}]\n" + "".join(f'"{key}" = "{to}"\n' for key, to in table.items())
    file.write_text(text, encoding="utf-8")
    load_hooks.cache_clear()
    return [hook.symbol for hook in load_hooks() if shas[hook.symbol] != hook.sha]


def ledger_of(version: str) -> Path:
    """The file of another supported version."""
    return LEDGER.with_name(f"hooks-{version}.toml")


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
    parser.add_argument(
        "--vllm-source", metavar="DIR", help="of another supported version, into its own ledger"
    )
    args = parser.parse_args(argv)
    try:
        tree = SourceTree.of(args.vllm_source) if args.vllm_source else SourceTree.installed()
        version = base(tree.version() or MAIN)
        if version not in SUPPORTED:
            raise LookupError(f"vLLM {version} is not supported, only {in_words()}")
        other = version != MAIN
        changed = refresh_other(tree, version) if other else refresh(tree)
    except LookupError as error:
        print(f"hooks: {error}; the ledger was left as it is", file=sys.stderr)
        return 1
    for symbol in changed:
        print(symbol)
    what = f"differ in {ledger_of(version)}" if other else f"changed in {LEDGER}"
    print(f"hooks: {len(changed)} of {len(load_hooks())} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
