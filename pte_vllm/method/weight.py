"""What the thought state of one sequence weighs, in bytes and in tokens of KV cache.

Standard library only. The sizes are those of `method.held` and of the slots that tokens read
(`engine.state`), which tests hold against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pte_vllm.method.options import PTEConfig

ITEM_BYTES = {
    **{"float32": 4, "bfloat16": 2, "float16": 2},
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 1),
}
"""Bytes of one number, by the name of its type."""


@dataclass(frozen=True, kw_only=True)
class StateWeight:
    """The bytes that one sequence takes beside its KV cache."""

    read: int
    """S, which every token reads."""
    sums: int
    """What a rule keeps besides, which only folds read."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.read + self.sums

    def kv_tokens(self, token_bytes: float) -> float:
        """Return how many tokens of KV cache weigh as much, each `kv_token_bytes`."""
        return self.total / token_bytes


NO_STATE = StateWeight(read=0, sums=0)


def state_dtype(dtype: str) -> str:
    """Return the type in which tokens read S, by that of the model: bfloat16, or else float32.

    In float16 the states of squared features would leave the range of the type.
    """
    return "bfloat16" if dtype == "bfloat16" else "float32"


def weigh_state(
    config: PTEConfig, num_layers: int, dtype: str, *, rule: str | None = None
) -> StateWeight:
    """Compute what the thought state of one sequence weighs.

    Args:
        config: The method of its adapter.
        num_layers: The number of layers that have a state.
        dtype: The name of the model's type, such as `bfloat16`.
        rule: The rule that the request chose; None: the adapter's.
    """
    rank, rule = config.rank, rule or config.rule
    numbers = config.global_tokens * rank
    read = numbers * ITEM_BYTES[state_dtype(dtype)]
    rest = 4 * numbers - read  # of S in float32, where that is needed for the next fold
    sums = {
        "none": 0,
        "paper": rest,
        "sum": 4 * numbers,
        "delta": rest + 2 * 4,  # Σ |k|² and n
        "ridge": rest + 4 * (rank * (rank + 1) // 2),  # C
    }
    return StateWeight(read=num_layers * read, sums=num_layers * sums[rule])


def kv_token_bytes(num_layers: int, kv_size: int, dtype: str) -> int:
    """Compute the bytes that keys and values of one token take in all layers.

    Args:
        num_layers: The number of layers of the model.
        kv_size: KV heads × head size.
        dtype: The name of the cache's type, such as `bfloat16`.
    """
    return 2 * num_layers * kv_size * ITEM_BYTES[dtype]
