"""The memory experiment's small variant: what a state remembers, the controls do not."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from pte_vllm.train.experiments.memory import main

CHANCE = 0.15
"""Well above one in 32 nodes, well below any memory."""


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
    assert (tmp_path / "quick.png").stat().st_size > 0 and (tmp_path / "quick.md").exists()
