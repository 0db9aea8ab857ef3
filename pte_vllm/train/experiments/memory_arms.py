"""The arms of the memory experiment: what holds the past, and how it is trained and scored.

Shapes: B sequences, T tokens, N answers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pte_vllm.adapter import Adapter
from pte_vllm.adapter_init import init_adapter
from pte_vllm.calibration import Spans
from pte_vllm.config import PTEConfig
from pte_vllm.plan import FoldPlan
from pte_vllm.train.batch import Batch
from pte_vllm.train.modeling import PTEModel
from pte_vllm.train.replay import Backward, Scores, replay
from pte_vllm.train.tasks import PIN_TOKENS, TASKS, Sample, sample_batch

BLOCK_TOKENS = 8
EVICT_RATIO = 0.5


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to hold the past."""

    name: str
    adapter: Literal["none", "lora", "pte"] = "pte"
    """`lora`: a plain LoRA, whose state is the identity."""
    window_tokens: int = 16
    """0: full attention."""
    method: PTEConfig = field(default_factory=PTEConfig)
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    gain: float = 1.0
    """Times the calibrated one."""
    backward: Backward = "segments"

    @property
    def trained(self) -> bool:
        return self.adapter != "none"

    def state_bytes(self, layers: int, kv_size: int) -> int:
        """What a sequence holds besides its KV cache: S, and for `ridge` its two sums; fp32."""
        if self.adapter != "pte":
            return 0
        numbers = self.method.global_tokens * self.method.rank
        if self.method.rule == "none":
            return 0
        return 4 * layers * numbers * (3 if self.method.rule == "ridge" else 1)

    def kv_bytes(self, layers: int, kv_size: int, longest: int) -> int:
        """Most bytes of keys and values of one sequence, fp32; `kv_size`: KV heads × head size."""
        plan = plan_of(self.window_tokens)
        tokens = plan.pin_tokens + plan.window_tokens if plan.bounded else longest
        return 4 * 2 * layers * kv_size * tokens


def plan_of(window_tokens: int) -> FoldPlan:
    return FoldPlan(
        pin_tokens=PIN_TOKENS,
        window_tokens=window_tokens,
        evict_ratio=EVICT_RATIO,
        block_size=BLOCK_TOKENS,
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Training of one arm; the same for all."""

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3
    gap_tokens: tuple[int, int] = (40, 72)
    """Trained gaps."""
    facts: tuple[int, int] = (3, 9)
    eval_gaps: tuple[int, ...] = (40, 56, 72, 96, 128, 192)
    eval_size: int = 64
    """Sequences of each task at each gap."""
    eval_facts: int = 6


def make_adapter(base: Any, arm: Arm, budget: Budget, seed: int) -> Adapter | None:
    """A fresh adapter; starts that need sample text get sequences of the tasks themselves."""
    if not arm.trained:
        return None
    rng = random.Random(f"calibration {seed}")
    gap = max(budget.gap_tokens)
    samples = sample_batch(rng, 32, gap_tokens=(gap, gap), facts=budget.eval_facts)
    tokens = min(len(sample.ids) for sample in samples)
    # All end with their questions: cut the longer ones after the instruction.
    ids = torch.tensor([s.ids[:PIN_TOKENS] + s.ids[PIN_TOKENS - tokens :] for s in samples])
    adapter = init_adapter(
        base,
        ids,
        arm.method,
        target_modules=arm.target_modules,
        seed=seed,
        base_model="memory-base",
        spans=Spans(pinned_tokens=PIN_TOKENS, recall_tokens=4, local_tokens=16),
    )
    if arm.adapter == "lora":
        return replace(adapter, pte=None, encoders={})
    encoders = {
        i: replace(e, gain=e.gain * arm.gain) for i, e in adapter.encoders.items()
    }
    return replace(adapter, encoders=encoders)


def batch_of(samples: Sequence[Sample], window_tokens: int) -> Batch:
    return Batch.align(
        [s.ids for s in samples],
        [plan_of(window_tokens)] * len(samples),
        [s.answers for s in samples],
    )


def train(
    model: PTEModel,
    arm: Arm,
    budget: Budget,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Cross-entropy on the answers; returns the loss by step."""
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=0.0)
    rng = random.Random(f"train {seed}")
    losses = []
    for step in range(1, budget.steps + 1):
        rate = min(1.0, step / 20) * max(0.05, 1 - step / budget.steps)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * rate
        samples = sample_batch(
            rng,
            budget.batch_size,
            gap_tokens=budget.gap_tokens,
            facts=rng.randint(*budget.facts),
        )
        batch = batch_of(samples, arm.window_tokens)
        answers = int(batch.wanted.sum())
        optimizer.zero_grad(set_to_none=True)
        loss = replay(
            model,
            batch,
            backward=arm.backward,
            loss=lambda scores, n=answers: -scores.logprobs.sum() / n,
        ).loss
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss)
        if progress is not None:
            progress(step, loss)
    return losses


@torch.no_grad()
def accuracy(
    model: PTEModel, arm: Arm, task: str, *, gap_tokens: int, facts: int, size: int
) -> float:
    """Share of right answers on sequences that no training saw; the same for every arm."""
    rng = random.Random(f"eval {task} {gap_tokens} {facts}")
    samples = sample_batch(rng, size, gap_tokens=(gap_tokens, gap_tokens), tasks=[task], facts=facts)
    batch = batch_of(samples, arm.window_tokens)
    right: list[Tensor] = []

    def count(scores: Scores) -> Tensor:
        wanted = batch.ids[scores.rows, scores.tokens + batch.left[scores.rows]]
        right.append(scores.logits.argmax(-1) == wanted)
        return scores.logits.new_zeros(())

    replay(model, batch, loss=count)
    return float(torch.cat(right).float().mean())


def run_arm(
    base: Any,
    arm: Arm,
    budget: Budget,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train an arm and score it: a record that goes into the results."""
    torch.manual_seed(seed)
    model = PTEModel(base, make_adapter(base, arm, budget, seed))
    try:
        began = time.monotonic()
        losses = train(model, arm, budget, seed, progress) if arm.trained else []
        seconds = time.monotonic() - began
        by_gap = {
            task: {
                gap: accuracy(
                    model,
                    arm,
                    task,
                    gap_tokens=gap,
                    facts=budget.eval_facts,
                    size=budget.eval_size,
                )
                for gap in budget.eval_gaps
            }
            for task in TASKS
        }
    finally:
        model.detach()
    return {
        "arm": arm.name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
        "accuracy": by_gap,
        "options": asdict(arm),
    }
