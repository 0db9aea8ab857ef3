"""The versions of vLLM that this package runs with. Standard library only."""

from __future__ import annotations

MAIN = "0.32.0"
"""All tests run on this one; `hooks.toml` has its hashes."""
SUPPORTED = (MAIN, "0.33.0")
"""Of the others `hooks-VERSION.toml` has the hashes."""


def base(version: str) -> str:
    """Return a version without what a build appends, such as `+cpu`."""
    return version.split("+")[0]


def in_words() -> str:
    """Return the supported versions as a sentence names them."""
    return " or ".join(SUPPORTED)
