"""What new adapters are like unless told otherwise.

Standard library only, so that `pte-vllm --help` answers at once. Where an adapter's file does not
name an option, it is the paper's instead (`PTEConfig`).
"""

from __future__ import annotations

from pte_vllm.method.names import Features, RuleName
from pte_vllm.method.options import PTEConfig

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_STARTS = ("zero", "random")
NEW_RULE: RuleName = "ridge"
"""What learns to remember best (docs/benchmarks.md)."""
_SQUARED_RULES = ("ridge", "delta")
"""`paper` learned nothing with squares (docs/benchmarks.md)."""
_SQUARED_STARTS = ("aligned", "aligned_mean")
"""A asks with the mixtures by which keys are stored. From a random start `delta` learned next to
nothing with squares (docs/benchmarks.md); the start `aligned_key` was not tried with them."""


def new_config(
    *,
    rank: int = PTEConfig.rank,
    global_tokens: int | None = None,
    rule: str = NEW_RULE,
    read: str = PTEConfig.read,
    normalize: str = PTEConfig.normalize,
    keys: str = PTEConfig.keys,
    features: str | None = None,
    init: str = PTEConfig.init,
) -> PTEConfig:
    """The method's options of a new adapter.

    Args:
        global_tokens: None: the rank.
        features: None: those of `new_features`.

    Raises:
        ValueError: naming the option, if one does not fit.
    """
    return PTEConfig(
        rank=rank,
        global_tokens=rank if global_tokens is None else global_tokens,
        rule=rule,
        read=read,
        normalize=normalize,
        keys=keys,
        features=new_features(rule, read, init) if features is None else features,
        init=init,
    )


def new_features(rule: str, read: str = PTEConfig.read, init: str = PTEConfig.init) -> Features:
    """The features that a new adapter has unless told: squared where they were seen to help.

    With read `value` A x meets no keys, so that there is nothing to square.
    """
    helped = rule in _SQUARED_RULES and init in _SQUARED_STARTS
    return "squared" if helped and read == "key" else "linear"


def parse_layers(text: str) -> list[int] | None:
    """`0-3,7` → `[0, 1, 2, 3, 7]`; `all` → None.

    Raises:
        ValueError: naming `--layers`, if the text is neither.
    """
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers must look like 0-29, 17,18 or all, got {text!r}")
        end = int(last) if dash else int(first)
        if end < int(first):
            raise ValueError(f"--layers: {part.strip()} runs backwards")
        layers.update(range(int(first), end + 1))
    return sorted(layers)
