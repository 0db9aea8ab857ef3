"""A rollout as it travels from the server to the trainer: one definition for both sides.

The server builds its records from this class and the trainer reads them back into it, so what one
side writes is what the other checks. Standard library, `FoldPlan` and names of options only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.plan import FoldPlan

FINISH_REASONS = ("stop", "length", "abort", "scored")
"""`stop`: end of text or a stop token. `length`: no room left. `abort`: ended from outside, what
was sampled is kept. `scored`: the tokens were given, not sampled."""

InFlight = Literal["pin", "switch_rebuild"]
"""What a sample does when its adapter gets a new version: finish on its own, or read its tokens
again and go on with the new one."""

_ROUNDING = 1e-4  # a log-softmax in fp32 may end this far above zero


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """Completion tokens `[start, end)` come from one version of the adapter."""

    version: int
    """Counts from 1 as versions are pushed; 0: the base model, or a LoRA not pushed."""
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class FoldEvent:
    """Before the token at position `at` was computed, blocks `[first, end)` were folded."""

    at: int
    blocks: tuple[int, int]
    rho: float | None = None
    """‖ΔS‖ / ‖S‖, the mean over layers with a state; None without a state, or if unknown."""


def fold_events(plan: FoldPlan, num_tokens: int) -> tuple[FoldEvent, ...]:
    """Folds behind the log-probs of a sequence of `num_tokens`, question included.

    The last token is predicted, never computed, so a boundary at its position is not among them.
    """
    events: list[FoldEvent] = []
    for start, _ in plan.segments(num_tokens - 1):
        end = plan.pinned_blocks + plan.folded_blocks(start)
        first = events[-1].blocks[1] if events else plan.pinned_blocks
        if end > first:
            events.append(FoldEvent(at=start, blocks=(first, end)))
    return tuple(events)


def with_rho(events: Sequence[FoldEvent], rho: Sequence[float] | None) -> tuple[FoldEvent, ...]:
    """The events with the engine's values; unchanged unless there is one for each.

    The engine may have folded once more, for a token that came after the last of the answer.
    """
    if rho is None or len(rho) < len(events):
        return tuple(events)
    return tuple(replace(event, rho=value) for event, value in zip(events, rho, strict=False))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one question, with all that a replay needs.

    With N completion tokens, `completion_ids`, `logprobs` and `mask` are of length N.

    Raises:
        ValueError: naming the field, if a value is malformed or disagrees with another.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the completion tokens, from the distribution they were sampled from."""
    mask: tuple[int, ...]
    """1: sampled by the policy, to be trained on; 0: put there by something else."""
    finish_reason: str
    adapter: str | None
    """Name in the engine, `name@version` if pushed; None: the base model."""
    rule: str | None = None
    """By which folds added up; None: the adapter's own, whatever it is."""
    weight_versions: tuple[WeightSpan, ...]
    """Cover `[0, N)` in order, without holes."""
    plan: FoldPlan
    fold_events: tuple[FoldEvent, ...]
    group_id: str
    """Samples of one question share it."""
    index: int
    """Which sample of its group, from 0."""
    num_preempted: int | None
    """How often the engine evicted and replayed it; None where the server keeps no statistics."""

    def __post_init__(self) -> None:
        _check_tokens("prompt_ids", self.prompt_ids)
        _check_tokens("completion_ids", self.completion_ids)
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty")
        _check_logprobs(self.logprobs)
        if any(type(m) is not int or m not in (0, 1) for m in self.mask):
            raise ValueError("mask must hold 0 and 1 only")
        for name in ("logprobs", "mask"):
            found, wanted = len(getattr(self, name)), len(self.completion_ids)
            if found != wanted:
                raise ValueError(f"{name} has {found} values for {wanted} completion tokens")
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(
                f"finish_reason must be one of {', '.join(FINISH_REASONS)}, "
                f"got {self.finish_reason!r}"
            )
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise ValueError(f"adapter must be a name or null, got {self.adapter!r}")
        if self.rule is not None and self.rule not in RULE_NAMES:
            raise ValueError(
                f"rule must be one of {', '.join(RULE_NAMES)} or null, got {self.rule!r}"
            )
        if not isinstance(self.group_id, str) or not self.group_id:
            raise ValueError(f"group_id must be a non-empty string, got {self.group_id!r}")
        _check_count("index", self.index)
        if self.num_preempted is not None:
            _check_count("num_preempted", self.num_preempted)
        self._check_versions()
        if self.plan.pin_tokens > len(self.prompt_ids):
            raise ValueError(
                f"plan: {self.plan.pin_tokens} pinned tokens, but the prompt has "
                f"{len(self.prompt_ids)}"
            )
        self._check_folds()

    def _check_folds(self) -> None:
        expected = fold_events(self.plan, len(self.token_ids))
        found = tuple(replace(event, rho=None) for event in self.fold_events)
        if found != expected:
            raise ValueError(
                f"fold_events are not those of the plan: {len(found)} found, "
                f"{len(expected)} expected, first difference at "
                f"{_first_difference(found, expected)}"
            )
        known = [event.rho for event in self.fold_events if event.rho is not None]
        if len(known) not in (0, len(found)):
            raise ValueError(f"fold_events: rho is there for {len(known)} of {len(found)} folds")
        for rho in known:
            if isinstance(rho, bool) or not isinstance(rho, int | float):
                raise ValueError(f"fold_events: rho must be a number or null, got {rho!r}")
            if not math.isfinite(rho) or rho < 0:
                raise ValueError(f"fold_events: rho must be finite and at least 0, got {rho!r}")

    def _check_versions(self) -> None:
        position = 0
        for span in self.weight_versions:
            for name in ("version", "start", "end"):
                _check_count(f"weight_versions: {name}", getattr(span, name))
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
    def token_ids(self) -> tuple[int, ...]:
        """Question and answer."""
        return self.prompt_ids + self.completion_ids

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; `from_json` undoes it exactly."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "prompt_ids": list(self.prompt_ids),
            "completion_ids": list(self.completion_ids),
            "logprobs": list(self.logprobs),
            "mask": list(self.mask),
            "weight_versions": [asdict(span) for span in self.weight_versions],
            "plan": plan_to_json(self.plan),
            "fold_events": [
                {"at": e.at, "blocks": list(e.blocks), "rho": e.rho} for e in self.fold_events
            ],
        }

    @classmethod
    def from_json(cls, record: str | bytes | Mapping[str, Any]) -> Rollout:
        """Read and check a record.

        Args:
            record: a line of the server's answer, or what `json.loads` made of one.

        Raises:
            ValueError: naming the field, if anything is missing, unknown, malformed or disagrees.
        """
        if isinstance(record, str | bytes):
            record = json.loads(record)  # JSONDecodeError is a ValueError
        if isinstance(record, Mapping):
            record = {"rule": None, **record}  # records of earlier versions have none
        values = _object("record", record, {field.name for field in fields(cls)})
        for name in ("prompt_ids", "completion_ids", "logprobs", "mask"):
            values[name] = tuple(_list(name, values[name]))
        values["weight_versions"] = tuple(
            WeightSpan(**_object("weight_versions", span, {"version", "start", "end"}))
            for span in _list("weight_versions", values["weight_versions"])
        )
        values["plan"] = plan_from_json(values["plan"])
        values["fold_events"] = tuple(
            _fold_event(event) for event in _list("fold_events", values["fold_events"])
        )
        return cls(**values)


