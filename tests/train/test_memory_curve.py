"""The memory curve: one process for each step, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.train.experiments.memory_curve import ARMS, main

Tiny = Callable[[str], Path]


def test_curve_of_a_tiny_model(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--lengths", "256", "--window", "64", "--block", "16", "--out", str(tmp_path)]
    assert main([str(tiny("llama")), *words]) == 0
    rows = json.loads((tmp_path / "memory_curve.json").read_text())["rows"]
    assert [(r["arm"], r["tokens"]) for r in rows] == [(a, 256) for a in ARMS]
    assert all(r["peak_bytes"] >= r["loaded_bytes"] > 0 < r["ms_per_token"] for r in rows)
    assert (tmp_path / "memory_curve.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "| window, PTE |" in printed and "PTE / windowed LoRA" in printed


@pytest.mark.slow
def test_a_step_that_fails_is_told(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window that does not fit the blocks fails in the arms that have one, and only there."""
    words = ["--lengths", "64", "--window", "60", "--block", "16", "--out", str(tmp_path)]
    assert main([str(tiny("llama")), *words]) == 0
    table = capsys.readouterr().out
    assert table.count("failed:") == 2 and "multiple" in table
