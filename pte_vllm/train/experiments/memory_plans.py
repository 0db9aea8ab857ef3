"""What the memory experiment compares: its arms, its ablations, and its two sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pte_vllm.method.options import PTEConfig
from pte_vllm.train.experiments.memory_arms import Budget, MemoryArm
from pte_vllm.train.experiments.memory_base import BaseConfig


def _method(rule: str, **options: Any) -> PTEConfig:
    return PTEConfig(rule=rule, **options)


_RIDGE = MemoryArm(name="PTE ridge", method=_method("ridge"))
_DELTA = MemoryArm(name="PTE delta", method=_method("delta"))
_RIDGE_SQUARED = MemoryArm(name="PTE ridge squared", method=_method("ridge", features="squared"))
_DELTA_SQUARED = MemoryArm(name="PTE delta squared", method=_method("delta", features="squared"))
_SUM = MemoryArm(name="PTE sum", method=_method("sum"))
_PAPER = MemoryArm(name="PTE paper", method=_method("paper"))

FULL = MemoryArm(name="full cache", adapter="none", window_tokens=0)
WINDOW = MemoryArm(name="window only", adapter="none")
LORA = MemoryArm(name="LoRA_c", adapter="lora", method=_method("paper", init="random"))
GLOBAL = MemoryArm(name="Global-Only", method=_method("none"))

ARMS: tuple[MemoryArm, ...] = (
    FULL,
    WINDOW,
    LORA,
    replace(LORA, name="LoRA_c, window 24", window_tokens=24),
    replace(LORA, name="LoRA_c, window 40", window_tokens=40),
    GLOBAL,
    _PAPER,
    _SUM,
    _RIDGE,
    _DELTA,
    _RIDGE_SQUARED,
    _DELTA_SQUARED,
)
"""The arms have equal KV bytes, but for `full cache` and wider windows of LoRA_c. These spend more
bytes, as a state does: 24 as many as that of `paper`, 40 more than that of any rule. With these
windows two layers see at most 39 and 71 tokens back, so that a window of 40 may relay what
lies 40 tokens back."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _ablate(arm: MemoryArm, what: str, **changes: Any) -> MemoryArm:
    """Return `arm` with fields of its method, or of its own, replaced."""
    own = {k: v for k, v in changes.items() if k in MemoryArm.__dataclass_fields__}
    method = {k: v for k, v in changes.items() if k not in own}
    return replace(arm, name=f"{arm.name}: {what}", method=replace(arm.method, **method), **own)


ABLATIONS: tuple[MemoryArm, ...] = (
    _RIDGE,
    _ablate(_RIDGE, "init aligned_mean", init="aligned_mean"),
    _ablate(_RIDGE, "init aligned_key", init="aligned_key"),
    _ablate(_RIDGE, "init random", init="random", value_start=0.0),
    _ablate(_RIDGE, "B = 0", value_start=0.0),
    _ablate(_RIDGE, "read value", read="value"),
    _ablate(_RIDGE, "keys rotated", keys="rotated"),
    _ablate(_RIDGE, "r = G = 16", rank=16, global_tokens=16),
    _ablate(_RIDGE, "r = G = 64", rank=64, global_tokens=64),
    _ablate(_RIDGE, "attention linears only", target_modules=_ATTENTION),
    _ablate(_RIDGE, "v_proj only", target_modules=("v_proj",)),
    _ablate(_RIDGE, "window 24", window_tokens=24),
    _ablate(_RIDGE, "window 32", window_tokens=32),
    _ablate(_RIDGE, "backward full", backward="full"),
    _DELTA,
    _ablate(_DELTA, "init random", init="random", value_start=0.0),
    _ablate(_DELTA, "r = G = 64", rank=64, global_tokens=64),
    _ablate(_DELTA, "window 24", window_tokens=24),
    _ablate(_DELTA, "window 32", window_tokens=32),
    _RIDGE_SQUARED,
    _ablate(_RIDGE_SQUARED, "init aligned_mean", init="aligned_mean"),
    _ablate(_RIDGE_SQUARED, "init random", init="random", value_start=0.0),
    _ablate(_RIDGE_SQUARED, "r = G = 64", rank=64, global_tokens=64),
    _DELTA_SQUARED,
    _ablate(_DELTA_SQUARED, "init random", init="random", value_start=0.0),
    _ablate(_DELTA_SQUARED, "r = G = 64", rank=64, global_tokens=64),
    _ablate(_DELTA_SQUARED, "window 32", window_tokens=32),
    replace(_PAPER, name="PTE paper squared", method=_method("paper", features="squared")),
    _SUM,
    _ablate(_SUM, "normalize row", normalize="row"),
    _ablate(_SUM, "gain × 10", gain=10.0),
    _ablate(_SUM, "G = 64", global_tokens=64),
    _ablate(_SUM, "r = 64", rank=64),
    _ablate(_SUM, "init random", init="random", value_start=0.0),
    _ablate(_SUM, "backward full", backward="full"),
    _PAPER,
    _ablate(_PAPER, "window 24", window_tokens=24),
    _ablate(_PAPER, "window 32", window_tokens=32),
    _ablate(_PAPER, "gain × 0.1", gain=0.1),
    _ablate(_PAPER, "gain × 10", gain=10.0),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run of the experiment compares."""

    base: BaseConfig = field(default_factory=BaseConfig)
    budget: Budget = field(default_factory=Budget)
    arms: tuple[MemoryArm, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)


FACTS = (6, 3, 9, 12, 18, 24)
FULL_PLAN = Plan(budget=Budget(eval_facts=FACTS))
ABLATION_PLAN = Plan(arms=ABLATIONS, seeds=(0,))
QUICK_PLAN = Plan(
    base=BaseConfig(steps=900, max_gap_tokens=64, max_facts=8, tasks=("recall", "passkey")),
    budget=Budget(
        steps=200,
        gap_tokens=(40, 56),
        facts=(3, 6),
        tasks=("recall", "passkey"),
        eval_gaps=(40, 56, 64),
        eval_facts=(4,),
    ),
    arms=(FULL, WINDOW, LORA, GLOBAL, _RIDGE),
    seeds=(0,),
)
