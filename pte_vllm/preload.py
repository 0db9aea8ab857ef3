"""Libraries that processes on a CPU load before all others: a faster malloc, Intel's OpenMP.

Standard library only. vLLM's workers are started afresh, so what LD_PRELOAD says when the server
starts is what they get. `pte-vllm bench preload` shows what each does on a machine.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

_SYSTEM = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/*/lib")
VARIABLE = "LD_PRELOAD"


@dataclass(frozen=True, kw_only=True)
class _Library:
    marks: tuple[str, ...]
    """Parts of a file name that show that it, or another that does its work, is preloaded."""
    patterns: tuple[str, ...]
    """Where it may lie, the best first."""
    get: str


LIBRARIES = {
    "tcmalloc": _Library(
        marks=("tcmalloc", "jemalloc", "mimalloc"),
        patterns=tuple(
            f"{directory}/{name}.so*"
            for name in ("libtcmalloc_minimal", "libtcmalloc")
            for directory in _SYSTEM
        ),
        get="apt install libtcmalloc-minimal4",
    ),
    "iomp": _Library(
        marks=("libiomp", "libomp", "libgomp"),
        patterns=(f"{sys.prefix}/lib/libiomp5.so", *(f"{d}/libiomp5.so" for d in _SYSTEM)),
        get="pip install intel-openmp",
    ),
}
DEFAULT = ("tcmalloc",)


def parse_names(text: str) -> tuple[str, ...]:
    """The names in an option such as `tcmalloc,iomp`, or `none`; for argparse."""
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    if unknown := set(names) - set(LIBRARIES):
        raise argparse.ArgumentTypeError(
            f"{min(unknown)!r} is none of {', '.join(LIBRARIES)}; or say none"
        )
    return names


def find(name: str) -> str | None:
    """The file of one of `LIBRARIES` on this machine; None if there is none."""
    patterns = LIBRARIES[name].patterns
    return next((file for pattern in patterns for file in sorted(glob.glob(pattern))), None)


def preload(environ: MutableMapping[str, str], names: Sequence[str] = DEFAULT) -> list[str]:
    """Add libraries to LD_PRELOAD for processes started from now on.

    Args:
        environ: changed in place; what it preloads already stays, and is not doubled.
        names: of `LIBRARIES`.

    Returns:
        What was done, a line for each.
    """
    lines: list[str] = []
    if not sys.platform.startswith("linux"):
        return lines
    for name in names:
        library, given = LIBRARIES[name], environ.get(VARIABLE, "")
        if any(mark in given for mark in library.marks):
            lines.append(f"{name}: {VARIABLE} has it, or its like, already")
            continue
        found = find(name)
        if found is None:
            lines.append(f"{name}: not found ({library.get})")
            continue
        environ[VARIABLE] = f"{found}:{given}" if given else found
        lines.append(f"{name}: preloads {os.path.realpath(found)}")
    return lines
