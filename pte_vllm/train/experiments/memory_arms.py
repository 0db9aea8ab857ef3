"""The arms of the memory experiment: what holds the past, and how it is trained and scored."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from pte_vllm.adapter.calibration import Spans
from pte_vllm.adapter.defaults import TARGET_MODULES
from pte_vllm.adapter.files import layer_of
from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.init import init_adapter
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.weight import weigh_state
from pte_vllm.train.data.memory_tasks import PIN_TOKENS, TASKS, MemorySequence, sample_batch
from pte_vllm.train.experiments.supervised import Schedule, score_answers, train_answers
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import Backward

BLOCK_TOKENS = 8
WINDOW_TOKENS = 16
EVICT_RATIO = 0.5
_CALIBRATION_SAMPLES = 32
_SPANS = Spans(pinned_tokens=PIN_TOKENS, recall_tokens=4, local_tokens=WINDOW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class MemoryArm:
    """One way to hold the past, and how its adapter starts."""

    name: str
    adapter: Literal["none", "lora", "pte"] = "pte"
    """What is trained; `lora` is a plain LoRA, whose state is the identity."""
    window_tokens: int = WINDOW_TOKENS
    """Tokens of the window; 0: full attention."""
    method: PTEConfig = field(default_factory=PTEConfig)
    target_modules: tuple[str, ...] = TARGET_MODULES
    gain: float = 1.0
    """A factor on the calibrated gain."""
    value_start: float = 0.1
    """B of v_proj starts at this times W_Vᵀ: values come out where values go in; 0: B is zero."""
    backward: Backward = "segments"

    @property
    def trained(self) -> bool:
        """Whether there is an adapter to train."""
        return self.adapter != "none"

    def state_bytes(self, layers: int) -> int:
        """Count the bytes a sequence holds beside its KV cache, as on a server in fp32."""
        return weigh_state(self.method, layers, "float32").total if self.adapter == "pte" else 0

    def kv_bytes(self, layers: int, kv_size: int, longest: int) -> int:
        """Count the most bytes that keys and values of one sequence take, fp32.

        Args:
            layers: how many layers the model has.
            kv_size: KV heads × head size.
            longest: how many tokens the longest sequence has; full attention keeps them all.
        """
        plan = plan_of(self.window_tokens)
        tokens = plan.pin_tokens + plan.window_tokens if plan.bounded else longest
        return 4 * 2 * layers * kv_size * tokens


def plan_of(window_tokens: int) -> FoldPlan:
    """Return the plan of every sequence of an arm with this window."""
    return FoldPlan(
        pin_tokens=PIN_TOKENS,
        window_tokens=window_tokens,
        evict_ratio=EVICT_RATIO,
        block_size=BLOCK_TOKENS,
    )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long an arm is trained, and on what it is scored; the same for all arms."""

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3
    gap_tokens: tuple[int, int] = (40, 72)
    """Least and greatest gap that is trained."""
    facts: tuple[int, int] = (3, 9)
    """Least and greatest number of facts in a trained sequence."""
    tasks: tuple[str, ...] = tuple(TASKS)
    eval_gaps: tuple[int, ...] = (40, 56, 72, 96, 128)
    eval_facts: tuple[int, ...] = (6,)
    """Facts of scored sequences: the first number at every gap, the others at the second gap."""
    eval_size: int = 64
    """How many sequences of each task are scored at each gap."""


def longest_tokens(budget: Budget) -> int:
    """Return the length of the longest sequence that is scored."""
    first, *others = budget.eval_facts
    cells = [(max(budget.eval_gaps), first), *((budget.eval_gaps[1], facts) for facts in others)]
    return max(
        len(sample.ids)
        for gap, facts in cells
        for sample in sample_batch(
            random.Random(0), 16, gap_tokens=(gap, gap), tasks=budget.tasks, facts=facts
        )
    )


def calibration_ids(budget: Budget, seed: int) -> torch.Tensor:
    """Make sequences `[N, T]` of the tasks, on which a fresh adapter is calibrated."""
    rng = random.Random(f"calibration {seed}")
    gap = budget.gap_tokens[1]
    samples = sample_batch(
        rng, _CALIBRATION_SAMPLES, gap_tokens=(gap, gap), facts=budget.eval_facts[0]
    )
    tokens = min(len(sample.ids) for sample in samples)
    # All end with their questions: cut the longer ones after the instruction.
    return torch.tensor([s.ids[:PIN_TOKENS] + s.ids[PIN_TOKENS - tokens :] for s in samples])


