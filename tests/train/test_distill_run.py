"""`pte-vllm train distill` on a tiny model: it learns, measures, and goes on where it stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.cli.train import main as train_command
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill.examples import Example, read_rollouts, read_texts
from pte_vllm.train.distill.loop import hold_out, load_examples, train
from pte_vllm.train.distill.step import evaluate
from pte_vllm.train.options.runs import DistillRun
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.run.log import read_metrics
from pte_vllm.train.run.start import load_tokenizer
from pte_vllm.wire.rollout import Rollout, WeightSpan
from tests.harness.models import random_tokens
from tests.train.test_distill import full_logits, plan

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words from a small list, so that they come again beyond the window."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(12)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=700)))
    return path


def options(model: Path, text: Path, out: Path, **distill: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(model)},
        "adapter": {"rank": 8, "rule": "ridge"},
        "plan": {"window_tokens": 64, "block_size": 16},
        "optimizer": {"lr": 3e-3, "steps": 30, "schedule": "linear", "warmup_steps": 3},
        "distill": {
            "text": str(text),
            "sequence_tokens": 200,
            "pin_tokens": 16,
            "batch_sequences": 4,
            "micro_batch_sequences": 3,
            "eval_sequences": 4,
            **distill,
        },
        "run": {"out": str(out), "save_every_steps": 2, "tensorboard": False},
    }


def test_it_learns(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = train(DistillRun.model_validate(options(tiny("llama"), text, out)))
    first, last = records[0], records[-1]
    assert (first["step"], last["step"]) == (0, 30)
    # B starts at 0, so the student is the base model under the window.
    assert first["eval/kl_student"] == pytest.approx(first["eval/kl_window"], rel=1e-5)
    assert first["eval/kl_window"] == pytest.approx(last["eval/kl_window"], rel=1e-5)
    print({k: (first.get(k), last.get(k)) for k in last})
    assert last["eval/kl_student"] < 0.8 * first["eval/kl_student"]
    assert records[30]["kl"] < 0.8 * records[1]["kl"]
    assert last["eval/recovered"] > 0.2
    saved = Adapter.load(out / "adapter")
    assert saved.layers == [0, 1, 2] and all(b.any() for b in saved.lora_b.values())
    assert (out / "distill.png").stat().st_size > 5000
    assert DistillRun.load(out / "run.toml").optimizer.steps == 30


@pytest.mark.parametrize("plain", [False, True])
def test_a_resumed_run_is_the_same_run(plain: bool, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    def go(out: Path, until: int) -> None:
        values = options(tiny("qwen2"), text, out)
        values["adapter"] |= {"plain": plain}
        values["optimizer"] |= {"steps": 7, "schedule": "cosine"}
        run = DistillRun.model_validate(values)
        if until < 7:
            with pytest.raises(KeyboardInterrupt), stop_before(until + 1):
                train(run)
        else:
            train(run)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(whole, 7)
    go(parts, 3)  # the newest checkpoint is that of step 2: step 3 is done again
    assert [p.name for p in sorted((parts / "checkpoints").iterdir())] == ["step-000002"]
    go(parts, 7)
    expected, found = (read_metrics(out / "metrics.jsonl") for out in (whole, parts))
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(8))
    for one, other in zip(expected, found, strict=True):
        for name in {"kl", "grad_norm", "lr", "eval/kl_student", "eval/loss_student"} & set(one):
            assert other[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
    adapters = [Adapter.load(out / "adapter") for out in (whole, parts)]
    for name, b in adapters[0].lora_b.items():
        torch.testing.assert_close(adapters[1].lora_b[name], b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="run.resume"):
        values = options(tiny("qwen2"), text, parts)
        values["run"] |= {"resume": False}
        train(DistillRun.model_validate(values))


class stop_before:  # noqa: N801
    """Ctrl-C as a step begins."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __enter__(self) -> None:
        import pte_vllm.train.distill.loop as module

        self._module, self._rate = module, module.learning_rate

        def rate(*args: Any) -> float:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt
            return self._rate(*args)

        module.learning_rate = rate

    def __exit__(self, *exc: object) -> None:
        self._module.learning_rate = self._rate


def test_the_measurement_is_perplexity_of_plain_forwards(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    examples = [
        Example(tokens=tuple(random_tokens(n, seed=n)), plan=plan(p))
        for p, n in ((5, 150), (40, 203))
    ]
    model = PTEModel.from_pretrained(path, adapters(path))
    found = evaluate(model, examples, micro_batch_sequences=1)
    together = evaluate(model, examples, micro_batch_sequences=2)
    assert found.as_metrics() == pytest.approx(together.as_metrics(), rel=1e-4)
    total, count = 0.0, 0
    for example in examples:
        logprobs = full_logits(path, example.tokens).log_softmax(-1)
        for t in range(example.plan.first_fold + 1, len(example.tokens)):
            total -= float(logprobs[t - 1, example.tokens[t]])
            count += 1
    assert found.tokens == count
    assert found.loss_full == pytest.approx(total / count, rel=1e-5)
    assert found.kl_student > 0.05 and abs(found.kl_window - found.kl_student) > 0.05
    bare = evaluate(PTEModel.from_pretrained(path), examples)
    assert bare.kl_student == pytest.approx(found.kl_window, rel=1e-4)
    assert bare.loss_window == pytest.approx(found.loss_window, rel=1e-5)


def rollout(pin_tokens: int, num_answer: int, window_tokens: int) -> Rollout:
    prompt, answer = random_tokens(30, seed=1), random_tokens(num_answer, seed=2)
    plan = FoldPlan(pin_tokens=pin_tokens, window_tokens=window_tokens, block_size=16)
    return Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=tuple(answer),
        logprobs=(-1.0,) * num_answer,
        mask=(1,) * (num_answer - 1) + (0,),
        finish_reason="length",
        adapter=None,
        weight_versions=(WeightSpan(version=0, start=0, end=num_answer),),
        plan=plan,
        group_id="a",
        index=0,
        num_preempted=None,
    )


