"""The recall experiment's machinery on a tiny model; figures are in docs/benchmarks.md."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.data.ledger import SHOWN
from pte_vllm.train.distill.examples import Example, align
from pte_vllm.train.distill.step import evaluate
from pte_vllm.train.experiments.recall import main
from pte_vllm.train.experiments.recall_ledger import LedgerTask
from pte_vllm.train.experiments.recall_task import RecallTask
from pte_vllm.train.experiments.supervised import Schedule, train_answers
from pte_vllm.train.replay.modeling import PTEModel
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]


def test_samples_ask_what_was_said(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    task = RecallTask(tokenizer=tokenizer, num_tokens=260, num_facts=3)
    for sample in task.samples(5, random.Random(0)):
        text = tokenizer.decode(sample.token_ids[task.pin_tokens :])
        assert len(sample.token_ids) == len(sample.wanted) == 260
        marked = [t for t, wanted in enumerate(sample.wanted) if wanted]
        assert marked == [t for span in sample.spans for t in range(*span)]
        for (first, end), distance in zip(sample.spans, sample.distances, strict=True):
            number = tokenizer.decode(sample.token_ids[first:end])
            before = tokenizer.decode(sample.token_ids[first - 30 : first])
            name = before.split(" has number")[-2].split()[-1]
            assert number.isdigit() and text.count(f"{name} has number {number}.") == 2
            assert 100 < distance < first  # stated before the filler
    with pytest.raises(ValueError, match="facts need"):
        RecallTask(tokenizer=tokenizer, num_tokens=150).sample(random.Random(0))


def test_ledgers_score_what_is_looked_up(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    task = LedgerTask(tokenizer=tokenizer, num_tokens=900, people=3)
    sample = task.sample(random.Random(0))
    answer = sample.token_ids[sample.pin_tokens :]
    assert 600 < len(answer) <= 900 and answer[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(answer[:-1])
    numbers = re.findall(r"had (\d+) and", text)
    spans = [tokenizer.decode(sample.token_ids[a:b]).strip() for a, b in sample.spans]
    assert spans == numbers and len(numbers) > 2 * SHOWN
    assert all(any(sample.wanted[a:b]) for a, b in sample.spans)
    assert sum(sample.wanted) <= sum(b - a for a, b in sample.spans)
    assert sample.trained == [t >= sample.pin_tokens for t in range(len(sample.token_ids))]
    assert 0 < min(sample.distances) < max(sample.distances) < 900
    last = text.splitlines()[-1]
    assert f"{len(text.splitlines())}. " in tokenizer.decode(sample.token_ids[: sample.pin_tokens])
    assert last.startswith(f"{len(text.splitlines())}. ")
    with pytest.raises(ValueError, match="no room for a ledger"):
        LedgerTask(tokenizer=tokenizer, num_tokens=50).sample(random.Random(0))


@pytest.mark.slow
def test_arms_are_trained_scored_and_kept(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--steps", "2", "--batch", "2", "--eval-samples", "2", "--train-tokens", "260"]
    words = [str(tiny("llama")), *sizes, "--eval-tokens", "260,300", "--eval-facts", "1"]
    (tmp_path / "text.txt").write_text("The boat drifted along the quiet river. " * 400)
    words += [
        "--eval-text",
        str(tmp_path / "text.txt"),
        "--layers",
        "all",
        "--dtype",
        "float32",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main([*words, "--arms", "full,delta,lora_c"]) == 0
    table, said = capsys.readouterr()
    assert all(
        title in table
        for title in ("full cache", "rule delta", "LoRA_c", "300 tokens", "perplexity")
    )
    assert (tmp_path / "recall.png").stat().st_size > 0
    records = {n: json.loads((tmp_path / f"{n}-0.json").read_text()) for n in ("full", "delta")}
    assert records["full"]["losses"] == [] and len(records["delta"]["losses"]) == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0.json")}
    assert main([*words, "--arms", "full,delta,lora_c"]) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0.json")} == times
    with pytest.raises(SystemExit):
        main([*words, "--arms", "rigde"])
    # Without a terminal each tenth is told, and what was trained is there.
    assert "delta, seed 0: steps: 2 of 2" in said
    assert Adapter.load(tmp_path / "delta-0").pte is not None
    assert not (tmp_path / "full-0").exists()
    again = [
        "--adapter",
        str(tmp_path / "delta-0"),
        "--steps",
        "0",
        "--out",
        str(tmp_path / "more"),
    ]
    assert main([*words, *again, "--arms", "delta"]) == 0
    scored = json.loads((tmp_path / "more" / "delta-0.json").read_text())
    assert scored["losses"] == [] and scored["by_length"] == records["delta"]["by_length"]
    # Tokens that are drawn at random need no probes.
    assert main([*words, "--arms", "window,keep32_random,window96"]) == 0
    table = capsys.readouterr().out
    assert "window 64 and 32 random tokens" in table and "window 96" in table
    names = ("keep32_random", "window")
    kept, window = (json.loads((tmp_path / f"{name}-0.json").read_text()) for name in names)
    assert kept["losses"] == [] and kept["perplexity"] != window["perplexity"]
    # Other sequences, so another loss from the first step on; a text too short is refused.
    flags = ["--arms", "delta", "--out", str(tmp_path / "facts"), "--train-facts", "1"]
    assert main([*words, *flags, "--train-text", str(tmp_path / "text.txt")]) == 0
    other = json.loads((tmp_path / "facts/delta-0.json").read_text())
    assert other["losses"][0] != records["delta"]["losses"][0]
    # Long answers, whose numbers are looked up in themselves.
    lengths = ["--train-tokens", "400", "--eval-tokens", "400,600", "--eval-facts", ""]
    ledger = [*words, *lengths, "--task", "ledger", "--out", str(tmp_path / "ledger")]
    assert main([*ledger, "--arms", "full_lora,keep32_random_lora"]) == 0
    table = capsys.readouterr().out
    assert "full cache; LoRA" in table and "600 tokens" in table
    with pytest.raises(SystemExit):
        main([*ledger, "--facts", "1"])
    assert "--facts: a ledger has 2 to 12 people" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("The boat drifted along the quiet river. " * 12)
    with pytest.raises(ValueError, match="--train-text: .*short.txt has fewer than 1024 tokens"):
        main([*words, *flags, "--train-text", str(tmp_path / "short.txt")])


@pytest.mark.slow
def test_text_beside_answers_is_learned_from(tiny: Tiny, adapters: Callable[..., Path]) -> None:
    """With text the adapter comes nearer to the full cache on it than without."""
    path = tiny("llama")
    plan = FoldPlan(pin_tokens=16, window_tokens=32, evict_ratio=0.5, block_size=16)
    text = [Example(tokens=tuple(random_tokens(160, 500, i)), plan=plan) for i in range(3)]
    answer = Example(tokens=tuple(random_tokens(120, 500, 9)), plan=plan)

    def kl(next_text: Callable[[], list[Example]] | None) -> float:
        model = PTEModel.from_pretrained(path, adapters(path, rule="delta"))
        schedule = Schedule(steps=60, learning_rate=1e-2)
        losses = train_answers(model, lambda: align([answer]), schedule, next_text=next_text)
        assert losses[-1] < losses[0]
        return evaluate(model, text).kl_student

    assert kl(lambda: text) < 0.5 * kl(None)
