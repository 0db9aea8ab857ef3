"""The experiment about conversations, with a model that has learned nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pte_vllm.train.experiments import turns_plans
from pte_vllm.train.experiments.turns import main


@pytest.mark.slow
def test_arms_are_trained_scored_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = turns_plans.QUICK_PLAN
    budget = replace(plan.budget, eval_distances=(1, 8), eval_size=8, batch_size=4)
    plan = replace(plan, base=replace(plan.base, steps=8), budget=budget)
    monkeypatch.setattr(turns_plans, "QUICK_PLAN", plan)
    words = ["--quick", "--jobs", "1", "--steps", "2", "--out", str(tmp_path)]
    assert main([*words, "--arms", "full,window 16,ridge"]) == 0
    runs = json.loads((tmp_path / "quick.json").read_text())["runs"]
    arms = ["full cache", "window 16", "window 16, keeping 16"]
    arms += ["window 16, keeping 16, trained probes", "window 16, keeping 16 at random"]
    arms += ["LoRA_c, window 16", "PTE ridge squared"]
    assert [run["arm"] for run in runs] == arms
    assert [(s["task"], s["turns"]) for s in runs[0]["scores"]] == [("facts", 1), ("facts", 8)]
    assert [len(run["losses"]) for run in runs] == [0, 0, 0, 0, 0, 2, 2]
    assert (tmp_path / "quick.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert all(arm in shown and arm in (tmp_path / "quick.md").read_text() for arm in arms)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*words, "--arms", "full,window 16,ridge"]) == 0  # nothing is left to do
    written = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert written == {"quick.json", "quick.md", "quick.png"}


def test_mistakes() -> None:
    for words, message in (
        (["--tasks", "walk"], "--tasks: 'walk' is none of facts, tool"),
        (["--arms", "nobody"], "--arms: 'nobody' fits none of"),
        (["--seeds", "a"], "--seeds must look like"),
        (["--jobs", "0"], "--jobs must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            main(words)
