"""Options: of the method, stored with an adapter, and of the engine; `requests.py` has a request's.

Standard library only, so that `pte-vllm --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pte_vllm.method.names import (
    FEATURES,
    INITS,
    KEEP_SCORES,
    KEYS,
    NORMALIZES,
    READS,
    RULE_NAMES,
    KeepScore,
)
from pte_vllm.method.option_values import as_int, check_choice
from pte_vllm.method.plan import FoldPlan

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PTEConfig:
    """The choices that the paper leaves open, stored under `"pte"` in `adapter_config.json`."""

    format_version: int = FORMAT_VERSION
    rank: int = 32
    """r, the rows of W_Q, W_K and W_V and the columns of B."""
    global_tokens: int = 32
    """G: rows of the query q_g, rows of A."""
    rule: str = "paper"
    """How folds accumulate: see `method.reference.UPDATE_RULES`."""
    read: str = "key"
    """`key`: A x meets the stored keys, values come out (B Sᵀ A x). `value`: B S A x."""
    normalize: str = "matrix"
    """`matrix`: Frobenius norm √r. `row`: L2 norm 1 for each row."""
    keys: str = "unrotated"
    """Whether RoPE is undone before a key is encoded."""
    features: str = "linear"
    """φ of a key, and of A x when it meets keys: `linear`, or `squared`, number by number."""
    init: str = "aligned"
    """How the adapter was initialised; the engine treats this as a note only."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not supported (this is {FORMAT_VERSION})"
            )
        for name in ("rank", "global_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_choice("rule", self.rule, RULE_NAMES)
        check_choice("read", self.read, READS)
        check_choice("normalize", self.normalize, NORMALIZES)
        check_choice("keys", self.keys, KEYS)
        check_choice("features", self.features, FEATURES)
        check_choice("init", self.init, INITS)
        check_rule_fits(self.rule, self.rank, self.global_tokens)
        if self.read == "value" and self.rank != self.global_tokens:
            raise ValueError(
                f"read value needs global_tokens equal to rank, got {self.global_tokens} "
                f"and {self.rank}"
            )
        if self.features == "squared" and self.read != "key":
            raise ValueError(
                "features squared need read key, as with read value A x meets no keys: "
                "choose features linear"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PTEConfig:
        """Read what is stored under `"pte"`.

        Raises:
            ValueError: If a field is unknown or its value is out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f'unknown fields in "pte": {", ".join(sorted(unknown))}')
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored: all fields, but `features` only where they are not linear.

        Servers from before there was a choice of features refuse the name.
        """
        values = asdict(self)
        if self.features == PTEConfig.features:
            del values["features"]
        return values


def check_rule_fits(rule: str, rank: int, global_tokens: int) -> None:
    """Raise ValueError if a rule solves for a square map and A has not as many rows as the rank."""
    if rule in ("ridge", "delta") and rank != global_tokens:
        raise ValueError(
            f"rule {rule} needs global_tokens equal to rank, got {global_tokens} and {rank}"
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Defaults of a serving engine; travels to every process in vLLM's `additional_config`."""

    window_tokens: int = 1024
    """`--pte-window`: KV room for the thoughts of one sequence; 0 is full attention."""
    evict_ratio: float = 0.25
    """`--pte-evict-ratio`: part of a full window that is folded at once."""
    max_prompt_tokens: int | None = None
    """`--pte-max-prompt-tokens`: bound on pinned tokens; None: only `max_model_len` bounds them."""
    pin_tokens: int | None = None
    """`--pte-pin-tokens`: what a request pins that does not say; None pins its prompt."""
    require_pin_tokens: bool = False
    """`--pte-require-pin-tokens`: refuse a request that folds and does not say what it pins."""
    keep_thoughts: int = 64
    """`--pte-keep-thoughts`: finished requests whose thought states the API still shows."""
    keep_thoughts_mib: int = 256
    """`--pte-keep-thoughts-mib`: most memory for them, in the host's RAM; the oldest leave."""
    reserve_windows: bool = True
    """`--pte-reserve-windows`: start a request only when its whole window fits beside others."""
    keep_tokens: int = 0
    """`--pte-keep`: evicted tokens that each KV head keeps; 0 keeps none."""
    keep_score: KeepScore = "expected"
    """`--pte-keep-score`: by which score of `method.keep` they are chosen."""
    probes: str | None = None
    """`--pte-probes`: the file of probes for the score `expected`; None: there is none."""

    def __post_init__(self) -> None:
        if as_int("--pte-window", self.window_tokens) < 0:
            raise ValueError(f"--pte-window must not be negative, got {self.window_tokens}")
        if not 0.0 < self.evict_ratio < 1.0:
            raise ValueError(f"--pte-evict-ratio must lie in (0, 1), got {self.evict_ratio}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                f"--pte-max-prompt-tokens must be positive, got {self.max_prompt_tokens}"
            )
        if self.pin_tokens is not None:
            self._check_pin_tokens(self.pin_tokens)
        if as_int("--pte-keep", self.keep_tokens) < 0:
            raise ValueError(f"--pte-keep must not be negative, got {self.keep_tokens}")
        check_choice("--pte-keep-score", self.keep_score, KEEP_SCORES)
        for name in ("keep_thoughts", "keep_thoughts_mib"):
            flag, value = f"--pte-{name.replace('_', '-')}", getattr(self, name)
            if as_int(flag, value) < 0:
                raise ValueError(f"{flag} must not be negative, got {value}")

    def _check_pin_tokens(self, pin_tokens: int) -> None:
        if as_int("--pte-pin-tokens", pin_tokens) < 0:
            raise ValueError(f"--pte-pin-tokens must not be negative, got {pin_tokens}")
        limit = self.max_prompt_tokens
        if limit is not None and pin_tokens > limit:
            raise ValueError(
                f"--pte-pin-tokens {pin_tokens} exceeds --pte-max-prompt-tokens {limit}"
            )
        if self.require_pin_tokens:
            raise ValueError("--pte-pin-tokens, --pte-require-pin-tokens: leave one of them out")

    KEY = "pte"  # not annotated, so not a field: the key in `additional_config`

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> EngineConfig | None:
        """Read the engine's options; None where vLLM was started without PTE."""
        additional = getattr(vllm_config, "additional_config", None)
        if not isinstance(additional, Mapping) or cls.KEY not in additional:
            return None
        return cls(**additional[cls.KEY])

    def to_dict(self) -> dict[str, Any]:
        """Return the options as `additional_config["pte"]` carries them."""
        return asdict(self)

    def plan(self, *, pin_tokens: int, block_size: int) -> FoldPlan:
        """Return the plan of a request that pins `pin_tokens` and chooses nothing else."""
        return FoldPlan(
            pin_tokens=pin_tokens,
            window_tokens=self.window_tokens,
            evict_ratio=self.evict_ratio,
            block_size=block_size,
            keep_tokens=self.keep_tokens if self.window_tokens else 0,
            keep_score=self.keep_score,
        )
