"""What `train experiment thoughts` trains, and under which names. Standard library only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OPTIONS = "options.json"
"""The options that the files of an experiment are made with."""
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"plain": True},
    "global-only": {"rule": "none"},
    "paper": {"rule": "paper"},
    "ridge": {"rule": "ridge", "features": "squared"},
    "delta": {"rule": "delta", "features": "squared"},
}
"""By name, the options of the adapter: LoRA_c, the paper's static and folded states, and ours."""


def adapter_name(arm: str, seed: int) -> str:
    """Return the name of one trained adapter, which is also that of its directory."""
    return f"{arm}-{seed}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


_FIXED = (
    *("model", "task", "questions", "held", "max_tokens", "temperature"),
    *("window", "evict_ratio", "block_size", "rank", "steps", "batch", "lr"),
)
"""What may not change while files are kept; arms, seeds, plain windows and problems may."""


def keep_options(options: argparse.Namespace) -> None:
    """Write what the files below `options.out` are made with, or compare it with what was written.

    Raises:
        ValueError: naming the flag, if the directory holds an experiment with another value.
    """
    path = options.out / OPTIONS
    given = {name: getattr(options, name) for name in _FIXED}
    if not path.exists():
        path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        return
    for name, before in read_json(path).items():
        if given[name] != before:
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {given[name]}, but {options.out} was made with {before}: give that, or "
                "another --out"
            )
