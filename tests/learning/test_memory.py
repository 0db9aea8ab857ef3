"""The memory experiment: what it runs and writes, and that a state remembers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from pte_vllm.train.experiments import memory_plans
from pte_vllm.train.experiments.memory import main

CHANCE = 0.15
"""Well above one in 32 nodes, well below any memory."""


def test_arms_are_trained_scored_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = memory_plans.QUICK_PLAN
    budget = replace(plan.budget, eval_gaps=(40,))
    plan = replace(plan, base=replace(plan.base, steps=8), budget=budget)
    monkeypatch.setattr(memory_plans, "QUICK_PLAN", plan)
    words = ["--quick", "--jobs", "1", "--steps", "2", "--out", str(tmp_path)]
    assert main([*words, "--arms", "full,window,ridge"]) == 0
    runs = json.loads((tmp_path / "quick.json").read_text())["runs"]
    arms = ["full cache", "window only", "PTE ridge"]
    assert [run["arm"] for run in runs] == arms
    assert {s["task"] for run in runs for s in run["scores"]} == {"recall", "passkey"}
    assert (tmp_path / "quick.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert all(arm in shown and arm in (tmp_path / "quick.md").read_text() for arm in arms)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*words, "--arms", "full,window,ridge"]) == 0  # nothing is left to do
    written = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert written == {"quick.json", "quick.md", "quick.png"}


@pytest.mark.slow
def test_a_state_remembers_and_the_controls_do_not(tmp_path: Path) -> None:
    assert main(["--quick", "--jobs", "1", "--out", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "quick.json").read_text())["runs"]
    found = {
        (run["arm"], task): mean(s["accuracy"] for s in run["scores"] if s["task"] == task)
        for run in runs
        for task in ("recall", "passkey")
    }
    for task in ("recall", "passkey"):
        assert found["full cache", task] > 0.95
        for control in ("window only", "LoRA_c", "Global-Only"):
            assert found[control, task] < CHANCE, f"{control} on {task}"
    assert found["PTE ridge", "passkey"] > 0.8 * found["full cache", "passkey"]
    assert found["PTE ridge", "recall"] > 0.45 * found["full cache", "recall"]
