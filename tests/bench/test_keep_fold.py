"""`pte-vllm plan --keep`: what a fold that keeps tokens costs, against what really runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pte_vllm.bench.sizing.hardware import GPUS
from pte_vllm.bench.sizing.keep_fold import (
    KERNEL_LAUNCHES,
    PROBES,
    SMALL_LAUNCHES,
    fold_cost,
    folds_of_rollout,
)
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.roofline import plan_rows
from pte_vllm.cli.main import main
from pte_vllm.method.keep_marks import num_candidates, packed
from pte_vllm.method.plan import FoldPlan
from tests.bench.test_roofline import QWEN_7B

ROOT = Path(__file__).parents[2]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN_7B))
    return file


@pytest.mark.parametrize(("layers", "seqs"), [(1, 1), (3, 2)])
def test_launches_do_not_grow_with_layers_or_sequences(layers: int, seqs: int) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.keep_launches", str(layers), str(seqs)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"kernels": KERNEL_LAUNCHES, "small": SMALL_LAUNCHES}


def test_counts_by_hand(qwen: Path) -> None:
    plan = FoldPlan(pin_tokens=0, window_tokens=2048, block_size=16, keep_tokens=512)
    cost = fold_cost(Model.load(str(qwen)), plan, 2)
    layers, heads, dim, keep, leave = 28, 4, 128, 512, 512
    assert cost.every_tokens == leave
    assert cost.kept_bytes == 2 * layers * heads * dim * 2 * keep == 28 * 2**20
    scored = 2 * dim * PROBES * (keep + leave + leave) + 2 * dim * PROBES * (keep + leave)
    assert cost.operations == layers * heads * (scored + 2 * dim * (keep + leave))
    marks = torch.zeros(layers, heads, num_candidates(plan, 5), dtype=torch.bool)
    assert cost.record_bytes == packed(marks).nbytes == 14 * 1024


def test_kept_tokens_count_in_the_memory(qwen: Path) -> None:
    options = dict(rollout_tokens=32 * 1024, prompt_tokens=64, rank=0)
    _, none, kept, larger = plan_rows(
        Model.load(str(qwen)), GPUS["h200"], windows=[2048, 2560], keeps=[0, 512], **options
    )[:4]
    assert none.kv_tokens + 512 == kept.kv_tokens == larger.kv_tokens
    assert kept.sequences == larger.sequences and kept.step_s == larger.step_s


def test_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["plan", "--model", str(qwen), "--window", "2k", "--keep", "0,512", "--rank", "0"]
    assert main([*words, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "one fold of one sequence" in said and "launches" in said and "state" not in said
    (fold,) = json.loads(file.read_text())["folds"]
    assert fold["kernel_launches"] == KERNEL_LAUNCHES and fold["folds_per_rollout"] == 60
    assert 0.02 < fold["share_of_step"] < 0.03


def test_share_of_the_time_counts_the_folds_of_a_rollout(qwen: Path) -> None:
    plan = FoldPlan(pin_tokens=64, window_tokens=2048, block_size=16, keep_tokens=512)
    # The last token is never computed, so a fold right before it does not come.
    assert [folds_of_rollout(plan, n) for n in (1, 2049, 2050, 2561, 2562)] == [0, 0, 1, 1, 2]
    cost = fold_cost(Model.load(str(qwen)), plan, 2)
    gpu = GPUS["h200"]
    share = cost.share_of_step(gpu, sequences=10, step_s=0.5, folds_per_token=2 / 2562)
    assert share == pytest.approx(cost.seconds(gpu) * 2 * 10 / (2562 * 0.5))


def test_a_rollout_that_ends_before_its_first_fold(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    words = ["--window", "1k,4k", "--keep", "512,512", "--rollout", "2k", "--json", str(file)]
    assert main(["plan", "--model", str(qwen), *words]) == 0
    said = capsys.readouterr().out
    some, none = json.loads(file.read_text())["folds"]  # 512 twice is 512
    assert some["folds_per_rollout"] == 4 and some["share_of_step"] > 0
    assert none["folds_per_rollout"] == none["share_of_step"] == 0
    assert re.search(r"folds of a rollout +│ +4 │ +no fold │", said)
    assert "before their first fold (at token 4,352 with a window of 4,096)" in said


def test_tables_fit_80_columns(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--window", "16k,128k", "--keep", "16k,128k", "--rollout", "1024k", "--gpu", "b200"]
    fast = ["--memory-gb", "9999", "--bandwidth-gb-s", "99999", "--tflops", "99999"]
    assert main(["plan", "--model", str(qwen), *words, *fast]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line[:1] in "┏┃│"]
    assert "…" not in said and max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert ["full", "", "524,544"] in [row[:3] for row in rows]
    assert ["131,072", "131,072", "262,416"] in [row[:3] for row in rows]
    assert sum(row[0] == "bytes of the record" for row in rows) == 2  # three pairs, then the fourth


def test_bench_keep_names_the_flag() -> None:
    kept = pytest.importorskip("pte_vllm.bench.kept")
    for given, said in (
        ({"keep": 33}, "--keep does not fit blocks, which have 32 tokens"),
        ({"keep": 0}, "--keep must be at least one block of 32"),
        ({"window": 100}, "--window does not fit blocks, which have 32 tokens"),
        ({"window": 0}, "--window must be at least two blocks"),
    ):
        with pytest.raises(ValueError, match=said):
            kept.run(Namespace(**{"window": 64, "keep": 32, "prompt": 16, "tokens": 2, **given}))
