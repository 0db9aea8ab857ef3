"""`pte-vllm plan --keep`: what a fold that keeps tokens costs, against what really runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pte_vllm.bench.sizing.hardware import GPUS
from pte_vllm.bench.sizing.keep_fold import KERNEL_LAUNCHES, PROBES, SMALL_LAUNCHES, fold_cost
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
    assert fold["kernel_launches"] == KERNEL_LAUNCHES and 0 < fold["share_of_step"] < 0.02
    assert main([*words[:-3], "100"]) == 2
    assert "multiple" in capsys.readouterr().err