def make_adapter(
    base: Any, arm: MemoryArm, ids: torch.Tensor, spans: Spans, seed: int
) -> Adapter | None:
    """Make a fresh adapter, calibrated on `ids: [N, T]`; None where none is trained."""
    if not arm.trained:
        return None
    adapter = init_adapter(
        base,
        ids,
        arm.method,
        target_modules=arm.target_modules,
        seed=seed,
        base_model="memory-base",
        spans=spans,
    )
    if arm.adapter == "lora":
        return replace(adapter, pte=None, encoders={})
    for name, b in adapter.lora_b.items():
        layer = layer_of(name)
        if name.endswith("v_proj") and layer is not None:
            b.copy_(arm.value_start * adapter.encoders[layer].w_v.mT)
    encoders = {i: replace(e, gain=e.gain * arm.gain) for i, e in adapter.encoders.items()}
    return replace(adapter, encoders=encoders)


def batch_of(samples: Sequence[MemorySequence], window_tokens: int) -> AlignedBatch:
    """Align sequences; the tokens asked for are the answers."""
    return AlignedBatch.align(
        [s.ids for s in samples],
        [plan_of(window_tokens)] * len(samples),
        [s.answers for s in samples],
    )


def accuracy(
    model: PTEModel, arm: MemoryArm, task: str, *, gap_tokens: int, facts: int, size: int
) -> float:
    """Compute the share of right answers on sequences no training saw, the same for all arms."""
    rng = random.Random(f"score {task} {gap_tokens} {facts}")
    gaps = (gap_tokens, gap_tokens)
    samples = sample_batch(rng, size, gap_tokens=gaps, tasks=[task], facts=facts)
    return score_answers(model, [batch_of(samples, arm.window_tokens)]).accuracy


Progress = Callable[[int, float], None]
"""A function that is called with each step and its loss."""


def train_arm(
    model: PTEModel,
    arm: MemoryArm,
    next_batch: Callable[[], AlignedBatch],
    *,
    steps: int,
    learning_rate: float,
    keeper: Keeper | None = None,
    progress: Progress | None = None,
) -> tuple[list[float], float]:
    """Train an arm, if there is anything to train; returns the loss by step, and the seconds."""
    if not arm.trained:
        return [], 0.0
    began = time.monotonic()
    schedule = Schedule(
        steps=steps, learning_rate=learning_rate, warmup_steps=20, final_fraction=0.05
    )
    losses = train_answers(
        model, next_batch, schedule, backward=arm.backward, progress=progress, keeper=keeper
    )
    return losses, time.monotonic() - began


def run_arm(
    base: Any, arm: MemoryArm, budget: Budget, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Train an arm and score it; returns a record for the results."""
    rng = random.Random(f"train {seed}")

    def next_batch() -> AlignedBatch:
        samples = sample_batch(
            rng,
            budget.batch_size,
            gap_tokens=budget.gap_tokens,
            tasks=budget.tasks,
            facts=rng.randint(*budget.facts),
        )
        return batch_of(samples, arm.window_tokens)

    torch.manual_seed(seed)
    model = PTEModel(base, make_adapter(base, arm, calibration_ids(budget, seed), _SPANS, seed))
    try:
        losses, seconds = train_arm(
            *(model, arm, next_batch),
            steps=budget.steps,
            learning_rate=budget.learning_rate,
            progress=progress,
        )
        first, *others = budget.eval_facts
        cells = [(gap, first) for gap in budget.eval_gaps]
        cells += [(budget.eval_gaps[1], facts) for facts in others]
        scores = [
            {
                "task": task,
                "gap_tokens": gap,
                "facts": facts,
                "accuracy": accuracy(
                    model, arm, task, gap_tokens=gap, facts=facts, size=budget.eval_size
                ),
            }
            for task in budget.tasks
            for gap, facts in cells
        ]
    finally:
        model.detach()
    return {
        "arm": arm.name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
        "scores": scores,
        "options": asdict(arm),
    }
