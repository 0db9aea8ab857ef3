"""`pte-vllm bench` on a tiny model: what it runs and writes. Figures: docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pte_vllm.bench.watch import growth
from pte_vllm.cli.main import main


@pytest.fixture
def bench(
    tiny: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[str, dict[str, Any]]]:
    def run(line: str) -> tuple[str, dict[str, Any]]:
        """What it printed, and its JSON."""
        what, *options = line.split()
        model = str(tiny("llama"))
        common = ["--model", model, "--dtype", "float32", "--window", "64", "--rank", "8"]
        words = ["bench", what, *common, "--out", str(tmp_path), "--repeats", "1", *options]
        assert main(words) == 0
        assert (tmp_path / f"{what}.png").stat().st_size > 0
        return capfd.readouterr().out, json.loads((tmp_path / f"{what}.json").read_text())

    return run


def test_fold_finds_the_steps_that_fold(bench: Callable) -> None:
    shown, found = bench("fold --seqs 3 --tokens 300 --eager")
    # 1 pinned block, a window of 2: folds before positions 96, 128, ..., 320 of 331 read.
    assert len(found["folding_ms"]) == 8
    assert len(found["usual_ms"]) == 300 - 8
    assert "of a step" in shown and "cores of" in found["machine"]


@pytest.mark.slow
def test_profile_of_parts_that_do_not_overlap(bench: Callable) -> None:
    shown, found = bench("profile --seqs 2 --prompt 20 --tokens 100 --eager")
    parts = found["parts_ms"]
    # What is counted twice is missing in "all else", the rest of the step.
    for part in ("attention", "LoRA and states", "folds", "output layer", "all else"):
        assert parts[part][0] > 0 and part in shown


@pytest.mark.slow
def test_kept_tokens_against_as_many_blocks(bench: Callable) -> None:
    _, found = bench("keep --keep 32 --seqs 3 --prompt 20 --tokens 100 --eager")
    # 1 pinned block, a window of 2, 1 kept block; between folds half a block less.
    assert found["held_tokens"] == 32 + 64 + 32 - 16
    names = ["vLLM, as many blocks", "window, as many blocks", "window, keeping 32"]
    assert list(found["tokens_per_second"]) == names
    assert 0 < found["share_of_folds"][0] < 0.5


def test_kept_tokens_that_do_not_fit(tiny: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "keep", "--model", str(tiny("llama"))]
    for options, said in ((["--keep", "0"], "--keep"), (["--tokens", "9999"], "--tokens 9999")):
        assert main([*words, *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_throughput_in_a_small_pool(bench: Callable) -> None:
    shown, found = bench("throughput --seqs 6 --group 3 --prompt 40 --tokens 400 --pool 2")
    assert found["pool_blocks"] == 2 * 14
    running = found["running"]
    assert running["vLLM, full cache"] < running["window, PTE"] == 6.0
    assert "ratio to the first" in shown


@pytest.mark.slow
def test_prefix_is_read_once(bench: Callable) -> None:
    _, found = bench("prefix --group 4 --prompt 130 --tokens 5")
    cached = {name: runs[0] for name, runs in found["cached_tokens"].items()}
    assert cached["window, PTE, no prefix caching"] == 0
    assert cached["window, PTE"] == cached["vLLM, prefix caching"] == 3 * 128


@pytest.mark.slow
def test_lora_latency_and_push(bench: Callable) -> None:
    _, found = bench("lora --seqs 2 --prompt 20 --tokens 20")
    assert len(found["tokens_per_second"]) == 5
    _, found = bench("huge-pages --seqs 2 --prompt 20 --tokens 20 --eager")
    assert set(found["tokens_per_second"]) == {"huge pages", "small pages"}
    _, found = bench("latency --positions 100,300 --tokens 5")
    assert [len(row) for row in found["ms_per_token"].values()] == [2, 2]
    _, found = bench("push --streams 3 --tokens 10 --seconds 4 --every 1")
    assert len(found["push_to_first_token_s"]) >= 2
    assert all(rate > 0 for runs in found["tokens_per_second"].values() for rate in runs)


@pytest.mark.slow
def test_soak(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tests of engines set it for the whole process; a server of users' has a worker of its own.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    words = ["bench", "soak", "--model", str(tiny("llama")), "--dtype", "float32", "--rank", "8"]
    words += ["--window", "64", "--streams", "6", "--tokens", "120", "--pool", "40"]
    words += ["--minutes", "0.3", "--every", "2", "--out", str(tmp_path)]
    status = main(words)
    shown, found = capfd.readouterr().out, json.loads((tmp_path / "soak.json").read_text())
    assert status == 0 and found["errors"] == [] and "0 errors" in shown, shown
    assert {"chat", "chat, first chunk", "push", "rollout", "score"} <= found["seconds"].keys()
    assert found["tokens"] > 0 and max(found["drift"]) < 1e-3
    # Right scores may agree to the last bit; wrong ones may not.
    assert max(found["surprise"]) > 1.0 and max(found["unfolded"]) > 1e-2
    assert 0 < max(found["series"]["blocks"]) <= 40 and max(found["series"]["slots"]) > 0
    assert {"API server", "engine core", "worker"} == found["growth"].keys()
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_growth_is_told_from_noise() -> None:
    seconds = [float(s) for s in range(600)]
    steady = [500.0 + 30 * (s % 7 == 0) for s in range(600)]  # taken, and given back
    leaking = [mib + s / 20 for s, mib in enumerate(steady)]
    warming = [500.0 + min(s, 100) for s in range(600)]
    assert growth(seconds, leaking).significant
    assert growth(seconds, leaking).mib_per_minute == pytest.approx(3.0, rel=0.05)
    for mib in (steady, warming, leaking[:3]):
        assert not growth(seconds[: len(mib)], mib).significant
    assert not growth([], []).significant


def test_mistakes_name_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "lora", "--model", str(tmp_path / "absent")]) == 2
    assert "--model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["bench", "fold", "--model", str(tmp_path), "--repeats", "0"]) == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "speed"])


def test_schedule_beside_vllm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No time is judged here: what is counted must add up."""
    words = "--seqs 4 --positions 100,3000 --steps 40 --repeats 1 --requests 24 --peaks 4"
    options = [*words.split(), "--tokens", "150", "--window", "64", "--out", str(tmp_path)]
    assert main(["bench", "schedule", *options]) == 0
    shown, found = capfd.readouterr().out, json.loads((tmp_path / "schedule.json").read_text())
    assert "CPU ms a step" in shown and "computed twice" in shown
    assert set(found["ms_per_step"]) == {"4 at 100", "4 at 3000"}
    prompt, window = (
        found["crowded"]["when its prompt fits"],
        found["crowded"]["when its window fits"],
    )
    assert window["preemptions"] == 0 and window["tokens_computed"] == window["tokens_needed"]
    assert window["mean_running"] <= 4
    assert prompt["preemptions"] > 0 and prompt["tokens_computed"] > prompt["tokens_needed"]
