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
from pte_vllm.method import keep
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill import keep_stage
from pte_vllm.train.distill.examples import Example
from pte_vllm.train.distill.future_attention import look_ahead
from pte_vllm.train.distill.loop import train
from pte_vllm.train.distill.probe_training import log_shares, train_probes
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.replay.modeling import PTEModel
from tests.harness.models import random_tokens
from tests.train.rollouts import make_rollout

Tiny = Callable[[str], Path]
BLOCK = 16
PLAN = FoldPlan(pin_tokens=20, window_tokens=64, block_size=BLOCK, keep_tokens=32)


def queries(num_probes: int = 8) -> torch.Tensor:
    return torch.randn(3, 2, num_probes, 32, generator=torch.Generator().manual_seed(3))


def example(num_tokens: int = 190, seed: int = 1) -> Example:
    return Example(tokens=tuple(random_tokens(num_tokens, seed=seed)), plan=PLAN)


def test_scores_are_those_of_a_fold() -> None:
    g = torch.Generator().manual_seed(0)
    probes, keys, newest = (torch.randn(2, n, 32, generator=g) for n in (7, 12, 5))
    values = torch.randn(2, 12, 32, generator=g)
    found = log_shares(probes, keys, newest, 0.3).exp() * values.norm(dim=-1)
    torch.testing.assert_close(found, keep.expected_scores(probes, keys, values, newest, 0.3))
    # A share that is too small for a number has a score and a gradient, both finite.
    far = (400 * keys).requires_grad_()
    scores = log_shares(probes, far, newest, 0.3)
    scores.sum().backward()
    assert bool(keep.expected_scores(probes, far, values, newest, 0.3).eq(0).any())
    assert bool(scores.isfinite().all()) and far.grad is not None
    assert bool(far.grad.isfinite().all())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_worth_is_later_attention(architecture: str, tiny: Tiny) -> None:
    """Against the attention weights that transformers itself returns."""
    path, chosen = tiny(architecture), example()
    model = PTEModel.from_pretrained(path)
    future = look_ahead(model, chosen)
    assert future is not None
    assert future.folds == tuple(f for f in range(PLAN.folds(189)) if PLAN.selects(f))
    eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        output = eager(torch.tensor([chosen.tokens]), output_attentions=True, use_cache=True)
    first = PLAN.pinned_blocks * BLOCK
    for layer, shares in enumerate(output.attentions):
        past = output.past_key_values.layers[layer]
        keys, norms = past.keys[0, :, first:], past.values[0, :, first:].norm(dim=-1)
        torch.testing.assert_close(future.keys[layer].float(), keys, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(future.norms[layer].float(), norms, atol=2e-3, rtol=2e-3)
        for i, fold in enumerate(future.folds):
            start = PLAN.first_fold + fold * PLAN.stride
            later = shares[0, :, start:, first:start].unflatten(0, (len(keys), -1))
            wanted = later.square().mean((1, 2)).sqrt() * norms[:, : start - first]
            found = future.worth[layer, :, i].float()
            torch.testing.assert_close(found[:, : start - first], wanted, atol=1e-3, rtol=1e-2)
            assert not bool(found[:, start - first :].any())


def test_short_answers_choose_nothing(tiny: Tiny) -> None:
    model = PTEModel.from_pretrained(tiny("llama"))
    assert look_ahead(model, example(110)) is None
    with pytest.raises(ValueError, match="0 answers are long enough that a fold chooses"):
        train_probes(model, [example(110)] * 3, queries(), steps=1, lr=0.1, batch_folds=1, seed=0)


def test_training_finds_what_is_attended_to(tiny: Tiny) -> None:
    model = PTEModel.from_pretrained(tiny("llama"))
    answers = [example(170 + i, seed=i) for i in range(6)]
    heard: list[tuple[str, int, int]] = []

    def run(seed: int) -> Any:
        return train_probes(
            *(model, answers, queries()),
            steps=30,
            lr=0.2,
            batch_folds=2,
            seed=seed,
            progress=lambda *what: heard.append(what),
        )

    probes, report = run(0)
    assert report.loss_after < 0.95 * report.loss_before
    assert report.caught_after > report.caught_before
    assert heard[5] == ("reading", 6, 6) and heard[-1] == ("training", 30, 30)
    again, _ = run(0)
    torch.testing.assert_close(again, probes)
    other, _ = run(1)
    assert not torch.allclose(other, probes)


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
    tiny: Tiny, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start, out = tiny("llama"), tmp_path / "start.safetensors", tmp_path / "out"
    Probes.of(queries(16), "of this model").save(start)
    train(run_of(model, answers, out, start, keep={"probes": 8}))
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
