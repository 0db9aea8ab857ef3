"""The stage `keep`: probes learn which tokens later queries attend to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill import keep_stage
from pte_vllm.train.distill.loop import train
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.replay.modeling import PTEModel
from tests.train.rollouts import make_rollout

Tiny = Callable[[str], Path]
BLOCK = 16
PLAN = FoldPlan(pin_tokens=20, window_tokens=64, block_size=BLOCK, keep_tokens=32)


def queries(num_probes: int = 8) -> torch.Tensor:
    return torch.randn(3, 2, num_probes, 32, generator=torch.Generator().manual_seed(3))


def run_of(model: Path, rollouts: Path, out: Path, probes: Path, **more: Any) -> DistillRun:
    values: dict[str, Any] = {
        "model": {"base": str(model)},
        "adapter": {"rank": 4, "plain": True},
        "plan": {
            "window_tokens": 64,
            "block_size": BLOCK,
            "keep_tokens": 32,
            "probes": str(probes),
        },
        "keep": {"steps": 3},
        "optimizer": {"steps": 0},
        "distill": {"data": "rollouts", "rollouts": str(rollouts), "eval_sequences": 2},
        "run": {"out": str(out), "tensorboard": False},
    }
    for section, options in more.items():
        values[section] |= options
    return DistillRun.model_validate(values)


@pytest.fixture
def answers(tiny: Tiny, tmp_path: Path) -> Path:
    """Twelve answers, as `eval thoughts` writes them."""
    model = PTEModel.from_pretrained(tiny("llama"))
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps(make_rollout(model, index=i, tokens=160).to_json()) for i in range(12)]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_adapter_brings_trained_probes(
    tiny: Tiny,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, start, out = tiny("llama"), tmp_path / "start.safetensors", tmp_path / "out"
    Probes.of(queries(16), "of this model").save(start)
    train(run_of(model, answers, out, start, keep={"probes": 8}))
    said = capsys.readouterr().err
    assert all(f"keep: training: {step} of 3" in said for step in (1, 2, 3))
    shape = ModelShape.from_hf(AutoModelForCausalLM.from_pretrained(model).config)
    own = Adapter.load(out / "adapter", shape).probes
    assert own is not None and own.queries.shape == (3, 2, 8, 32)
    assert own.model_hash == "of this model"
    assert own.content_hash == Probes.load(out / keep_stage.PROBES_FILE).content_hash
    assert not torch.equal(own.queries, queries(16)[:, :, :8])
    report = json.loads((out / keep_stage.REPORT_FILE).read_text())
    assert report["loss_after"] < report["loss_before"]

    # A run that goes on does not train them again, and its steps keep them.
    def never(*_: object, **__: object) -> None:
        raise AssertionError("they were trained before")

    monkeypatch.setattr(keep_stage, "train_probes", never)
    train(run_of(model, answers, out, start, keep={"probes": 8}, optimizer={"steps": 1}))
    later = Adapter.load(out / "adapter", shape)
    assert later.probes is not None and later.probes.content_hash == own.content_hash
    assert any(bool(b.any()) for b in later.lora_b.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": {"probes": 99}}, "--keep.probes 99: .* has 16 for each KV head"),
        ({"plan": {"keep_tokens": 128}}, "0 answers are long enough"),
    ],
)
def test_mistakes(
    wrong: dict[str, Any], message: str, tiny: Tiny, answers: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start.safetensors"
    Probes.of(queries(16), "none").save(start)
    with pytest.raises(ValueError, match=message):
        train(run_of(tiny("llama"), answers, tmp_path / "out", start, **wrong))


def test_probes_are_needed(tiny: Tiny, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--keep.steps trains the probes"):
        run_of(
            *(tiny("llama"), answers, tmp_path / "out", tmp_path / "none"),
            plan={"keep_tokens": 0, "probes": None},
        )
