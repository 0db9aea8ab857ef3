"""The command that serves an adapter, as a user types it. Standard library only.

It is printed after an adapter was fetched or pulled, and stands in the card that a push writes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pte_vllm.adapter.hashes import CONFIG_FILE, PROBES_FILE
from pte_vllm.method.names import KeepScore
from pte_vllm.method.plan import FoldPlan

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


def allowed_lora_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` of vLLM's that an adapter of this rank fits."""
    return next((allowed for allowed in _LORA_RANKS if allowed >= rank), rank)


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """The plan that an adapter was trained for, as far as a server's flags say it."""

    window_tokens: int
    """`--pte-window`."""
    block_size: int
    """`--block-size`."""
    keep_tokens: int = 0
    """`--pte-keep`."""
    evict_ratio: float = 0.25
    """`--pte-evict-ratio`."""
    keep_score: KeepScore = "expected"
    """`--pte-keep-score`."""

    def __post_init__(self) -> None:
        FoldPlan(pin_tokens=0, **asdict(self))  # a plan that no sequence can have is refused

    @classmethod
    def from_dict(cls, values: Any) -> ServePlan:
        """Read a plan from JSON.

        Raises:
            ValueError: naming the field that is missing, unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError("the plan must be an object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"the plan has an unknown field {unknown[0]}")
        if missing := sorted({"window_tokens", "block_size"} - set(values)):
            raise ValueError(f"the plan lacks {missing[0]}")
        for name in ("window_tokens", "block_size", "keep_tokens"):
            value = values.get(name, 0)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"the plan's {name} must be a whole number, got {value!r}")
        ratio = values.get("evict_ratio", cls.evict_ratio)
        if not isinstance(ratio, int | float) or isinstance(ratio, bool):
            raise ValueError(f"the plan's evict_ratio must be a number, got {ratio!r}")
        return cls(**values)

    def flags(self) -> list[str]:
        """Return the server's flags; those that have their default only where they say much."""
        found = ["--pte-window", str(self.window_tokens)]
        if self.keep_tokens:
            found += ["--pte-keep", str(self.keep_tokens)]
        found += ["--block-size", str(self.block_size)]
        if self.evict_ratio != ServePlan.evict_ratio:
            found += ["--pte-evict-ratio", f"{self.evict_ratio:g}"]
        if self.keep_tokens and self.keep_score != ServePlan.keep_score:
            found += ["--pte-keep-score", self.keep_score]
        return found

    def words(self) -> str:
        """Return the plan in a few words, for a table."""
        kept = f", keep {self.keep_tokens}" if self.keep_tokens else ""
        score = f" by {self.keep_score}" if kept and self.keep_score != "expected" else ""
        return (
            f"window {self.window_tokens}{kept}{score}, blocks of {self.block_size}, "
            f"evict {self.evict_ratio:g}"
        )


DEFAULT_PLAN = ServePlan(window_tokens=1024, block_size=32)
"""What README.md serves with; it stands where an adapter's plan is not known."""


def needed_rank(directory: str | Path) -> int:
    """Return the rank that a server must have room for: of S, or the rows of A if they are more.

    Raises:
        ValueError: if the adapter's config cannot be read.
    """
    file = Path(directory) / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return max(int(config["r"]), int((config.get("pte") or {}).get("global_tokens", 1)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not say the rank: {error!r}") from error


def serve_line(model: str, plan: ServePlan | None, *, rank: int, name: str, path: str) -> str:
    """Return the command in two lines that a shell takes as one.

    Args:
        model: the base model, as `pte-vllm serve` takes it.
        plan: the adapter's plan; None: it is not known, and `DEFAULT_PLAN` stands in.
        rank: what `needed_rank` says.
        name: the adapter's name in requests.
        path: its directory.
    """
    first = ["pte-vllm", "serve", model, *(plan or DEFAULT_PLAN).flags()]
    then = ["--enable-lora", "--max-lora-rank", str(allowed_lora_rank(rank))]
    then += ["--lora-modules", f"{name}={path}"]
    probes = Path(path) / PROBES_FILE
    if plan is not None and plan.keep_tokens and probes.exists():
        # They are the base model's: requests without the adapter may use them too, and the server
        # samples none before it starts.
        then += ["--pte-probes", str(probes)]
    return f"{shlex.join(first)} \\\n    {shlex.join(then)}"
