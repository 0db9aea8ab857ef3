"""The recipes have the paper's values, their figures are true, and they run on tiny models."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pte_vllm.cli.plan import main as plan_command
from pte_vllm.cli.train import main as train_command
from pte_vllm.train.grpo import sampling
from pte_vllm.train.grpo.loop import train
from pte_vllm.train.options.runs import DistillRun, GrpoRun
from pte_vllm.train.run.log import read_metrics
from tests.train.fake_server import FakeServer

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
ARCHITECTURES = {"qwen2.5-3b": "qwen2", "qwen2.5-7b": "qwen2", "r1-distill-llama-8b": "llama"}
BASES = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
CONFIGS = {
    "qwen2.5-3b": dict(zip(_SIZES, (36, 2048, 11008, 16, 2, 151936, True), strict=True)),
    "qwen2.5-7b": dict(zip(_SIZES, (28, 3584, 18944, 28, 4, 152064, False), strict=True)),
    "r1-distill-llama-8b": dict(zip(_SIZES, (32, 4096, 14336, 32, 8, 128256, False), strict=True)),
}
"""Of the models' own config.json."""
NAMES = tuple(ARCHITECTURES)


def number(text: str, pattern: str) -> int:
    """Return what the one match of `pattern` has in its group."""
    (found,) = re.findall(pattern, " ".join(text.replace("\n#", " ").split()))
    return int(found.replace(",", ""))


def test_the_folder_has_two_files_for_each_model() -> None:
    names = {f"{name}{kind}.toml" for name in NAMES for kind in ("", "-distill")}
    assert {path.name for path in RECIPES.iterdir()} == names


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_papers(name: str) -> None:
    run = GrpoRun.load(RECIPES / f"{name}.toml")
    assert run.model.base == BASES[name]
    assert (run.adapter.rule, run.adapter.rank, run.adapter.global_tokens) == ("paper", 32, 32)
    assert (run.plan.window_tokens, run.plan.evict_ratio) == ("prompt", 0.25)
    assert (run.optimizer.lr, run.optimizer.max_grad_norm) == (1e-5, 1.0)
    assert run.sampling.group_size * run.sampling.groups_per_step == 512
    assert (run.sampling.max_tokens, run.data.source) == (3072, "dapo-math-17k")
    assert run.grpo.kl_coef > 0
    before = DistillRun.load(RECIPES / f"{name}-distill.toml")
    assert (before.model, before.adapter) == (run.model, run.adapter)
    assert before.plan.model_copy(update={"window_tokens": "prompt"}) == run.plan
    assert before.data == run.data and before.distill.data == "samples"
    text = (RECIPES / f"{name}.toml").read_text()
    assert f"--model.adapter {before.run.out}/adapter" in text
    assert before.run.out != run.run.out


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_planner(name: str, tmp_path: Path) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    (command,) = re.findall(r"pte-vllm plan (.*\\\n# .*)\n", text)
    words = shlex.split(command.replace("\\\n#", "").replace("CONFIG", str(tmp_path)))
    assert plan_command([*words, "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    full, window = (row["sequences"] for row in found["rows"])
    fits = number(text, r"([\d,]+) answers at once")
    assert (fits, number(text, r"at once, ([\d,]+) under full attention")) == (window, full)
    kv_bytes = number(text, r"take ([\d,]+) KiB") * 1024
    assert kv_bytes == found["kv_bytes_per_token"]
    run = GrpoRun.load(RECIPES / f"{name}.toml")
    replayed = run.grpo.micro_batch_sequences
    assert number(text, r"for the (\d+) answers") == replayed
    evicted = replayed * run.sampling.max_tokens * kv_bytes
    assert number(text, r"at most ([\d,]+) MiB") * 2**20 == evicted
    assert number(text, r"--max-num-seqs (\d+)") <= min(512, fits)
    asked = run.data.max_prompt_tokens + run.sampling.max_tokens
    assert number(text, r"--max-model-len (\d+)") == asked
    assert number(text, r"--max-lora-rank (\d+)") == run.adapter.rank


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_on_a_tiny_model(
    name: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distillation, then GRPO from its adapter, by the commands of the recipes; smaller only."""
    base, warm = tiny(ARCHITECTURES[name]), tmp_path / "warm"
    questions, text = tmp_path / "questions.jsonl", tmp_path / "text.txt"
    lines = ({"prompt": f"What is {i} times {10**i}?", "answer": i * 10**i} for i in range(6))
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    common = {"model.base": base, "model.device": "cpu", "run.tensorboard": "false"}
    distill = {
        **{"distill.data": "text", "distill.text": text, "distill.sequence_tokens": 120},
        **{"distill.pin_tokens": 8, "distill.batch_sequences": 2, "distill.eval_sequences": 0},
        **{"plan.window_tokens": 32, "optimizer.steps": 1, "optimizer.warmup_steps": 0},
    }
    recipe = str(RECIPES / f"{name}-distill.toml")
    assert train_command(["distill", recipe, *flags({**common, **distill, "run.out": warm})]) == 0

    monkeypatch.setattr(sampling, "score", lambda problem, text, ids, **_: (ids[0] % 4) / 3)
    grpo = {
        **{"model.adapter": warm / "adapter", "optimizer.steps": 2, "sampling.max_tokens": 80},
        **{"sampling.group_size": 2, "sampling.groups_per_step": 2},
        **{"data.source": "jsonl", "data.path": questions, "run.out": tmp_path / "out"},
    }
    words = [str(RECIPES / f"{name}.toml"), *flags({**common, **grpo})]
    server = FakeServer(base)
    assert train(GrpoRun.parse(words, prog="pte-vllm train grpo"), server)
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [r["window_tokens"] for r in records] == server.windows
    for record in records:
        assert record["grad_norm"] > 0 and record["folds"] > 0 and record["kl"] >= 0
    assert (tmp_path / "out" / "adapter" / "pte_encoder.safetensors").exists()


@pytest.mark.parametrize("name", ["grpo_memory", "word_problems"])
def test_commands_of_the_examples_are_valid(name: str) -> None:
    """Those at the head of a file that train, with all their flags."""
    path = RECIPES.parent / f"{name}.toml"
    text = re.sub(r"\\\n#\s+", "", path.read_text())
    commands = re.findall(r"^# +pte-vllm train grpo (.+)$", text, re.MULTILINE)
    runs = [
        GrpoRun.parse([str(path), *shlex.split(command)[1:]], prog="pte-vllm train grpo")
        for command in commands
    ]
    assert len(runs) > 1 and len({run.run.out for run in runs}) == len(runs)
    assert len({run.server.adapter_name for run in runs}) == len(runs)


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
