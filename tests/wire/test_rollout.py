"""A rollout record survives its round trip exactly, and nothing malformed gets through."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.folds import FoldEvent, fold_events, num_folds, rho_of_folds
from pte_vllm.wire.rollout import Rollout, WeightSpan

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
    for plan in (PLAN, full):
        for length in range(1, 80):
            assert num_folds(plan, length) == len(fold_events(plan, length))


@pytest.mark.parametrize("num_completion", [0, 1, 40])
def test_round_trip(num_completion: int) -> None:
    spans = (WeightSpan(version=3, start=0, end=num_completion),) if num_completion else ()
    rollout = _rollout(num_completion, weight_versions=spans)
    line = json.dumps(rollout.to_json())
    assert Rollout.from_json(line) == Rollout.from_json(json.loads(line)) == rollout
    assert Rollout.from_json(rollout.to_line()) == rollout
    assert json.loads(rollout.to_line()) == json.loads(line) == rollout.to_json()
    assert rollout.token_ids == rollout.prompt_ids + rollout.completion_ids


def test_most_probable_tokens_are_there_where_they_were_asked_for() -> None:
    top = {
        "top_ids": ((3, 4),) * 40,
        "top_logprobs": tuple((-0.5, -1.0 / (i + 1)) for i in range(40)),
    }
    rollout = _rollout(**top)
    assert rollout.num_top == 2 and Rollout.from_json(rollout.to_line()) == rollout
    without = _rollout()
    assert without.num_top == 0 and not top.keys() & without.to_json().keys()
    for name, value, message in (
        ("top_ids", None, "top_ids must have"),
        ("top_logprobs", None, "top_logprobs must have 2"),
        ("top_ids", ((3, 4),) * 39 + ((3,),), "top_ids must have 2 values for each of 40"),
        ("top_logprobs", ((-0.5, math.nan),) * 40, "top_logprobs must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            _rollout(**{**top, name: value})


def test_rho_of_folds() -> None:
    count = num_folds(PLAN, 45)
    rho = tuple(0.5 / (i + 1) for i in range(count))
    assert rho_of_folds(PLAN, 45, [*rho, 9.0]) == rho  # one fold past the answer
    for missing in (None, [], rho[:-1]):
        assert rho_of_folds(PLAN, 45, missing) is None
    assert rho_of_folds(PLAN, 6, []) is None  # nothing was folded
    known = _rollout(rho=rho)
    assert [event.rho for event in known.fold_events] == list(rho)
    assert Rollout.from_json(known.to_line()) == known
    for wrong in (rho[:-1], (*rho, 0.1)):
        with pytest.raises(ValueError, match=f"rho has {len(wrong)} values"):
            _rollout(rho=wrong)
    # A record written before folds had one.
    old = _rollout().to_json()
    for event in old["fold_events"]:
        del event["rho"]
    assert Rollout.from_json(old) == _rollout()


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (-0.1, "fold_events.4.rho: .* greater than or equal to 0, got -0.1"),
        (math.nan, "finite"),
        ("1", "fold_events.4.rho: .* valid number"),
        (True, "fold_events.4.rho: .* valid number, got True"),
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
        ("prompt_ids", [], "prompt_ids: .* at least 1 item"),
        ("prompt_ids", "31415", "prompt_ids: .* valid array"),
        ("prompt_ids", [3, 1, 4, 1, True], "prompt_ids.4: .* valid integer, got True"),
        ("completion_ids", [1.0] * 40, "completion_ids.0: .* valid integer, got 1.0"),
        ("completion_ids", [-1] * 40, "completion_ids.0: .* equal to 0, got -1"),
        ("completion_ids", [1] * 39, "logprobs has 40 values for 39"),
        ("logprobs", [-1.0] * 39 + [math.nan], "logprobs.39: .* finite"),
        ("logprobs", [-1.0] * 39 + [-math.inf], "logprobs.39: .* finite"),
        ("logprobs", [-1.0] * 39 + [0.5], "logprobs.39: .* less than or equal to 0.0001, got 0.5"),
        ("logprobs", [-1.0] * 39 + [None], "logprobs.39: .* valid number, got None"),
        ("mask", [1] * 39, "mask has 39 values"),
        ("mask", [2] * 40, "mask.0: .* less than or equal to 1, got 2"),
        ("mask", [True] * 40, "mask.0: .* valid integer, got True"),
        ("finish_reason", "error", "finish_reason: .* 'scored', got 'error'"),
        ("adapter", "", "adapter: .* at least 1 character"),
        ("adapter", 3, "adapter: .* valid string, got 3"),
        ("rule", "paperback", "rule: .* 'paper', 'sum', .* got 'paperback'"),
        ("weight_versions", [], "cover 0 of 40"),
        ("weight_versions", [{"version": 1, "start": 0, "end": 39}], "cover 39 of 40"),
        ("weight_versions", [{"version": 1, "start": 1, "end": 40}], "does not continue"),
        (
            "weight_versions",
            [{"version": "1", "start": 0, "end": 40}],
            "weight_versions.0.version: .* valid integer, got '1'",
        ),
        ("weight_versions", [{"version": 1, "start": 0}], "weight_versions.0.end is missing"),
        ("plan", {"pin_tokens": 5}, "plan.window_tokens is missing"),
        ("plan", {**_rollout().to_json()["plan"], "pin_tokens": 6}, "6 pinned tokens"),
        ("plan", {**_rollout().to_json()["plan"], "window_tokens": 17}, "multiple"),
        ("plan", {**_rollout().to_json()["plan"], "window_tokens": 32}, "fold_events"),
        ("plan", {**_rollout().to_json()["plan"], "evict_ratio": "1/4"}, "evict_ratio"),
        ("fold_events", [], "fold_events are not those of the plan"),
        ("fold_events", [{"at": 24, "blocks": [2]}], "fold_events.0.blocks.1 is missing"),
        ("group_id", None, "group_id"),
        ("index", -1, "index"),
        ("num_preempted", 0.5, "num_preempted"),
        (
            "plan",
            {**_rollout().to_json()["plan"], "pin_tokens": True},
            "plan.pin_tokens: .* integer",
        ),
        ("plan", {**_rollout().to_json()["plan"], "colour": 1}, "plan.colour is not a known field"),
        ("rho", [0.1] * 5, "rho is not a known field"),
        ("colour", "red", "colour is not a known field"),
    ],
)
def test_malformed_records_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rollout.from_json({**_rollout().to_json(), field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logprobs", (-1.0,) * 39 + (math.nan,), "finite"),
        ("logprobs", (-1.0,) * 39, "logprobs has 39 values for 40"),
        ("mask", (1,) * 41, "mask has 41 values for 40"),
        ("finish_reason", "error", "finish_reason must be one of"),
        ("rho", (math.nan,) * 5, "rho must be finite"),
        ("weight_versions", (), "cover 0 of 40"),
    ],
)
def test_a_server_sends_no_malformed_record(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _rollout(**{field: value})


def test_missing_and_broken_json() -> None:
    for field in _rollout().to_json().keys() - {"rule"}:
        record = _rollout().to_json()
        del record[field]
        with pytest.raises(ValueError, match=f"{field} is missing"):
            Rollout.from_json(record)
    with pytest.raises(ValueError):
        Rollout.from_json('{"prompt_ids": [1, ')
    with pytest.raises(ValueError, match="record: .* should be an object"):
        Rollout.from_json("[]")


def test_drawn_blocks_are_named_and_others_are_as_before() -> None:
    """Without draws a line has no word of them: programs of earlier versions read it."""
    plain = _rollout().to_json()
    assert list(plain["plan"]) == ["pin_tokens", "window_tokens", "evict_ratio", "block_size"]
    assert [list(event) for event in plain["fold_events"]] == [["at", "blocks", "rho"]] * 5
    drawn = replace(PLAN, evict="random", evict_seed=2**40 + 1)
    record = _rollout(plan=drawn, rho=(0.5,) * 5)
    assert Rollout.from_json(record.to_line()) == record
    line = record.to_json()
    assert line["plan"] == plain["plan"] | {"evict": "random", "evict_seed": 2**40 + 1}
    assert [list(event) for event in line["fold_events"]] == [["at", "spans", "rho"]] * 5
    assert [e["at"] for e in line["fold_events"]] == [e["at"] for e in plain["fold_events"]]
    held = HeldBlocks(drawn)
    spans = [[list(span) for span in held.fold_to(fold)] for fold in range(1, 6)]
    assert [event["spans"] for event in line["fold_events"]] == spans
    for change in (
        {"fold_events": plain["fold_events"]},
        {"plan": line["plan"] | {"evict_seed": 3}},
        {"plan": plain["plan"]},
        {"plan": line["plan"] | {"evict": "newest"}},
        {"plan": plain["plan"] | {"evict_seed": 3}},
    ):
        with pytest.raises(ValueError, match="fold_events are not those of the plan|plan"):
            Rollout.from_json({**line, **change})


KEEPING = replace(PLAN, keep_tokens=8)
"""At a length of 45 it folds five times; the first two folds keep all, two blocks."""
KEPT = (None, None, b"ab", b"cd", b"\xff")


def test_what_was_kept_survives_the_round_trip() -> None:
    rollout = _rollout(plan=KEEPING, kept=KEPT)
    assert num_folds(KEEPING, 45) == 5
    line = json.loads(rollout.to_line())
    assert line["kept"] == [None, None, "YWI=", "Y2Q=", "/w=="]
    assert line["plan"]["keep_tokens"] == 8 and "evict" not in line["plan"]
    assert Rollout.from_json(rollout.to_line()) == rollout
    plain = json.loads(_rollout().to_line())  # as earlier readers know it
    assert "kept" not in plain and not {"keep_tokens", "keep_score"} & set(plain["plan"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": None}, "kept has 0 entries for 5 folds that keep tokens"),
        ({"kept": KEPT[:4]}, "kept has 4 entries for 5 folds"),
        ({"kept": (b"ab", *KEPT[1:])}, "kept: fold 0 has marks, or lacks them"),
        ({"kept": (*KEPT[:4], None)}, "kept: fold 4 has marks, or lacks them"),
        ({"plan": PLAN}, "kept has 5 entries for 0 folds"),
    ],
)
def test_what_was_kept_fits_the_plan(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _rollout(**{"plan": KEEPING, "kept": KEPT, **changes})


def test_what_ended_before_its_first_token_may_lack_it() -> None:
    """Its question may fold, and nobody knows what the folds would have kept."""
    plan = replace(KEEPING, pin_tokens=3)
    none: dict[str, Any] = {
        "prompt_ids": tuple(range(45)),
        "weight_versions": (),
        "finish_reason": "abort",
        "plan": plan,
    }
    rollout = _rollout(0, **none)
    assert rollout.kept is None and len(rollout.fold_events) == num_folds(plan, 45) > 2
    assert Rollout.from_json(rollout.to_line()) == rollout
    with pytest.raises(ValueError, match="kept has 0 entries"):
        _rollout(1, **{**none, "weight_versions": (WeightSpan(version=3, start=0, end=1),)})


def test_marks_that_are_no_base64_are_refused() -> None:
    line = _rollout(plan=KEEPING, kept=KEPT).to_json()
    line["kept"][3] = "?"
    with pytest.raises(ValueError, match="kept: .*fold 3 kept must be base64"):
        Rollout.from_json(line)
