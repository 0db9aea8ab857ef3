"""Options: of the method (stored with an adapter), of the engine, and of one request.

Standard library only, so that `pte-vllm --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pte_vllm.method.names import FEATURES, INITS, KEYS, NORMALIZES, READS, RULE_NAMES
from pte_vllm.method.plan import FoldPlan

FORMAT_VERSION = 1


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def _as_int(option: str, value: object) -> int:
    """An integer option; HTTP clients also send 128.0 and "128"."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{option} must be an integer, got {value!r}")
    return value


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
        _check_choice("rule", self.rule, RULE_NAMES)
        _check_choice("read", self.read, READS)
        _check_choice("normalize", self.normalize, NORMALIZES)
        _check_choice("keys", self.keys, KEYS)
        _check_choice("features", self.features, FEATURES)
        _check_choice("init", self.init, INITS)
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

    def __post_init__(self) -> None:
        if _as_int("--pte-window", self.window_tokens) < 0:
            raise ValueError(f"--pte-window must not be negative, got {self.window_tokens}")
        if not 0.0 < self.evict_ratio < 1.0:
            raise ValueError(f"--pte-evict-ratio must lie in (0, 1), got {self.evict_ratio}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                f"--pte-max-prompt-tokens must be positive, got {self.max_prompt_tokens}"
            )
        if self.pin_tokens is not None:
            self._check_pin_tokens(self.pin_tokens)
        for name in ("keep_thoughts", "keep_thoughts_mib"):
            flag, value = f"--pte-{name.replace('_', '-')}", getattr(self, name)
            if _as_int(flag, value) < 0:
                raise ValueError(f"{flag} must not be negative, got {value}")

    def _check_pin_tokens(self, pin_tokens: int) -> None:
        if _as_int("--pte-pin-tokens", pin_tokens) < 0:
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
        )


REQUEST_OPTIONS = ("pte_window", "pte_pin_tokens", "pte_update", "pte_state_id")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of one request, sent in `vllm_xargs` (`SamplingParams.extra_args`)."""

    window_tokens: int | None = None
    """`pte_window` sets it; None is the engine's window, 0 is unbounded."""
    pin_tokens: int | None = None
    """`pte_pin_tokens` sets it; None is the engine's default, which is the whole prompt."""
    rule: str | None = None
    """`pte_update` sets it; None is the adapter's rule."""
    state_id: str | None = None
    """`pte_state_id` names an earlier request to continue; the API server resolves it."""

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """Read the options of a request.

        Raises:
            ValueError: On an unknown option that starts with `pte_`, or a value of the wrong kind.
        """
        given = {k: v for k, v in (extra_args or {}).items() if k.startswith("pte_")}
        unknown = sorted(set(given) - set(REQUEST_OPTIONS))
        if unknown:
            raise ValueError(
                f"unknown option {unknown[0]!r}; PTE options are {', '.join(REQUEST_OPTIONS)}"
            )
        options: dict[str, Any] = {}
        if given.get("pte_window") is not None:
            options["window_tokens"] = _as_int("pte_window", given["pte_window"])
            if options["window_tokens"] < 0:
                raise ValueError(f"pte_window must not be negative, got {given['pte_window']}")
        if given.get("pte_pin_tokens") is not None:
            options["pin_tokens"] = _as_int("pte_pin_tokens", given["pte_pin_tokens"])
            if options["pin_tokens"] < 0:
                raise ValueError(
                    f"pte_pin_tokens must not be negative, got {given['pte_pin_tokens']}"
                )
        if given.get("pte_update") is not None:
            _check_choice("pte_update", given["pte_update"], RULE_NAMES)
            options["rule"] = given["pte_update"]
        if given.get("pte_state_id") is not None:
            state_id = given["pte_state_id"]
            if not isinstance(state_id, str) or not 0 < len(state_id) <= 512:
                raise ValueError(f"pte_state_id must be the id of a response, got {state_id!r:.99}")
            options["state_id"] = state_id
        return cls(**options)

    @classmethod
    def of(cls, params: Any) -> RequestOptions:
        """Read the options of a request from its SamplingParams; None (pooling) is unbounded."""
        return cls(window_tokens=0) if params is None else cls.parse(params.extra_args)

    def to_args(self) -> dict[str, Any]:
        """Return the options in the form that `parse` reads, without `pte_state_id`."""
        given = {
            "pte_window": self.window_tokens,
            "pte_pin_tokens": self.pin_tokens,
            "pte_update": self.rule,
        }
        return {name: value for name, value in given.items() if value is not None}

    def plan(self, engine: EngineConfig, *, num_prompt_tokens: int, block_size: int) -> FoldPlan:
        """Return the plan of a request with these options.

        Args:
            engine: The engine's defaults and bounds.
            num_prompt_tokens: The number of tokens of its prompt.
            block_size: The number of tokens in a block of the KV cache.

        Raises:
            ValueError: If the pinned part exceeds the prompt or the engine's bound, or the window
                does not fit the block size.
        """
        # The engine's number holds for prompts of any length, so that a sequence has the same plan
        # whatever part of it comes as a prompt.
        default = num_prompt_tokens if engine.pin_tokens is None else engine.pin_tokens
        pin_tokens = default if self.pin_tokens is None else self.pin_tokens
        if pin_tokens > max(num_prompt_tokens, engine.pin_tokens or 0):
            raise ValueError(
                f"pte_pin_tokens is {pin_tokens}, beyond the prompt of {num_prompt_tokens} tokens"
            )
        window_tokens = engine.window_tokens if self.window_tokens is None else self.window_tokens
        try:
            plan = FoldPlan(
                pin_tokens=pin_tokens,
                window_tokens=window_tokens,
                evict_ratio=engine.evict_ratio,
                block_size=block_size,
            )
        except ValueError as error:
            raise ValueError(f"pte_window: {error}") from error
        limit = engine.max_prompt_tokens
        if plan.bounded and limit is not None and pin_tokens > limit:
            raise ValueError(
                f"{pin_tokens} pinned tokens exceed this server's --pte-max-prompt-tokens {limit}; "
                "send a smaller pte_pin_tokens, so that the rest of the prompt counts as thoughts"
            )
        return plan


def request_plan(
    engine: EngineConfig, params: Any, num_prompt_tokens: int, block_size: int
) -> FoldPlan:
    """Return the plan of a request, the same in every process; see `RequestOptions.plan`.

    Raises:
        ValueError: If an option is unknown, or does not fit the prompt or the engine.
    """
    options = RequestOptions.of(params)
    return options.plan(engine, num_prompt_tokens=num_prompt_tokens, block_size=block_size)
