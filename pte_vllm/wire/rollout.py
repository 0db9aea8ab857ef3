"""This is a rollout as it travels from the server to the trainer: one definition for both sides.

The server builds a `Rollout` and sends `to_line()`. The trainer reads the line with `from_json`,
where pydantic checks every value, in compiled code. A record that a program builds itself is not
checked token by token: only what its parts say of each other is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from pte_vllm.method.names import RuleName
from pte_vllm.wire.folds import FoldEvent, fold_events, num_folds
from pte_vllm.wire.values import Bit, Count, Kept, LogProb, Name, Plan, TokenId

FinishReason = Literal["stop", "length", "abort", "scored"]
"""`stop`: the text or a stop token ended it. `length`: there was no room left. `abort`: it was
ended from outside, and what was sampled is kept. `scored`: the tokens were given, not sampled."""
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

InFlight = Literal["pin", "switch_rebuild"]
"""What a sample does when its adapter gets a new version: it finishes on its own version, or it
reads its tokens again and goes on with the new one."""

_OPTIONAL = Field(exclude_if=lambda value: value is None)
"""Of fields that a line leaves out where they say nothing: most records have none of them."""

# The rules of reading. They hold for the parts of a record too: no value changes its type, no
# field is unknown, and no number is NaN or infinite.
_exact = with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """One version of the adapter sampled the completion tokens `[start, end)`."""

    version: Count
    """Versions count from 1 as they are pushed; 0 is the base model, or a LoRA not pushed."""
    start: Count
    end: Count


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """What a record holds in memory and on the wire alike."""

    prompt_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    """The tokens of the question."""
    completion_ids: tuple[TokenId, ...]
    """The N tokens of the answer."""
    logprobs: tuple[LogProb, ...]
    """One for each completion token, from the distribution that it was sampled from."""
    mask: tuple[Bit, ...]
    """1 where the policy sampled the token, which is trained on; 0 where it came from elsewhere."""
    finish_reason: FinishReason
    adapter: Name | None
    """Its name in the engine, `name@version` if it was pushed; None is the base model."""
    rule: RuleName | None = None
    """The rule by which folds added up; None is the adapter's own, whatever it is."""
    weight_versions: tuple[WeightSpan, ...]
    """They cover `[0, N)` in order, without holes."""
    plan: Plan
    group_id: Name
    """Samples of one question share it."""
    index: Count
    """Which sample of its group this is, from 0."""
    num_preempted: Count | None
    """How often the engine evicted and replayed it; None where the server keeps no statistics."""
    kept: Annotated[Kept | None, _OPTIONAL] = None
    """What each fold kept, for a replay to keep the same; None where the plan keeps nothing, or
    where it ended before its first token."""
    top_ids: Annotated[tuple[tuple[TokenId, ...], ...] | None, _OPTIONAL] = None
    """`[N, k]`: the k most probable tokens in the place of each completion token, best first; None
    unless a score was asked for them. A record without them has no such field."""
    top_logprobs: Annotated[tuple[tuple[LogProb, ...], ...] | None, _OPTIONAL] = None
    """`[N, k]`: their log-probs."""


@_exact
@dataclass(frozen=True, kw_only=True)
class _Line(_Fields):
    """A record as JSON has it: with the folds written out, for readers that know no plan."""

    fold_events: tuple[FoldEvent, ...]


