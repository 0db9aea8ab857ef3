"""What `train experiment thoughts` trains, and under which names. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "lora": {"plain": True},
    "global-only": {"rule": "none"},
    "paper": {"rule": "paper"},
    "ridge": {"rule": "ridge", "features": "squared"},
    "delta": {"rule": "delta", "features": "squared"},
}
"""By name, the options of the adapter: LoRA_c, the paper's static and folded states, and ours."""


def adapter_name(arm: str, seed: int, seeds: Sequence[int]) -> str:
    """Return the name of one trained adapter; the seed is in it where there are several."""
    return arm if len(seeds) == 1 else f"{arm}-{seed}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