def plan_to_json(plan: FoldPlan) -> dict[str, Any]:
    """The four numbers that decide every fold."""
    return asdict(plan)


def plan_from_json(values: Any) -> FoldPlan:
    """Undo `plan_to_json`; ValueError if the numbers are malformed or impossible."""
    names = {field.name for field in fields(FoldPlan)}
    plan = _object("plan", values, names)
    for name in names - {"evict_ratio"}:
        _check_count(f"plan: {name}", plan[name])
    ratio = plan["evict_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ValueError(f"plan: evict_ratio must be a number, got {ratio!r}")
    try:
        return FoldPlan(**plan)
    except ValueError as error:
        raise ValueError(f"plan: {error}") from error


def _fold_event(values: Any) -> FoldEvent:
    if isinstance(values, Mapping):
        values = {"rho": None, **values}  # records of earlier versions have none
    event = _object("fold_events", values, {"at", "blocks", "rho"})
    _check_count("fold_events: at", event["at"])
    blocks = _list("fold_events: blocks", event["blocks"])
    if len(blocks) != 2:
        raise ValueError(f"fold_events: blocks must be two numbers, got {blocks!r}")
    for block in blocks:
        _check_count("fold_events: blocks", block)
    return FoldEvent(at=event["at"], blocks=(blocks[0], blocks[1]), rho=event["rho"])


def _object(what: str, values: Any, names: set[str]) -> dict[str, Any]:
    """`values` as a dict with exactly these names."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object, got {type(values).__name__}")
    if missing := names - values.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - names:
        raise ValueError(f"{what} has unknown fields: {', '.join(sorted(map(str, unknown)))}")
    return dict(values)


def _list(what: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{what} must be a list, got {type(values).__name__}")
    return values


def _check_count(what: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} must be an integer of at least 0, got {value!r}")


def _check_tokens(what: str, tokens: tuple[int, ...]) -> None:
    for token in tokens:
        if type(token) is not int or token < 0:
            raise ValueError(f"{what} must hold token ids, got {token!r}")


def _check_logprobs(logprobs: tuple[float, ...]) -> None:
    for value in logprobs:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"logprobs must hold numbers, got {value!r}")
        if not math.isfinite(value) or value > _ROUNDING:
            raise ValueError(f"logprobs must be finite and at most 0, got {value!r}")


def _first_difference(found: Sequence[Any], expected: Sequence[Any]) -> int:
    pairs = zip(found, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
