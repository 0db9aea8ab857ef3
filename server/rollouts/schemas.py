"""The bodies of `POST /pte/v1/rollouts` and `/score`; an unknown field is an error."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pte_vllm.method.names import Pin
from pte_vllm.method.spans import Spans
from pte_vllm.wire.rollout import InFlight

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
GroupId = Annotated[str, Field(min_length=1, max_length=256)]

MAX_SAMPLES = 16_384
"""The most sequences of one request, as many as vLLM allows a request."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Sampling(_Strict):
    """How tokens are drawn, with vLLM's names, and its defaults save for `max_tokens`."""

    max_tokens: int | None = Field(None, ge=1)
    """How long an answer may get; null takes all the room that `max_model_len` leaves."""
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    seed: int | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


class _Request(_Strict):
    adapter: str | None = None
    """`name` (its newest version), `name@version`, or null: the base model."""
    window_tokens: int | None = None
    pin_tokens: int | list[int] | None = None
    rule: str | None = Field(None, alias="update")
    """The three options of a plan mean what `pte_window`, `pte_pin_tokens` and `pte_update` do; a
    list says it of each sequence."""
    pin_spans: list[list[Annotated[list[int], Field(min_length=2, max_length=2)]]] | None = None
    """As `pte_pin_spans`, of each sequence; null: none has later questions."""
    pin: Pin | None = None
    """As `pte_pin`, of each sequence, in place of the numbers."""
    evict: str | None = None
    evict_seed: int | None = None
    """As `pte_evict` and `pte_evict_seed`."""
    keep_tokens: int | None = None
    keep_score: str | None = None
    """As `pte_keep` and `pte_keep_score`."""
    min_weight_version: int | None = Field(None, ge=0)
    group_id: GroupId | list[GroupId] | None = None
    """A name for each sequence, a plain string if there is one; "0", "1", ... by default."""

    def pins(self, count: int) -> list[tuple[int | None, Spans]]:
        """Return `pin_tokens` and `pin_spans` of each of `count` sequences.

        Raises:
            ValueError: If there are not as many, or `pin` says it already.
        """
        given = self.pin_tokens
        for name in ("pin_tokens", "pin_spans") if self.pin is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"pin {self.pin} says what is pinned, and so does {name}: leave one of them out"
                )
        tokens = list(given) if isinstance(given, list) else [given] * count
        given_spans = [[]] * count if self.pin_spans is None else self.pin_spans
        spans = [tuple((first, end) for first, end in of_one) for of_one in given_spans]
        for name, values in (("pin_tokens", tokens), ("pin_spans", spans)):
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} sequences")
        return list(zip(tokens, spans, strict=True))

    def group_ids(self, count: int) -> list[str]:
        """Return the names of `count` groups; ValueError unless they are as many, and different."""
        if self.group_id is None:
            return [str(i) for i in range(count)]
        names = [self.group_id] if isinstance(self.group_id, str) else self.group_id
        if len(names) != count or len(set(names)) != count:
            raise ValueError(f"group_id must be {count} different names, one per prompt")
        return names


class RolloutRequest(_Request):
    """The body of `POST /pte/v1/rollouts`."""

    token_ids: list[TokenIds] | None = None
    """The prompts as tokens; either this or `prompts` is given."""
    prompts: list[str] | None = None
    """The prompts as texts, for the server's tokenizer."""
    n: int = Field(1, ge=1, le=MAX_SAMPLES)  # before the indices are counted out
    """How many samples of each prompt there are."""
    samples: list[list[Annotated[int, Field(ge=0)]]] | None = None
    """Which of the `n` samples of each prompt are wanted; null asks for all."""
    sampling: Sampling = Sampling()
    in_flight: InFlight = "pin"
    """What a sample does when its adapter gets a new version; the module `in_flight` tells."""
    max_staleness: int | None = Field(None, ge=0)
    """A sample ends, its tokens kept, once more versions than this are newer than its own."""

    @model_validator(mode="after")
    def _check(self) -> RolloutRequest:
        if (self.token_ids is None) == (self.prompts is None):
            raise ValueError("send either token_ids or prompts")
        if self.in_flight == "switch_rebuild" and "@" in (self.adapter or ""):
            raise ValueError("in_flight switch_rebuild needs an adapter without @version")
        count = len(self.token_ids or self.prompts or ())
        if not count:
            raise ValueError("there are no prompts")
        self.group_ids(count)
        self.pins(count)
        wanted = self.wanted(count)
        for indices in wanted:
            if len(set(indices)) != len(indices) or any(i >= self.n for i in indices):
                raise ValueError(f"samples must be different numbers below n, {self.n}")
        if len(wanted) != count:
            raise ValueError(f"samples has {len(wanted)} lists for {count} prompts")
        total = sum(map(len, wanted))
        if not 0 < total <= MAX_SAMPLES:
            raise ValueError(f"{total} samples in one request; 1 to {MAX_SAMPLES} are possible")
        return self

    def wanted(self, count: int) -> list[list[int]]:
        """Return the indices of the wanted samples of each of `count` prompts."""
        return [list(range(self.n))] * count if self.samples is None else self.samples


class ScoreRequest(_Request):
    """The body of `POST /pte/v1/score`."""

    token_ids: list[TokenIds] = Field(min_length=1, max_length=MAX_SAMPLES)
    """The sequences, questions with their answers."""
    prompt_tokens: list[Annotated[int, Field(ge=1)]]
    """How many tokens of each sequence are its question; those after it are scored."""
    kept: list[list[str | None] | None] | None = None
    """What the folds of each sequence have to keep, as its record has it; null: they choose."""
    top_logprobs: int = Field(0, ge=0)
    """How many of the most probable tokens are named in each place, up to `--max-logprobs`."""

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        if len(self.prompt_tokens) != len(self.token_ids):
            raise ValueError(
                f"prompt_tokens has {len(self.prompt_tokens)} values for {len(self.token_ids)} "
                "sequences"
            )
        if self.kept is not None and len(self.kept) != len(self.token_ids):
            raise ValueError(
                f"kept has {len(self.kept)} entries for {len(self.token_ids)} sequences"
            )
        for tokens, prompt in zip(self.token_ids, self.prompt_tokens, strict=True):
            if prompt >= len(tokens):
                raise ValueError(f"prompt_tokens {prompt}: a sequence has {len(tokens)} tokens")
        for prompt, (pin_tokens, _) in zip(
            self.prompt_tokens, self.pins(len(self.token_ids)), strict=True
        ):
            if pin_tokens is not None and pin_tokens > prompt:
                raise ValueError(f"pin_tokens is {pin_tokens}, beyond prompt_tokens {prompt}")
        self.group_ids(len(self.token_ids))
        self.pins(len(self.token_ids))
        return self
