"""Options of one request, and the plan that follows from them and from the engine's defaults.

Standard library only, as `options.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pte_vllm.method.kept_record import KeptRecord, record_from_json, record_to_json
from pte_vllm.method.names import EVICTS, KEEP_SCORES, PINS, RULE_NAMES, Evict, KeepScore, Pin
from pte_vllm.method.option_values import as_bool, as_int, as_name, as_spans, check_choice
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans

REQUEST_OPTIONS = (
    "pte_window",
    "pte_pin",
    "pte_pin_tokens",
    "pte_pin_spans",
    "pte_update",
    "pte_evict",
    "pte_evict_seed",
    "pte_keep",
    "pte_keep_score",
    "pte_kept",
    "pte_return_kept",
    "pte_record",
    "pte_state_id",
)

LOGPROBS_MODE = "processed_logprobs"
"""vLLM's `--logprobs-mode` under which log-probs are those of the sampled distribution."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of one request, sent in `vllm_xargs` (`SamplingParams.extra_args`)."""

    window_tokens: int | None = None
    """`pte_window` sets it; None is the engine's window, 0 is unbounded."""
    pin: Pin | None = None
    """`pte_pin` sets it: what is pinned in words; the API server turns it into numbers."""
    pin_tokens: int | None = None
    """`pte_pin_tokens` sets it; None is the engine's default, which is the whole prompt."""
    pin_spans: Spans = ()
    """`pte_pin_spans` sets it: later questions, each pinned until the next one begins."""
    rule: str | None = None
    """`pte_update` sets it; None is the adapter's rule."""
    evict: Evict | None = None
    """`pte_evict` sets it; None is `oldest`."""
    evict_seed: int | None = None
    """`pte_evict_seed` sets it; None is 0."""
    keep_tokens: int | None = None
    """`pte_keep` sets it; None is the engine's number, 0 keeps nothing."""
    keep_score: KeepScore | None = None
    """`pte_keep_score` sets it; None is the engine's."""
    kept: KeptRecord = ()
    """`pte_kept` sets it: what the first folds have to keep, as an earlier run recorded it."""
    return_kept: bool = False
    """`pte_return_kept` sets it: the engine remembers what was kept until it is asked for it."""
    record: str | None = None
    """`pte_record` sets it: the name under which the API server keeps a record of the answer."""
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
            options["window_tokens"] = as_int("pte_window", given["pte_window"])
            if options["window_tokens"] < 0:
                raise ValueError(f"pte_window must not be negative, got {given['pte_window']}")
        if given.get("pte_pin") is not None:
            check_choice("pte_pin", given["pte_pin"], PINS)
            options["pin"] = given["pte_pin"]
        if given.get("pte_pin_tokens") is not None:
            options["pin_tokens"] = as_int("pte_pin_tokens", given["pte_pin_tokens"])
            if options["pin_tokens"] < 0:
                raise ValueError(
                    f"pte_pin_tokens must not be negative, got {given['pte_pin_tokens']}"
                )
        if given.get("pte_pin_spans") is not None:
            options["pin_spans"] = as_spans(given["pte_pin_spans"])
        if given.get("pte_update") is not None:
            check_choice("pte_update", given["pte_update"], RULE_NAMES)
            options["rule"] = given["pte_update"]
        if given.get("pte_evict") is not None:
            check_choice("pte_evict", given["pte_evict"], EVICTS)
            options["evict"] = given["pte_evict"]
        if given.get("pte_evict_seed") is not None:
            seed = options["evict_seed"] = as_int("pte_evict_seed", given["pte_evict_seed"])
            if not 0 <= seed < 2**63:
                raise ValueError(f"pte_evict_seed must lie in [0, 2**63), got {seed}")
        if given.get("pte_keep") is not None:
            options["keep_tokens"] = as_int("pte_keep", given["pte_keep"])
            if options["keep_tokens"] < 0:
                raise ValueError(f"pte_keep must not be negative, got {given['pte_keep']}")
        if given.get("pte_keep_score") is not None:
            check_choice("pte_keep_score", given["pte_keep_score"], KEEP_SCORES)
            options["keep_score"] = given["pte_keep_score"]
        if given.get("pte_kept") is not None:
            kept = given["pte_kept"]
            if isinstance(kept, str):  # of a header
                kept = [entry.strip() for entry in kept.split(",")]
            try:
                options["kept"] = record_from_json(kept)
            except ValueError as error:
                raise ValueError(f"pte_kept: {error}") from error
        if given.get("pte_return_kept") is not None:
            options["return_kept"] = as_bool("pte_return_kept", given["pte_return_kept"])
        if given.get("pte_record") is not None:
            options["record"] = as_name("pte_record", given["pte_record"])
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
        """Return the options as `parse` reads them, without `pte_pin` and `pte_state_id`."""
        given = {
            "pte_window": self.window_tokens,
            "pte_pin_tokens": self.pin_tokens,
            "pte_pin_spans": list(map(list, self.pin_spans)) or None,
            "pte_update": self.rule,
            "pte_evict": self.evict,
            "pte_evict_seed": self.evict_seed,
            "pte_keep": self.keep_tokens,
            "pte_keep_score": self.keep_score,
            "pte_kept": record_to_json(self.kept) or None,
            "pte_return_kept": self.return_kept or None,
            "pte_record": self.record,
        }
        return {name: value for name, value in given.items() if value is not None}

    def plan(self, engine: EngineConfig, *, num_prompt_tokens: int, block_size: int) -> FoldPlan:
        """Return the plan of a request with these options.

        Args:
            engine: The engine's defaults and bounds.
            num_prompt_tokens: The number of tokens of its prompt.
            block_size: The number of tokens in a block of the KV cache.

        Raises:
            ValueError: If the pinned part exceeds the prompt or the engine's bound, the window does
                not fit the block size, or blocks are to be drawn where that has no meaning.
        """
        # The engine's number holds for prompts of any length, so that a sequence has the same plan
        # whatever part of it comes as a prompt.
        default = num_prompt_tokens if engine.pin_tokens is None else engine.pin_tokens
        pin_tokens = default if self.pin_tokens is None else self.pin_tokens
        if pin_tokens > max(num_prompt_tokens, engine.pin_tokens or 0):
            raise ValueError(
                f"pte_pin_tokens is {pin_tokens}, beyond the prompt of {num_prompt_tokens} tokens"
            )
        self._check_spans(pin_tokens, num_prompt_tokens)
        window_tokens = engine.window_tokens if self.window_tokens is None else self.window_tokens
        keep_tokens, keep_score = self._keep(engine, window_tokens)
        drawn = self.evict == "random" or (keep_tokens > 0 and keep_score == "random")
        if self.evict_seed is not None and not drawn:
            raise ValueError(
                f"pte_evict_seed is {self.evict_seed}, but nothing is drawn: send pte_evict random "
                "or pte_keep_score random too, or leave it out"
            )
        if self.evict == "random" and not window_tokens:
            raise ValueError(
                "pte_evict random needs a window, and this request has full attention: send a "
                "pte_window, or leave pte_evict out"
            )
        try:
            plan = FoldPlan(
                pin_tokens=pin_tokens,
                window_tokens=window_tokens,
                evict_ratio=engine.evict_ratio,
                block_size=block_size,
                evict=self.evict or "oldest",
                evict_seed=self.evict_seed or 0,
                keep_tokens=keep_tokens,
                keep_score=keep_score if keep_tokens else FoldPlan.keep_score,
                pin_spans=self.pin_spans if window_tokens else (),
            )
        except ValueError as error:
            options = {"keep": "pte_keep", "pin": "pte_pin_spans"}
            option = options.get(str(error).partition(" ")[0], "pte_window")
            raise ValueError(f"{option}: {error}") from error
        limit = engine.max_prompt_tokens
        most = pin_tokens + max((end - first for first, end in plan.pin_spans), default=0)
        if plan.bounded and limit is not None and most > limit:
            raise ValueError(
                f"{most} pinned tokens exceed this server's --pte-max-prompt-tokens {limit}"
                + ", the first question and the longest later one" * bool(plan.pin_spans)
                + "; send a smaller pte_pin_tokens"
                + " and pte_pin_spans" * bool(plan.pin_spans)
                + ", so that the rest of the prompt counts as thoughts"
            )
        return plan

    def _check_spans(self, pin_tokens: int, num_prompt_tokens: int) -> None:
        """Raise ValueError unless spans lie in order, past the first pinned tokens, in the prompt.

        That is so whatever the window, so that a request is not refused for its window alone.
        """
        before = pin_tokens
        for first, end in self.pin_spans:
            if first >= end:
                raise ValueError(f"pte_pin_spans: [{first}, {end}) is empty")
            if first < before:
                what = "pte_pin_tokens" if before == pin_tokens else "the span before it"
                hint = " (without pte_pin_tokens the whole prompt)" * (self.pin_tokens is None)
                raise ValueError(
                    f"pte_pin_spans: [{first}, {end}) begins before token {before}, where {what} "
                    f"ends{hint}"
                )
            before = end
        if before > max(num_prompt_tokens, pin_tokens):
            raise ValueError(
                f"pte_pin_spans: a span ends at {before}, beyond the prompt of {num_prompt_tokens} "
                "tokens"
            )

    def _keep(self, engine: EngineConfig, window_tokens: int) -> tuple[int, KeepScore]:
        """Return how many tokens the request keeps, and by which score.

        Raises:
            ValueError: If it asks to keep tokens where none can be kept.
        """
        score = self.keep_score or engine.keep_score
        keeps = engine.keep_tokens if self.keep_tokens is None else self.keep_tokens
        if self.keep_tokens is None and (self.evict == "random" or not window_tokens):
            keeps = 0  # the server's default is for windows whose oldest blocks leave
        if not keeps:
            if self.kept:
                raise ValueError(
                    "pte_kept says what folds keep, but nothing is kept: send pte_keep"
                )
            if self.keep_score is not None:
                raise ValueError(
                    f"pte_keep_score is {self.keep_score}, but nothing is kept: send pte_keep too, "
                    "or leave it out"
                )
            return 0, score
        if not window_tokens:
            raise ValueError(
                f"pte_keep is {keeps}, but this request has full attention, which evicts nothing: "
                "send a pte_window, or leave pte_keep out"
            )
        if self.evict == "random":
            raise ValueError(
                f"pte_keep is {keeps}, but pte_evict random is a control that keeps nothing: leave "
                "one of them out"
            )
        if score == "expected" and engine.probes is None:
            raise ValueError(
                f"pte_keep is {keeps}, and this server has no probes to choose tokens by: start it "
                "with --pte-keep or --pte-probes, or send pte_keep_score random"
            )
        return keeps, score


def request_plan(
    engine: EngineConfig, params: Any, num_prompt_tokens: int, block_size: int
) -> FoldPlan:
    """Return the plan of a request, the same in every process; see `RequestOptions.plan`.

    Raises:
        ValueError: If an option is unknown, or does not fit the prompt or the engine.
    """
    options = RequestOptions.of(params)
    return options.plan(engine, num_prompt_tokens=num_prompt_tokens, block_size=block_size)
