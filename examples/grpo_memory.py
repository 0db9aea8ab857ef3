"""GRPO on a task that needs memory beyond the window: what `grpo_memory.toml` trains on.

    python examples/grpo_memory.py prepare out/memory-rl      base model, adapters, questions
    python examples/grpo_memory.py plot out/memory-rl pte lora    reward curves side by side

A question is a sequence of tokens

    32 tokens of instruction, pinned | facts | gap | key

with one answer token, the value that a fact gave the key: one of 16. Between the facts and the key
lie more tokens than layers × window, so that nothing but a thought state can carry them over.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from pte_vllm.adapter.calibration import Spans
from pte_vllm.adapter.init import init_adapter
from pte_vllm.method.options import PTEConfig
from pte_vllm.train.data.memory_tasks import NODES, fact_token, node_token
from pte_vllm.train.experiments.memory_base import BaseConfig
from pte_vllm.train.experiments.small_llama import build
from pte_vllm.train.run.log import METRICS_FILE, read_metrics, series, smooth

VALUES = 16
"""Answers are nodes [0, 16), keys the others: a blind guess is right once in 16 times."""
FACTS = 2
PIN_TOKENS = 32
WINDOW_TOKENS = 64
LAYERS = 2
GAP_TOKENS = (LAYERS * WINDOW_TOKENS + 1, LAYERS * WINDOW_TOKENS + 24)
"""Tokens between the last fact and the question."""
RANK = 32
_BOS, _INSTRUCTION, _NOISE = 0, 1, range(2, 8)


def question(rng: random.Random, gap_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Make the tokens up to the end of the gap, and the facts `(key, value)` that may be asked."""
    keys = rng.sample(range(VALUES, NODES), FACTS)
    facts = [(key, rng.randrange(VALUES)) for key in keys]
    ids = [_BOS] + [_INSTRUCTION] * (PIN_TOKENS - 1) + [fact_token(*fact) for fact in facts]
    return ids + rng.choices(_NOISE, k=gap_tokens), facts


def _sequences(rng: random.Random, size: int, gap_tokens: int) -> tuple[torch.Tensor, int]:
    """Make ids `[size, T]` with all facts asked and answered at the end.

    Returns:
        The ids, and where the first key stands.
    """
    rows = []
    for _ in range(size):
        ids, facts = question(rng, gap_tokens)
        rng.shuffle(facts)
        rows.append(ids + [node_token(node) for fact in facts for node in fact])
    return torch.tensor(rows), PIN_TOKENS + FACTS + gap_tokens


def pretrain(seed: int, max_steps: int = 400) -> tuple[Any, float]:
    """Train a base model that answers under full attention; returns how often it is right, too."""
    model = build(BaseConfig(layers=LAYERS, seed=seed)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    rng, longest, right = random.Random(seed), 8.0, 0.0
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * max(0.05, 1 - step / max_steps)
        ids, first = _sequences(rng, 32, rng.randint(0, round(longest)))
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, first:-1:2])  # after each key: [32, FACTS, V]
        answers = ids[:, first + 1 :: 2]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if float(loss.detach()) < 0.5:  # short gaps first
            longest = min(GAP_TOKENS[1], longest * 1.03)
        right = float((logits.argmax(-1) == answers).float().mean())
        if step % 100 == 0:
            print(f"base: step {step}, loss {float(loss.detach()):.3f}, gap up to {longest:.0f}")
    return model.eval().requires_grad_(False), right


def prepare(out: Path, *, rule: str, features: str, seed: int, questions: int) -> None:
    """Write OUT/base, OUT/pte-start, OUT/lora-start and OUT/questions.jsonl."""
    torch.manual_seed(seed)
    if not (out / "base" / "config.json").exists():
        base, right = pretrain(seed)
        base.save_pretrained(out / "base")
        print(f"base: right {right:.3f} of the last batch under full attention")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    rng = random.Random(f"calibration {seed}")
    ids, _ = _sequences(rng, 32, GAP_TOKENS[1])
    adapter = init_adapter(
        base,
        ids,
        PTEConfig(rank=RANK, global_tokens=RANK, rule=rule, features=features),
        seed=seed,
        base_model="base",
        spans=Spans(pinned_tokens=PIN_TOKENS, recall_tokens=2 * FACTS, local_tokens=WINDOW_TOKENS),
    )
    adapter.save(out / "pte-start")
    plain = init_adapter(
        base, ids, PTEConfig(rank=RANK, global_tokens=RANK, init="random"), seed=seed
    )
    replace(plain, pte=None, encoders={}).save(out / "lora-start")
    rng = random.Random(f"questions {seed}")
    with (out / "questions.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(questions):
            tokens, facts = question(rng, rng.randint(*GAP_TOKENS))
            key, value = rng.choice(facts)
            record = {
                "prompt": [*tokens, node_token(key)],
                "answer": [node_token(value)],
                "pin_tokens": PIN_TOKENS,
            }
            file.write(json.dumps(record) + "\n")


def plot(out: Path, names: Sequence[str]) -> None:
    """Plot reward by step of several runs below OUT, as OUT/reward.png and OUT/reward.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    curves = {}
    for name in names:
        steps, rewards = series(read_metrics(out / name / METRICS_FILE), "reward")
        curves[name] = {"step": steps, "reward": [round(r, 4) for r in rewards]}
        (line,) = axes.plot(steps, smooth(rewards), label=name)
        axes.plot(steps, rewards, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.axhline(1 / VALUES, color="gray", linestyle=":", label="blind guess")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "reward.png", dpi=120)
    (out / "reward.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    for name, curve in curves.items():
        first, last = curve["reward"][:10], curve["reward"][-10:]
        if first:
            print(f"{name}: first 10 steps {mean(first):.3f}, last 10 {mean(last):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prepare", help="base model, adapters, questions")
    made.add_argument("out", type=Path)
    made.add_argument("--rule", default="ridge", choices=("paper", "sum", "ridge", "delta"))
    made.add_argument("--features", default="linear", choices=("linear", "squared"))
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--questions", type=int, default=20_000)
    shown = commands.add_parser("plot", help="reward curves side by side")
    shown.add_argument("out", type=Path)
    shown.add_argument("names", nargs="+", help="runs below OUT")
    options = parser.parse_args()
    if options.command == "prepare":
        options.out.mkdir(parents=True, exist_ok=True)
        prepare(
            options.out,
            rule=options.rule,
            features=options.features,
            seed=options.seed,
            questions=options.questions,
        )
    else:
        plot(options.out, options.names)


if __name__ == "__main__":
    main()
