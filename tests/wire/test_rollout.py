"""The rollout record: exact round trip, and nothing malformed gets through."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.rollout import FoldEvent, Rollout, WeightSpan, fold_events, with_rho

PLAN = FoldPlan(pin_tokens=5, window_tokens=16, evict_ratio=0.25, block_size=4)


def _rollout(num_completion: int = 40, **changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "prompt_ids": (3, 1, 4, 1, 5),
        "completion_ids": tuple(range(num_completion)),
        "logprobs": tuple(-1.0 / (i + 3) for i in range(num_completion)),
        "mask": (1,) * num_completion,
        "finish_reason": "length",
        "adapter": "policy@3",
        "rule": "ridge",
        "weight_versions": (WeightSpan(version=3, start=0, end=num_completion),),
        "plan": PLAN,
        "fold_events": fold_events(PLAN, 5 + num_completion),
        "group_id": "a",
        "index": 2,
        "num_preempted": 0,
    }
    return Rollout(**{**values, **changes})


def test_fold_events_are_the_plans() -> None:
    # Pinned 2 blocks, window 4: the first fold is before position 24, then one every 4 tokens.
    assert fold_events(PLAN, 33) == (
        FoldEvent(at=24, blocks=(2, 3)),
        FoldEvent(at=28, blocks=(3, 4)),
    )
    # At a length of 34 the token at 32 is computed; at 33 it is only predicted.
    assert fold_events(PLAN, 34)[-1] == FoldEvent(at=32, blocks=(4, 5))
    assert fold_events(PLAN, 1) == fold_events(PLAN, 24) == ()
    full = FoldPlan(pin_tokens=5, window_tokens=0, block_size=4)
    assert fold_events(full, 4000) == ()


@pytest.mark.parametrize("num_completion", [0, 1, 40])
def test_round_trip(num_completion: int) -> None:
    spans = (WeightSpan(version=3, start=0, end=num_completion),) if num_completion else ()
    rollout = _rollout(num_completion, weight_versions=spans)
    line = json.dumps(rollout.to_json())
    assert Rollout.from_json(line) == Rollout.from_json(json.loads(line)) == rollout
    assert rollout.token_ids == rollout.prompt_ids + rollout.completion_ids


def test_rho_of_folds() -> None:
    events = fold_events(PLAN, 45)
    rho = [0.5 / (i + 1) for i in range(len(events))]
    known = _rollout(fold_events=with_rho(events, [*rho, 9.0]))  # one fold past the answer
    assert [event.rho for event in known.fold_events] == rho
    assert Rollout.from_json(json.dumps(known.to_json())) == known
    for missing in (None, [], rho[:-1]):
        assert with_rho(events, missing) == events
    # A record written before folds had one.
    old = _rollout().to_json()
    for event in old["fold_events"]:
        del event["rho"]
    assert Rollout.from_json(old) == _rollout()


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (-0.1, "at least 0"),
        (math.nan, "finite"),
        ("1", "a number"),
        (True, "a number"),
        (None, "4 of 5"),
    ],
)
def test_malformed_rho_is_refused(rho: object, message: str) -> None:
    record = _rollout().to_json()
    for event in record["fold_events"]:
        event["rho"] = 1.0
    record["fold_events"][-1]["rho"] = rho
    with pytest.raises(ValueError, match=message):
        Rollout.from_json(record)


def test_records_of_earlier_versions_have_no_rule() -> None:
    old = _rollout().to_json()
    assert old.pop("rule") == "ridge"
    assert Rollout.from_json(old) == Rollout.from_json(json.dumps(old)) == _rollout(rule=None)


def test_versions_may_change_midway() -> None:
    spans = (WeightSpan(version=1, start=0, end=7), WeightSpan(version=2, start=7, end=40))
    assert Rollout.from_json(_rollout(weight_versions=spans).to_json()).weight_versions == spans


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_ids", [], "prompt_ids is empty"),
        ("prompt_ids", "31415", "prompt_ids must be a list"),
        ("prompt_ids", [3, 1, 4, 1, True], "token ids, got True"),
        ("completion_ids", [1.0] * 40, "completion_ids must hold token ids"),
        ("completion_ids", [-1] * 40, "completion_ids must hold token ids"),
        ("completion_ids", [1] * 39, "logprobs has 40 values for 39"),
        ("logprobs", [-1.0] * 39 + [math.nan], "finite"),
        ("logprobs", [-1.0] * 39 + [-math.inf], "finite"),
        ("logprobs", [-1.0] * 39 + [0.5], "at most 0"),
        ("logprobs", [-1.0] * 39 + [None], "numbers"),
        ("mask", [1] * 39, "mask has 39 values"),
        ("mask", [2] * 40, "0 and 1"),
        ("finish_reason", "error", "finish_reason must be one of"),
        ("adapter", "", "adapter must be"),
        ("adapter", 3, "adapter must be"),
        ("rule", "paperback", "rule must be one of paper, sum"),
        ("weight_versions", [], "cover 0 of 40"),
        ("weight_versions", [{"version": 1, "start": 0, "end": 39}], "cover 39 of 40"),
        ("weight_versions", [{"version": 1, "start": 1, "end": 40}], "does not continue"),
        ("weight_versions", [{"version": "1", "start": 0, "end": 40}], "version must be"),
        ("weight_versions", [{"version": 1, "start": 0}], "lacks end"),
        ("plan", {"pin_tokens": 5}, "plan lacks"),
        ("plan", {**_rollout().to_json()["plan"], "pin_tokens": 6}, "6 pinned tokens"),
        ("plan", {**_rollout().to_json()["plan"], "window_tokens": 17}, "multiple"),
        ("plan", {**_rollout().to_json()["plan"], "window_tokens": 32}, "fold_events"),
        ("plan", {**_rollout().to_json()["plan"], "evict_ratio": "1/4"}, "evict_ratio"),
        ("fold_events", [], "fold_events are not those of the plan"),
        ("fold_events", [{"at": 24, "blocks": [2]}], "two numbers"),
        ("group_id", None, "group_id"),
        ("index", -1, "index"),
        ("num_preempted", 0.5, "num_preempted"),
        ("colour", "red", "unknown fields: colour"),
    ],
)
def test_malformed_records_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rollout.from_json({**_rollout().to_json(), field: value})


def test_missing_and_broken_json() -> None:
    for field in _rollout().to_json().keys() - {"rule"}:
        record = _rollout().to_json()
        del record[field]
        with pytest.raises(ValueError, match=f"lacks {field}"):
            Rollout.from_json(record)
    with pytest.raises(ValueError):
        Rollout.from_json('{"prompt_ids": [1, ')
    with pytest.raises(ValueError, match="must be an object"):
        Rollout.from_json("[]")