@dataclass(frozen=True, kw_only=True)
class Rollout(_Fields):
    """One answer to one question, with all that a replay needs.

    Raises:
        ValueError: naming the field, if a field contradicts another, a log-prob is not finite, or
            the reason of its end is unknown.
    """

    rho: tuple[float, ...] | None = None
    """‖ΔS‖ / ‖S‖ of each fold, the mean over layers with a state; None without a state, or where
    it is unknown."""

    def __post_init__(self) -> None:
        for name in ("logprobs", "mask"):
            found, wanted = len(getattr(self, name)), len(self.completion_ids)
            if found != wanted:
                raise ValueError(f"{name} has {found} values for {wanted} completion tokens")
        if not math.isfinite(sum(self.logprobs)):
            raise ValueError("logprobs must be finite")
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"finish_reason must be one of {', '.join(FINISH_REASONS)}, "
                f"got {self.finish_reason!r}"
            )
        if self.plan.pin_tokens > len(self.prompt_ids):
            raise ValueError(
                f"plan: {self.plan.pin_tokens} pinned tokens, but the prompt has "
                f"{len(self.prompt_ids)}"
            )
        if self.plan.pin_spans and self.plan.pin_spans[-1][1] > self._num_tokens:
            raise ValueError(
                f"plan: a pinned span ends at {self.plan.pin_spans[-1][1]}, but there are "
                f"{self._num_tokens} tokens"
            )
        self._check_kept()
        self._check_top()
        self._check_rho()
        self._check_versions()

    def _check_kept(self) -> None:
        if self.kept is None and not self.completion_ids:
            return  # the question may fold, and has not been read to its end
        count = num_folds(self.plan, self._num_tokens) if self.plan.keep_tokens else 0
        found = self.kept or ()
        if len(found) != count:
            raise ValueError(f"kept has {len(found)} entries for {count} folds that keep tokens")
        for fold, marks in enumerate(found):
            if (marks is not None) != self.plan.selects(fold):
                raise ValueError(f"kept: fold {fold} has marks, or lacks them, against its plan")

    def _check_top(self) -> None:
        if self.top_ids is None and self.top_logprobs is None:
            return
        ids, logprobs = self.top_ids or (), self.top_logprobs or ()
        wanted = [self.num_top] * len(self.completion_ids)
        for name, rows in (("top_ids", ids), ("top_logprobs", logprobs)):
            if [len(row) for row in rows] != wanted:
                raise ValueError(
                    f"{name} must have {self.num_top} values for each of {len(wanted)} tokens"
                )
        if not math.isfinite(sum(map(sum, logprobs))):
            raise ValueError("top_logprobs must be finite")

    def _check_rho(self) -> None:
        if self.rho is None:
            return
        if len(self.rho) != num_folds(self.plan, self._num_tokens):
            raise ValueError(
                f"rho has {len(self.rho)} values, but the plan has "
                f"{num_folds(self.plan, self._num_tokens)} folds"
            )
        if not all(math.isfinite(value) and value >= 0 for value in self.rho):
            raise ValueError(f"rho must be finite and at least 0, got {self.rho}")

    def _check_versions(self) -> None:
        position = 0
        for span in self.weight_versions:
            if span.start != position or span.end <= span.start:
                raise ValueError(
                    f"weight_versions: span [{span.start}, {span.end}) does not continue at "
                    f"{position}"
                )
            position = span.end
        if position != len(self.completion_ids):
            raise ValueError(
                f"weight_versions cover {position} of {len(self.completion_ids)} completion tokens"
            )

    @property
    def num_top(self) -> int:
        """How many of the most probable tokens the record names in each place, k."""
        return len(self.top_ids[0]) if self.top_ids else 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of question and answer follow each other."""
        return self.prompt_ids + self.completion_ids

    @cached_property
    def fold_events(self) -> tuple[FoldEvent, ...]:
        """The folds behind the log-probs follow from the plan; `rho` adds what was measured."""
        return fold_events(self.plan, self._num_tokens, self.rho)

    @property
    def _num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def to_line(self) -> bytes:
        """Return the record as a line of JSON without its end; `from_json` undoes it exactly."""
        return _WIRE.dump_json(self._line())

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, as `json.loads` makes them of its line."""
        values: dict[str, Any] = _WIRE.dump_python(self._line(), mode="json")
        return values

    def _line(self) -> _Line:
        return _Line(**_values(self), fold_events=self.fold_events)

    @classmethod
    def from_json(cls, record: str | bytes | Mapping[str, Any]) -> Rollout:
        """Read and check a record.

        Args:
            record: a line of the server's answer, or what `json.loads` made of one.

        Raises:
            ValueError: naming the field, if anything is missing, unknown, malformed or disagrees.
        """
        if not isinstance(record, str | bytes):
            record = json.dumps(record)
        try:
            line = _WIRE.validate_json(record)
        except ValidationError as error:
            raise ValueError(_reason(error)) from None
        rollout = cls(**_values(line), rho=_rho(line.fold_events))
        found, expected = line.fold_events, rollout.fold_events
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
            raise ValueError(
                f"fold_events are not those of the plan: {len(found)} found, {len(expected)} "
                f"expected, first difference at {first}"
            )
        return rollout


_NAMES = tuple(field.name for field in fields(_Fields))
_WIRE = TypeAdapter(_Line)


def _values(record: _Fields) -> dict[str, Any]:
    """Return the fields that both forms of a record have, as they are."""
    return {name: getattr(record, name) for name in _NAMES}


def _rho(events: tuple[FoldEvent, ...]) -> tuple[float, ...] | None:
    """Return what the folds of a line say was measured; None if they do not say.

    Raises:
        ValueError: if some of them say it and others do not.
    """
    known = tuple(event.rho for event in events if event.rho is not None)
    if len(known) not in (0, len(events)):
        raise ValueError(f"fold_events: rho is there for {len(known)} of {len(events)} folds")
    return known or None


def _reason(error: ValidationError) -> str:
    """Say what pydantic found first, on one line that names the field."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "record"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"{where} is not a known field"
    if first["type"] == "json_invalid":
        return f"{where}: {first['msg']}"
    return f"{where}: {first['msg']}, got {first['input']!r:.80}"
