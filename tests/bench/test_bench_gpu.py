"""`pte-vllm bench gpu --dry-run`: the script is sound, as far as a CPU can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pte_vllm.cli.main import main


def test_kernels_and_their_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "gpu", "--dry-run", "--parts", "kernels", "--out", str(tmp_path)]
    assert main(command) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["kernels"]
    assert {row["kernel"] for row in found["result"]} == {"fold", "modulate"}
    assert all(row["error"] < 1e-5 for row in found["result"])
    assert "Dry run" in (tmp_path / "gpu.md").read_text()
    capfd.readouterr()
    found["result"][0]["size"] = "kept from before"  # what is there is not run again
    (tmp_path / "gpu.json").write_text(json.dumps({"kernels": found}))
    assert main(command) == 0
    assert "kept from before" in capfd.readouterr().out


@pytest.mark.slow
def test_engines(tmp_path: Path) -> None:
    parts = "parity,throughput,profile"
    command = ["bench", "gpu", "--dry-run", "--parts", parts, "--out", str(tmp_path)]
    assert main([*command, "--arms", "full,pte-128", "--minutes", "30"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    worst = found["parity"]["result"]
    assert max(worst["largest_difference"].values()) <= worst["tolerance"]
    assert min(worst["folds"].values()) >= 2
    for arm in ("full", "pte-128"):
        (run,) = found[f"throughput {arm}"]["result"]["runs"]
        assert run["sequences"] == 3 and run["tokens_per_second"] > 0
    assert found["profile"]["result"]["fold_host_ms"] > 0
    assert (tmp_path / "gpu.png").stat().st_size > 0
    # Out of time: nothing new is started, and the status says so.
    assert main([*command, "--minutes", "0.001"]) == 1


def test_mistakes_name_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (
        (["--parts", "kernel"], "--parts"),
        (["--windows", "2x"], "--windows"),
        (["--seconds", "0"], "--seconds"),
        (["--dry-run", "--parts", "throughput", "--arms", "half"], "--arms"),
    ):
        assert main(["bench", "gpu", *options, "--out", str(tmp_path)]) == 2
        assert named in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
        assert "--dry-run" in capsys.readouterr().err
