"""What a request to the server still waits for, and whether a record is an answer to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pte_vllm.method.names import Evict, KeepScore, Pin
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans
from pte_vllm.wire.rollout import Rollout


class RolloutMismatch(ValueError):
    """A record is malformed or not what was asked for; never train on it."""


class ErrorLine(Exception):
    """The server wrote an error where a record was due; `details` is what it says."""

    def __init__(self, details: Any) -> None:
        super().__init__(details)
        self.details = details


@dataclass(kw_only=True)
class Group:
    """What was asked for of one question."""

    prompt: list[int] | str
    """The question, as token ids or as a text for the server's tokenizer."""
    missing: set[int]
    """Indices of the samples that are still to come."""
    pin_tokens: int | None = None
    """How many tokens at the start are never folded; None pins the prompt."""
    pin_spans: Spans = ()
    """Tokens of later questions, each pinned until the next one begins."""
    pin: Pin | None = None
    """What is pinned in words; None: the numbers say it."""
    answer: list[int] | None = None
    """The given completion, where it is scored."""


@dataclass(kw_only=True)
class Expected:
    """All that one request asked for; a sample is crossed off as it comes."""

    groups: dict[str, Group]
    """The questions, by the id of their group."""
    window_tokens: int | None = None
    """The window; None leaves it to the server."""
    adapter: str | None = None
    """`name` or `name@version`; None is the base model."""
    rule: str | None = None
    """The rule by which folds add up; None leaves it to the adapter."""
    evict: Evict | None = None
    """Which blocks leave; None is the oldest."""
    evict_seed: int | None = None
    """What they are drawn by; None is 0."""
    keep_tokens: int | None = None
    """How many tokens each head keeps; None leaves it to the server."""
    keep_score: KeepScore | None = None
    """By which score; None leaves it to the server."""
    top_logprobs: int = 0
    """How many of the most probable tokens a score names in each place."""

    def missing(self) -> dict[str, Group]:
        """Return the groups that lack a sample, by their id."""
        return {group_id: group for group_id, group in self.groups.items() if group.missing}

    def accept(self, line: str, default_plan: Mapping[str, Any]) -> Rollout:
        """Read a line of the answer, check it against what was asked for, and cross it off.

        Args:
            line: the record, as JSON.
            default_plan: the server's plan, as its `info` has it.

        Raises:
            ErrorLine: if the line is an error instead of a record.
            RolloutMismatch: if the record is malformed or not what was asked for.
        """
        try:
            record = Rollout.from_json(line)
        except ValueError as error:
            if (details := _error_in(line)) is not None:
                raise ErrorLine(details) from None
            raise RolloutMismatch(f"malformed record: {error}") from error
        where = f"sample {record.index} of group {record.group_id!r}"
        group = self.groups.get(record.group_id)
        if group is None or record.index not in group.missing:
            raise RolloutMismatch(f"{where} was not asked for, or came twice")
        wrong = _wrong_tokens(record, group) or self._wrong_policy(record, group, default_plan)
        if wrong is not None:
            raise RolloutMismatch(f"{where}: {wrong}")
        group.missing.discard(record.index)
        return record

    def _wrong_policy(
        self, record: Rollout, group: Group, default_plan: Mapping[str, Any]
    ) -> str | None:
        """Say which of plan, adapter, rule and top tokens differs, if one does."""
        group = _in_numbers(group, record)
        expected = self._plan(group, len(record.prompt_ids), default_plan)
        if record.plan != expected:
            return f"plan is {record.plan}, asked for was {expected}"
        name, asked = record.adapter, self.adapter
        if name != asked and not (name and asked and name.startswith(f"{asked}@")):
            return f"adapter is {name}, asked for was {asked}"
        if self.rule is not None and record.rule != self.rule:
            return f"rule is {record.rule or 'not said'}, asked for was {self.rule}"
        if record.num_top != self.top_logprobs:
            return f"{record.num_top} top_logprobs, asked for were {self.top_logprobs}"
        return None

    def _plan(self, group: Group, num_prompt: int, default: Mapping[str, Any]) -> FoldPlan:
        """Make the plan that follows from the request and the server's defaults."""
        asked = self.window_tokens
        window_tokens = default["window_tokens"] if asked is None else asked
        keep_tokens = self.keep_tokens
        if keep_tokens is None:  # servers of earlier versions keep nothing, and do not say so
            keeps = window_tokens and self.evict != "random"
            keep_tokens = default.get("keep_tokens", 0) if keeps else 0
        score = self.keep_score or default.get("keep_score", FoldPlan.keep_score)
        return FoldPlan(
            pin_tokens=num_prompt if group.pin_tokens is None else group.pin_tokens,
            window_tokens=window_tokens,
            keep_tokens=keep_tokens,
            keep_score=score if keep_tokens else FoldPlan.keep_score,
            evict_ratio=default["evict_ratio"],
            block_size=default["block_size"],
            evict=self.evict or "oldest",
            evict_seed=self.evict_seed or 0,
            pin_spans=group.pin_spans if window_tokens else (),
        )


def _in_numbers(group: Group, record: Rollout) -> Group:
    """Return what was asked for with the pins in numbers.

    Where user messages lie the server finds out, by the chat template; they lie in the prompt.
    """
    spans = record.plan.pin_spans
    if group.pin != "first_and_last_user" or (spans and spans[-1][1] > len(record.prompt_ids)):
        return group
    return replace(group, pin_tokens=record.plan.pin_tokens, pin_spans=spans)


def choices_of(
    evict: Evict | None,
    evict_seed: int | None,
    keep_tokens: int | None,
    keep_score: KeepScore | None,
) -> dict[str, Any]:
    """Return the fields that say what leaves and what is kept, of those that a request gives.

    Servers of earlier versions know none of them.
    """
    given = {
        "evict": evict,
        "evict_seed": evict_seed,
        "keep_tokens": keep_tokens,
        "keep_score": keep_score,
    }
    return {name: value for name, value in given.items() if value is not None}


def _error_in(line: str) -> Any:
    """Return what a line that is no record says went wrong, if it says so."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values.get("error") if isinstance(values, dict) else None


def _wrong_tokens(record: Rollout, group: Group) -> str | None:
    """Say what differs from the tokens that were sent, if anything does."""
    if not isinstance(group.prompt, str) and list(record.prompt_ids) != group.prompt:
        return "prompt_ids are not the tokens that were sent"
    if group.answer is not None and list(record.completion_ids) != group.answer:
        return "completion_ids are not the tokens that were sent"
    if (group.answer is not None) != (record.finish_reason == "scored"):
        return f"finish_reason is {record.finish_reason}"
    return None
