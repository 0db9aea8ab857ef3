"""Fidelity by the replay: the figures are those of plain forwards, and arms share their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.cli.eval import main as eval_command
from pte_vllm.eval.fidelity_arms import (
    Eviction,
    FidelityArm,
    build_arms,
    kv_bytes_per_token,
)
from pte_vllm.eval.fidelity_replay import measure
from pte_vllm.eval.fidelity_tokens import Answers
from pte_vllm.eval.weights import in_kv_tokens, state_bytes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill.examples import Example
from pte_vllm.train.distill.step import evaluate
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.wire.rollout import Rollout, WeightSpan
from tests.harness.models import random_tokens

BLOCK = 16
EVICTION = Eviction(block_size=BLOCK, evict_ratio=0.5)
Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


def example(pin_tokens: int, num_tokens: int, window_tokens: int = 2 * BLOCK) -> Example:
    plan = EVICTION.plan(pin_tokens, window_tokens)
    return Example(tokens=tuple(random_tokens(num_tokens, seed=num_tokens)), plan=plan)


def examples() -> list[Example]:
    return [example(7, 190), example(41, 203), example(20, 121)]


def thoughts(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write answers as a server under full attention does: (question, whole) lengths."""
    lines = []
    for i, (question, whole) in enumerate(sizes):
        tokens, num_answer = random_tokens(whole, seed=whole), whole - question
        rollout = Rollout(
            prompt_ids=tuple(tokens[:question]),
            completion_ids=tuple(tokens[question:]),
            logprobs=(-1.0,) * num_answer,
            mask=(1,) * num_answer,
            finish_reason="length",
            adapter=None,
            weight_versions=(WeightSpan(version=0, start=0, end=num_answer),),
            plan=FoldPlan(pin_tokens=question, window_tokens=0, block_size=32),
            group_id=str(i),
            index=0,
            num_preempted=None,
        )
        lines.append(rollout.to_line().decode() + "\n")
    path.write_text("".join(lines))
    return path