def test_sampled_answers(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Records of any plan, under the run's own; short answers are left out."""
    records = [rollout(30, 150, 0), rollout(30, 20, 0), rollout(10, 140, 64)]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    examples = read_rollouts(path.read_text().splitlines(), plan)
    assert [(e.plan, len(e.tokens)) for e in examples] == [(plan(30), 180), (plan(10), 170)]
    for example in examples:
        wanted = [t for t, w in enumerate(example.wanted) if w]
        # the last token was not sampled
        assert wanted == list(range(example.plan.first_fold + 1, len(example.tokens) - 1))
    out = tmp_path / "out"
    values = options(
        tiny("llama"), text, out, data="rollouts", rollouts=str(path), eval_sequences=1
    )
    values["optimizer"] = {"steps": 1}
    measured = train(DistillRun.model_validate(values))
    assert measured[-1]["eval/tokens"] == 180 - 97 - 1


def test_command_line(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.base", str(tiny("llama")), "--distill.text", str(text)]
    arguments += ["--plan.window_tokens", "64", "--adapter.rank", "4", "--optimizer.steps", "1"]
    arguments += ["--distill.sequence_tokens", "150", "--distill.batch_sequences", "2"]
    arguments += ["--distill.teacher_top_k", "5", "--run.out", str(tmp_path / "out")]
    assert train_command(["distill", *arguments]) == 0
    assert "perplexity beyond the first fold" in capsys.readouterr().err
    assert Adapter.load(tmp_path / "out" / "adapter").pte is not None


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.bin").write_text("no text")
    assert list(read_texts(str(tmp_path))) == ["one", "two"]
    assert list(read_texts(str(tmp_path / "c.bin"))) == ["no text"]
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"text": "x"}\n\n{"body": "y"}\n')
    assert next(read_texts(str(lines))) == "x"
    with pytest.raises(ValueError, match=r"d\.jsonl:3: no text in field 'text'"):
        list(read_texts(str(lines)))


def test_data_set_by_path(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"body": ["x", "y"]}).to_parquet(str(folder / "train.parquet"))
    assert list(read_texts(str(folder), field="body")) == ["x", "y"]


def test_held_out_sequences_are_not_trained_on() -> None:
    examples = [Example(tokens=(i,), plan=plan(0)) for i in range(10)]
    training, held = hold_out(examples, 3)
    assert [e.tokens[0] for e in held] == [0, 3, 6]
    assert [e.tokens[0] for e in training] == [1, 2, 4, 5, 7, 8, 9]
    assert hold_out(examples, 0) == (examples, [])
    with pytest.raises(ValueError, match="eval_sequences 10"):
        hold_out(examples, 10)


@pytest.mark.parametrize("score", ["expected", "random"])
def test_kept_tokens(score: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """The student is trained and measured under a window that keeps tokens."""
    model, file = tiny("llama"), tmp_path / "probes.safetensors"
    queries = torch.randn(3, 2, 8, 32, generator=torch.Generator().manual_seed(3))
    Probes.of(queries, "none").save(file)

    def first(name: str, **plan: Any) -> dict[str, float]:
        values = options(model, text, tmp_path / name)
        values["plan"] |= plan
        values["optimizer"] |= {"steps": 1, "warmup_steps": 0}
        return train(DistillRun.model_validate(values))[0]

    plan: dict[str, Any] = {"keep_tokens": 32, "keep_score": score}
    plan |= {"probes": str(file)} if score == "expected" else {"evict_seed": 4}
    plain, kept = first("plain"), first("kept", **plan)
    everything = first("everything", **{**plan, "keep_tokens": 1024})
    assert abs(kept["eval/kl_window"] - plain["eval/kl_window"]) > 1e-3
    assert everything["eval/kl_window"] < 1e-5  # nothing has left
    # Of the examples and the probes that the run was given, one by one.
    run = DistillRun.load(tmp_path / "kept" / "run.toml")
    _, held_out = hold_out(load_examples(run, load_tokenizer(run.model.base), Console()), 4)
    assert {example.plan.keep_tokens for example in held_out} == {32}
    alone = PTEModel.from_pretrained(model)
    keeper = Keeper(alone, Probes.load(file)) if score == "expected" else None
    found = evaluate(alone, held_out, micro_batch_sequences=1, keeper=keeper)
    assert found.kl_window == pytest.approx(kept["eval/kl_window"], rel=1e-4)


def test_probes_of_another_model(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "probes.safetensors"
    Probes.of(torch.ones(2, 2, 8, 32), "none").save(file)
    values = options(tiny("llama"), text, tmp_path / "out")
    values["plan"] |= {"keep_tokens": 32, "probes": str(file)}
    with pytest.raises(ValueError, match="--plan.probes: these probes are for 2 layers"):
        train(DistillRun.model_validate(values))
