"""What the experiment about conversations compares: its arms, of equal bytes, and its two sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pte_vllm.method.options import PTEConfig
from pte_vllm.train.experiments.turns_arms import TurnsArm, TurnsBudget
from pte_vllm.train.experiments.turns_base import TurnsBase

WINDOW_TOKENS, KEEP_TOKENS = 16, 16

FULL = TurnsArm(name="full cache", adapter="none", window_tokens=0)
WINDOW = TurnsArm(name="window 16", adapter="none", window_tokens=WINDOW_TOKENS)
KEPT = replace(WINDOW, name="window 16, keeping 16", keep_tokens=KEEP_TOKENS)
KEPT_TRAINED = replace(KEPT, name="window 16, keeping 16, trained probes", probes="trained")
KEPT_RANDOM = replace(KEPT, name="window 16, keeping 16 at random", keep_score="random")
LORA = replace(
    WINDOW,
    name="LoRA_c, window 16",
    adapter="lora",
    method=PTEConfig(rule="paper", init="random"),
)
GLOBAL = replace(WINDOW, name="Global-Only", adapter="pte", method=PTEConfig(rule="none"))
PAPER = replace(GLOBAL, name="PTE paper", method=PTEConfig(rule="paper"))
RIDGE = replace(
    GLOBAL, name="PTE ridge squared", method=PTEConfig(rule="ridge", features="squared")
)
DELTA = replace(
    GLOBAL, name="PTE delta squared", method=PTEConfig(rule="delta", features="squared")
)


def _beside_kept(arm: TurnsArm, what: str, rate: float = 1.0) -> TurnsArm:
    """Return an arm whose adapter is trained beside kept tokens, chosen by trained probes."""
    name = f"keeping 16, trained probes; {what}"
    return replace(arm, name=name, keep_tokens=KEEP_TOKENS, probes="trained", rate=rate)


ARMS: tuple[TurnsArm, ...] = (
    FULL,
    WINDOW,
    replace(WINDOW, name="window 32", window_tokens=32),
    KEPT,
    KEPT_TRAINED,
    KEPT_RANDOM,
    LORA,
    replace(LORA, name="LoRA_c, window 32", window_tokens=32),
    GLOBAL,
    PAPER,
    RIDGE,
    DELTA,
    _beside_kept(LORA, "LoRA", rate=0.1),  # at the full rate it does not learn
    _beside_kept(RIDGE, "PTE ridge squared"),
    _beside_kept(DELTA, "PTE delta squared"),
    replace(LORA, name="LoRA_c, window 48", window_tokens=48),
)
"""`window 32` holds as many bytes as 16 kept tokens beside a window of 16. `LoRA_c, window 32` also
holds no fewer than a window of 16 and a state, and `LoRA_c, window 48` no fewer than both beside
kept tokens."""


@dataclass(frozen=True, kw_only=True)
class TurnsPlan:
    """What one run of the experiment compares."""

    base: TurnsBase = field(default_factory=TurnsBase)
    budget: TurnsBudget = field(default_factory=TurnsBudget)
    arms: tuple[TurnsArm, ...] = ARMS
    seeds: tuple[int, ...] = (0,)


FULL_PLAN = TurnsPlan()
QUICK_PLAN = TurnsPlan(
    base=TurnsBase(steps=1500, max_turns=16, max_facts=6, tasks=("facts",)),
    budget=TurnsBudget(
        steps=150,
        turns=(8, 12),
        facts=(2, 4),
        distances=(1, 8),
        tasks=("facts",),
        eval_turns=16,
        eval_facts=3,
        eval_distances=(1, 2, 4, 8, 12),
    ),
    arms=(FULL, WINDOW, KEPT, KEPT_TRAINED, KEPT_RANDOM, LORA, RIDGE),
)