def test_figures_are_those_of_plain_forwards(tiny: Tiny, adapters: Adapters) -> None:
    """Against whole distributions of plain forwards, and against a distillation's measurement."""
    path, chosen = tiny("llama"), examples()
    adapter = Adapter.load(adapters(path))
    arms = build_arms([32, 64], {"a": 0}, eviction=EVICTION, bytes_per_token=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = measure(model, chosen, arms, {"a": adapter}, batch_sequences=2)
    assert not found.kl_is_bound and list(found.arms) == ["window 32", "window 64", "a"]
    chosen = sorted(chosen, key=lambda e: len(e.tokens))
    wanted = [(b, t) for b, e in enumerate(chosen) for t, w in enumerate(e.wanted) if w]
    assert found.sequence.tolist() == [b for b, _ in wanted]
    starts = [e.plan.first_fold + 1 for e in chosen]
    assert found.distance.tolist() == [t - starts[b] for b, t in wanted]
    with torch.no_grad():
        logits = [model(torch.tensor([e.tokens])).logits[0] for e in chosen]
    full = torch.stack([logits[b][t - 1] for b, t in wanted]).log_softmax(-1)
    own = torch.tensor([chosen[b].tokens[t] for b, t in wanted])
    losses = -full.gather(1, own[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.losses_full, losses, atol=1e-4)
    # Before its own first fold a larger window has forgotten nothing.
    larger = found.arms["window 64"]
    assert 0 < larger.own.sum() < len(wanted) and found.arms["window 32"].own.all()
    np.testing.assert_allclose(larger.losses[~larger.own], losses[~larger.own], atol=1e-4)
    assert np.abs(larger.kls[~larger.own]).max() < 1e-5 and larger.same_top[~larger.own].all()
    assert larger.kls[larger.own].mean() > 0.05 and not larger.same_top[larger.own].all()
    # A distillation measures the same.
    student = PTEModel(model, adapter)
    expected = evaluate(student, examples())
    student.detach()
    means = {name: (arm.losses.mean(), arm.kls.mean()) for name, arm in found.arms.items()}
    assert means["window 32"] == pytest.approx((expected.loss_window, expected.kl_window), rel=1e-4)
    assert means["a"] == pytest.approx((expected.loss_student, expected.kl_student), rel=1e-4)


def test_windows_side_by_side_of_one_arm(tiny: Tiny) -> None:
    """The control `sinks` has a window for each length of question, and holds what the plain one
    holds; plans that differ are replayed apart, each token in its place."""
    chosen = examples()
    arms = build_arms([64], {}, eviction=EVICTION, bytes_per_token=1, sinks=True)
    plain, sinks = (arm.plan(41) for arm in arms)
    assert (sinks.pin_tokens, sinks.window_tokens) == (4, 64 + 2 * BLOCK)
    assert (sinks.first_fold, sinks.stride) == (plain.first_fold, plain.stride)
    assert sinks.peak_blocks(300) == plain.peak_blocks(300)
    chosen = [example(e.plan.pin_tokens, len(e.tokens), 64) for e in chosen]
    model = PTEModel.from_pretrained(tiny("qwen2")).base
    together = measure(model, chosen, arms, {}, batch_sequences=3)
    apart = measure(model, chosen, arms, {}, batch_sequences=1)
    for name in ("window 64", "sinks"):
        for what in ("losses", "kls"):
            found, expected = (getattr(m.arms[name], what) for m in (together, apart))
            np.testing.assert_allclose(found, expected, atol=1e-4)
    difference = together.arms["sinks"].kls - together.arms["window 64"].kls
    assert np.abs(difference).max() > 0.01


def test_equal_bytes_and_arms_that_are_one(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    shape = ModelShape.from_hf(AutoModelForCausalLM.from_pretrained(path).config)
    assert kv_bytes_per_token(shape, "bfloat16") == 2 * 3 * (2 * 32) * 2
    sizes = {
        rule: state_bytes(Adapter.load(adapters(path, rule=rule)), "float32")
        for rule in ("paper", "ridge", "delta")
    }
    layers, square = 3, 8 * 8
    assert sizes["paper"] == 4 * layers * square
    assert sizes["ridge"] == 4 * layers * (square + 8 * 9 // 2)  # S, and half of C
    assert sizes["delta"] == 4 * layers * (square + 2)
    assert state_bytes(Adapter.load(adapters(path, plain=True)), "bfloat16") == 0
    assert in_kv_tokens(769, 768) == 2 and in_kv_tokens(0, 768) == 0
    arms = build_arms([32, 48], {"r": 769, "p": 0}, eviction=EVICTION, bytes_per_token=768)
    assert [(a.name, a.kind, a.window_tokens) for a in arms] == [
        ("window 32", "window", 32),
        ("window 48", "window", 48),
        ("r", "adapter", 32),
        ("bytes of r", "equal-bytes", 48),  # two tokens are a block
        ("p", "adapter", 32),
    ]
    assert arms[1].does == arms[3].does
    heard: list[str] = []
    ran = [arms[0], arms[1], arms[3]]
    found = measure(
        PTEModel.from_pretrained(path).base,
        examples()[:1],
        ran,
        {},
        batch_sequences=1,
        on_done=heard.append,
    )
    assert heard == ["full attention", "window 32", "window 48"]
    assert np.array_equal(found.arms["window 48"].kls, found.arms["bytes of r"].kls)


def test_tokens_that_a_fold_frees() -> None:
    eviction = Eviction(block_size=32, evict_tokens=32)
    for window in (64, 96, 128, 160, 1024):
        arm = FidelityArm(name="w", kind="window", window_tokens=window, eviction=eviction)
        assert arm.plan(50).stride == 32
    for wrong in (16, 64, 96):
        with pytest.raises(ValueError, match=f"--evict-tokens {wrong}"):
            Eviction(block_size=32, evict_tokens=wrong).plan(0, 64)
    with pytest.raises(ValueError, match="--window.*not a multiple"):
        build_arms([33], {}, eviction=EVICTION, bytes_per_token=1)


def test_errors_are_of_answers() -> None:
    """Tokens of one answer that are all alike count once; differences within answers are exact."""
    generator = np.random.default_rng(1)
    level = generator.normal(size=400)
    sequence = np.repeat(np.arange(400), 10)
    values = level[sequence]
    answers = Answers(sequence)
    found = answers.mean(values)
    assert found.value == pytest.approx(level.mean())
    assert found.error == pytest.approx(level.std() / math.sqrt(400), rel=0.1)
    assert answers.mean(values - (values - 0.5)).error < 1e-12
    assert answers.share(0.25 * (values + 9), values + 9).as_json() == pytest.approx([0.25, 0])
    assert answers.mean(values, np.zeros(4000, bool)).as_json() == [None, None]
    assert Answers(np.zeros(3, int)).mean(np.ones(3)).as_json() == [1.0, None]  # of one answer
    assert answers.by_answer(values) == pytest.approx(level.tolist())


def test_command(tiny: Tiny, adapters: Adapters, tmp_path: Path) -> None:
    path = tiny("llama")
    file = thoughts(tmp_path / "t.jsonl", [(20, 30), (20, 140), (7, 150), (41, 160), (30, 130)])
    arguments = [str(path), str(file), "--window", "32,64", "--evict-ratio", "0.5", "--sinks"]
    arguments += ["--adapter", f"ridge={adapters(path, rule='ridge')}", "--block-size", str(BLOCK)]
    arguments += ["--kv-dtype", "float32", "--sequences", "3", "--batch", "2"]
    assert eval_command(["fidelity", *arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    # Of four that are long enough, spread over the file.
    assert report["answer_tokens"] == [140, 150, 160]
    names = [arm["name"] for arm in report["arms"]]
    assert names == ["window 32", "window 64", "sinks", "ridge", "bytes of ridge"]
    plain, larger, sinks, ridge, equal = report["arms"]
    assert ridge["state_bytes"] == 4 * 3 * (64 + 8 * 9 // 2)
    assert equal["window_tokens"] == 48 and ridge["state_kv_tokens"] == 1
    assert plain["kv_tokens"] == sinks["kv_tokens"] == ridge["kv_tokens"]
    assert larger["kv_tokens"] > equal["kv_tokens"] > plain["kv_tokens"]
    assert "recovered" not in plain
    recovered = 1 - ridge["kl"][0] / plain["kl"][0]
    assert ridge["recovered"][0] == pytest.approx(recovered)
    difference = ridge["kl"][0] - plain["kl"][0]
    assert ridge["beside_plain_window"]["kl"][0] == pytest.approx(difference)
    buckets = plain["kl_by_distance"]
    assert sum(row["tokens"] for row in buckets) == report["tokens"]
    whole = sum(row["tokens"] * row["kl"][0] for row in buckets if row["tokens"])
    assert whole / report["tokens"] == pytest.approx(plain["kl"][0])
    assert len(plain["by_answer"]["kl"]) == report["answers"] == 3
    assert (tmp_path / "out" / "fidelity.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "33"], "--window"),
        (["--adapter", "a=nowhere"], "--adapter a: nowhere holds no adapter"),
        (["--window", "512"], "no answer reaches beyond the first fold of a window of 512"),
        (["--window", "64", "--evict-tokens", "64"], "--evict-tokens 64"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tiny: Tiny, tmp_path: Path) -> None:
    file = thoughts(tmp_path / "t.jsonl", [(20, 140)])
    with pytest.raises((ValueError, OSError), match=message):
        eval_command(["fidelity", str(tiny("llama")), str(file), *arguments])


def test_thoughts_that_are_not_there(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pte-vllm eval thoughts"):
        eval_command(["fidelity", str(tiny("llama")), str(tmp_path / "none.jsonl")])
