"""The arms of the recall experiment: what holds the past, and how the adapter starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pte_vllm.method.names import KeepScore
from pte_vllm.method.options import PTEConfig

if TYPE_CHECKING:
    from pte_vllm.train.replay.modeling import PTEModel
    from pte_vllm.train.replay.segments import Backward

WINDOW_TOKENS = 64


def _pte(rule: str, **options: Any) -> PTEConfig:
    return PTEConfig(rule=rule, **options)


@dataclass(frozen=True, kw_only=True)
class RecallArm:
    """One way to hold the past, and how its adapter starts."""

    title: str
    adapter: Literal["none", "lora", "pte"] = "pte"
    window_tokens: int = WINDOW_TOKENS
    """Tokens of the window; 0: full attention."""
    keep_tokens: int = 0
    """Evicted tokens that each KV head keeps beside the window."""
    keep_score: KeepScore = "expected"
    """How they are chosen."""
    method: PTEConfig = field(default_factory=PTEConfig)
    layers: str | None = None
    """Layers that get an adapter; None: those that the run names."""
    value_start: float = 0.1
    """B of v_proj starts at this times W_Vᵀ: values come out where values go in; 0: B is zero."""
    backward: Backward = "segments"
    rate: float = 1.0
    """Times the run's learning rate."""

    @property
    def trained(self) -> bool:
        """Whether there is an adapter to train."""
        return self.adapter != "none"


ARMS: dict[str, RecallArm] = {
    "full": RecallArm(title="full cache", adapter="none", window_tokens=0),
    "window": RecallArm(title="window", adapter="none"),
    "lora_c": RecallArm(title="window, LoRA (LoRA_c)", adapter="lora"),
    "global": RecallArm(title="Global-Only", method=_pte("none")),
    "paper": RecallArm(title="PTE, rule paper", method=_pte("paper")),
    "sum": RecallArm(title="PTE, rule sum", method=_pte("sum")),
    "ridge": RecallArm(title="PTE, rule ridge", method=_pte("ridge")),
    "delta": RecallArm(title="PTE, rule delta", method=_pte("delta")),
}
"""What the experiment runs unless told otherwise; equal KV bytes but for `full`."""

_RIDGE = ARMS["ridge"]
ABLATIONS: dict[str, RecallArm] = {
    "ridge_random": replace(
        _RIDGE, title="ridge, init random", method=_pte("ridge", init="random"), value_start=0.0
    ),
    "ridge_mean": replace(
        _RIDGE, title="ridge, init aligned_mean", method=_pte("ridge", init="aligned_mean")
    ),
    "ridge_zero": replace(_RIDGE, title="ridge, B = 0", value_start=0.0),
    "ridge_rotated": replace(
        _RIDGE, title="ridge, keys rotated", method=_pte("ridge", keys="rotated")
    ),
    "ridge_r64": replace(
        _RIDGE, title="ridge, rank 64", method=_pte("ridge", rank=64, global_tokens=64)
    ),
    "ridge_r16": replace(
        _RIDGE, title="ridge, rank 16", method=_pte("ridge", rank=16, global_tokens=16)
    ),
    "ridge_squared": replace(
        _RIDGE, title="ridge, features squared", method=_pte("ridge", features="squared")
    ),
    "ridge_squared_r64": replace(
        _RIDGE,
        title="ridge, features squared, rank 64",
        method=_pte("ridge", features="squared", rank=64, global_tokens=64),
    ),
    "ridge_all": replace(_RIDGE, title="ridge, all layers", layers="all"),
    "ridge_upper": replace(_RIDGE, title="ridge, layers 14-24", layers="14-24"),
    "delta_r64": RecallArm(title="delta, rank 64", method=_pte("delta", rank=64, global_tokens=64)),
    "delta_squared_r64": RecallArm(
        title="delta, features squared, rank 64",
        method=_pte("delta", features="squared", rank=64, global_tokens=64),
    ),
    "ridge_full": replace(_RIDGE, title="ridge, gradient through K and V", backward="full"),
}

_WINDOW = ARMS["window"]
KEPT: dict[str, RecallArm] = {
    "keep32": replace(_WINDOW, title="window 64 and 32 kept tokens", keep_tokens=32),
    "keep32_random": replace(
        _WINDOW, title="window 64 and 32 random tokens", keep_tokens=32, keep_score="random"
    ),
    "window96": replace(_WINDOW, title="window 96", window_tokens=96),
    "keep64": replace(
        _WINDOW, title="window 128 and 64 kept tokens", window_tokens=128, keep_tokens=64
    ),
    "window192": replace(_WINDOW, title="window 192", window_tokens=192),
}
"""The base model with kept tokens, untrained, each beside a window of as many bytes."""

_LORA = replace(ARMS["lora_c"], title="LoRA", rate=0.1)  # at the full rate it does not learn
_LORA = replace(ARMS["lora_c"], title="LoRA", rate=0.1)  # at the full rate it does not learn
BESIDE_KEPT: dict[str, RecallArm] = {
    f"keep32_{name}": replace(arm, title=f"32 kept tokens; {arm.title}", keep_tokens=32)
    for name, arm in {
        "lora": _LORA,
        "global": ARMS["global"],
        "paper": ARMS["paper"],
        "ridge": _RIDGE,
        "ridge_r16": ABLATIONS["ridge_r16"],
        "ridge_squared": ABLATIONS["ridge_squared"],
        "ridge_squared_r64": ABLATIONS["ridge_squared_r64"],
    }.items()
} | {
    "keep32_random_lora": replace(
        _LORA, title="32 random tokens; LoRA", keep_tokens=32, keep_score="random"
    ),
    "keep64_short": replace(_WINDOW, title="window 64 and 64 kept tokens", keep_tokens=64),
    "window96_lora": replace(_LORA, title="window 96; LoRA", window_tokens=96),
    "full_lora": replace(_LORA, title="full cache; LoRA", window_tokens=0),
}
"""What training adds beside kept tokens, a plain LoRA or a thought state, and its controls."""
KNOWN = {**ARMS, **ABLATIONS, **KEPT, **BESIDE_KEPT}


def make_model(
    arm: RecallArm, base: str, dtype: str, layers: list[int] | None, tokenizer: Any, seed: int
) -> PTEModel:
    """Load the frozen model, with the arm's untrained adapter calibrated on ordinary text."""
    from pte_vllm.adapter.calibration import sample_sequences
    from pte_vllm.adapter.init import init_adapter
    from pte_vllm.adapter.sample_text import SAMPLE_TEXT
    from pte_vllm.train.replay.modeling import PTEModel

    bare = PTEModel.from_pretrained(base, dtype=dtype)
    if not arm.trained:
        return bare
    adapter = init_adapter(
        bare.base,
        sample_sequences(tokenizer, SAMPLE_TEXT, seed=seed),
        arm.method,
        layers=layers,
        seed=seed,
        base_model=base,
    )
    for name, b in adapter.lora_b.items():
        if name.endswith("v_proj") and arm.value_start:
            layer = int(name.split(".")[2])
            b.copy_(arm.value_start * adapter.encoders[layer].w_v.T)
    if arm.adapter == "lora":
        adapter = replace(adapter, pte=None, encoders={})
    return PTEModel(bare.base, adapter)
