"""What `train experiment thoughts` trains, and under which names. Standard library only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIONS = "options.json"
"""The options that the files of an experiment are made with."""


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """One memory that is trained."""

    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Options of the adapter, as `[adapter]` of a training run has them."""
    keeps: bool = False
    """Whether it keeps evicted tokens, in training and in use."""
    trains_probes: bool = False
    """Whether its probes are trained before anything else."""
    trains_weights: bool = True
    """Whether the adapter is distilled; else its B stays 0, and only the probes are its own."""


_PLAIN: dict[str, Any] = {"plain": True}
_RIDGE: dict[str, Any] = {"rule": "ridge", "features": "squared"}
ARMS: dict[str, TrainedArm] = {
    "lora": TrainedArm(adapter=_PLAIN),
    "global-only": TrainedArm(adapter={"rule": "none"}),
    "paper": TrainedArm(adapter={"rule": "paper"}),
    "ridge": TrainedArm(adapter=_RIDGE),
    "delta": TrainedArm(adapter={"rule": "delta", "features": "squared"}),
    "keep-probes": TrainedArm(adapter=_PLAIN, keeps=True, trains_probes=True, trains_weights=False),
    "keep-lora": TrainedArm(adapter=_PLAIN, keeps=True, trains_probes=True),
    "keep-global-only": TrainedArm(adapter={"rule": "none"}, keeps=True, trains_probes=True),
    "keep-paper": TrainedArm(adapter={"rule": "paper"}, keeps=True, trains_probes=True),
    "keep-ridge": TrainedArm(adapter=_RIDGE, keeps=True, trains_probes=True),
}
"""By name: LoRA_c, the paper's static and folded states, ours, and these beside kept tokens."""
DEFAULT_ARMS = ("lora", "ridge", "keep-probes", "keep-lora", "keep-ridge")


def adapter_name(arm: str, seed: int) -> str:
    """Return the name of one trained adapter, which is also that of its directory."""
    return f"{arm}-{seed}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


_FIXED = (
    *("model", "task", "questions", "held", "max_tokens", "temperature"),
    *("window", "keep", "evict_ratio", "block_size", "rank", "targets", "steps"),
    *("num_probes", "probe_steps", "batch", "lr", "dtype"),
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
        if given.get(name) != before:
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {given.get(name)}, but {options.out} was made with {before}: give "
                "that, or another --out"
            )
