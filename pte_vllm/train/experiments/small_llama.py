"""A small Llama that an experiment trains from scratch with full attention, then freezes.

It takes a few minutes, and is kept in a folder named by its options.

Shapes: B sequences, T tokens, N answers, d hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pte_vllm.train.data.memory_tasks import NODES, VOCABULARY, fact_token, node_token


@dataclass(frozen=True, kw_only=True)
class SmallLlama:
    """The sizes of the model, and its training."""

    layers: int = 2
    hidden_size: int = 64
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    rope_theta: float = 1000.0
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 3e-3
    target_accuracy: float = 0.985
    """Training ends early once every task reaches it in the exam, three times in a row."""
    tasks: tuple[str, ...] = ()
    seed: int = 0

    def key(self) -> str:
        """Return a short name for these options, a hash of them."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Sample(Protocol):
    """A sequence of tokens, of which some are answers."""

    @property
    def ids(self) -> list[int]:
        """Return its tokens."""

    @property
    def answers(self) -> list[bool]:
        """Return by token whether it is an answer that counts."""


class Course(Protocol):
    """What a model is taught: short sequences first, as the look-up is learned in fewer tokens."""

    first_length: float
    """Of sequences at the start, in whatever the course counts: tokens of a gap, turns."""
    longest: float

    def batch(self, rng: random.Random, length: float) -> Sequence[Sample]:
        """Make the sequences of one step, of this length or less."""

    def exam(self, model: Any) -> dict[str, float]:
        """Compute by task the share of right answers at the greatest length."""


def build(config: SmallLlama) -> Any:
    """Make a LlamaForCausalLM with random weights.

    The embedding of a fact starts as the sum of two vectors, one for its key and one for its value,
    and so do the vectors of the nodes: facts about a node look alike from the start.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            initializer_range=config.hidden_size**-0.5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.normal_(std=1.0)
        key, value = torch.randn(2, NODES, config.hidden_size)
        for node in range(NODES):
            weight[node_token(node)] = key[node]
            first = fact_token(node, 0)
            weight[first : first + NODES] = (key[node] + value) / math.sqrt(2)
    return model


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]`, padded on the right with 0, and answers `[B, T]` as booleans."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([s.ids + [0] * (length - len(s.ids)) for s in samples])
    wanted = torch.tensor([s.answers + [False] * (length - len(s.ids)) for s in samples])
    return ids, wanted


def answer_logits(model: Any, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Compute with full attention logits `[N, V]` of the answers, and the right answers `[N]`."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
    logits: Tensor = model.lm_head(hidden[:, :-1][wanted[:, 1:]])
    return logits, ids[:, 1:][wanted[:, 1:]]


@torch.no_grad()
def accuracy_of(model: Any, samples: Sequence[Sample]) -> float:
    """Compute the share of right answers under full attention."""
    logits, answers = answer_logits(model, *collate(samples))
    return float((logits.argmax(-1) == answers).float().mean())


Progress = Callable[[int, float, dict[str, float]], None]
"""A function that is called with the step, its loss and the last accuracies by task."""


def pretrain(
    config: SmallLlama, course: Course, progress: Progress | None = None
) -> tuple[Any, dict[str, Any]]:
    """Train a model; returns it, frozen, and what it reached."""
    model = build(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    rng = random.Random(config.seed)
    began, solved, reached = time.monotonic(), 0, dict.fromkeys(config.tasks, 0.0)
    step, length = 0, course.first_length
    for step in range(1, config.steps + 1):
        rate = min(1.0, step / 100) * max(0.05, 1 - step / config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        logits, answers = answer_logits(model, *collate(course.batch(rng, length)))
        loss = F.cross_entropy(logits, answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if float(loss.detach()) < 0.5:
            length = min(course.longest, length * 1.02)
        if step % 100 == 0:
            reached = course.exam(model)
            solved = solved + 1 if min(reached.values()) >= config.target_accuracy else 0
        if progress is not None:
            progress(step, float(loss.detach()), reached)
        if solved == 3:
            break
    model.eval().requires_grad_(False)
    report = {
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": reached,
    }
    return model, report


def load(folder: Path) -> Any:
    """Load the model that `ensure_base` left, and freeze it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def ensure_model(
    config: SmallLlama, course: Course, out: Path, progress: Progress | None = None
) -> tuple[Path, dict[str, Any]]:
    """Train the model of `config`, unless an earlier run left it.

    Returns:
        Its folder, and the report of its training.
    """
    folder = out / f"base-{config.key()}"
    note = folder / "report.json"
    if not note.exists():  # it is written last: where it is, the rest is whole
        model, report = pretrain(config, course, progress)
        model.save_pretrained(folder)
        note.write_text(json.dumps({"config": asdict(config), **report}, indent=1) + "\n")
    report = json.loads(note.read_text())
    return folder, report
