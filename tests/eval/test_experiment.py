"""`pte-vllm train experiment thoughts --quick`: every step, on a real server with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.cli.train import main as train_command
from pte_vllm.eval import experiment_steps
from pte_vllm.eval.experiment import parse
from tests.harness.engine import BLOCK
from tests.harness.server import Server


@pytest.mark.slow
def test_quick(
    shared: Callable[..., Server],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = shared("open", {})
    command = ["experiment", "thoughts", str(tiny("qwen3")), "--quick", "--out", str(tmp_path)]
    command += ["--task", "chain_sum", "--block-size", str(BLOCK), "--url", server.url]
    assert train_command(command) == 0
    rows = {
        row["memory"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    }
    assert set(rows) == {
        "full cache",
        "window 64",
        "window 96",
        "window 64, attention sinks",
        "window 64, keeping 32",
        "window 64, keeping 32 at random",
        "window 64, lora",
        "window 64, ridge",
        "window 64, keep-probes",
        "window 64, keep-ridge",
    }
    for memory, row in rows.items():
        assert 0 <= row["accuracy"] <= 1 and "error" not in row
        assert (row["kl"] > 0) == (memory != "full cache")
    assert rows["window 64, ridge"]["state_bytes"] > rows["window 64, lora"]["state_bytes"] == 0
    assert rows["window 96"]["kl"] < rows["window 64"]["kl"]
    assert "window 64, ridge" in (tmp_path / "table.md").read_text()
    # Arms that keep tokens kept them, in the replay and on the server.
    for name in ("keeping 32", "keep-probes", "keep-ridge"):
        assert rows[f"window 64, {name}"]["kv_tokens"] == rows["window 64"]["kv_tokens"] + 32
    untrained, probes = rows["window 64, keeping 32"], rows["window 64, keep-probes"]
    assert untrained["kl"] < rows["window 64"]["kl"] and probes["kl"] != untrained["kl"]
    assert (tmp_path / "arms" / "keep-probes-0" / "adapter" / "pte_probes.safetensors").exists()

    # Nothing that is finished is done again.
    def never(*_: object) -> None:
        raise AssertionError("this was done before")

    for step in ("sample_on_server", "distil", "fidelity.run"):
        monkeypatch.setattr(f"{experiment_steps.__name__}.{step}", never)
    assert train_command(command) == 0
    with pytest.raises(ValueError, match="--steps is 3, but .* was made with 2"):
        train_command([*command, "--steps", "3"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--arms", "lora,rigde"], "--arms must be among"),
        (["--held", "600"], "--held 600 leaves nothing"),
        (["--window", "33"], "33 must be a multiple of --block-size"),
        (["--steps", "0"], "--steps must be positive"),
    ],
)
def test_mistakes(wrong: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(["MODEL", *wrong])
