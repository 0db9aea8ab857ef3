"""What a replay hands to a loss, and what it returns.

Shapes: B sequences, N tokens that are scored at once, V vocabulary, L layers with an encoder, H KV
heads, C candidates of a fold (`method.keep`); G and r as in `method.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pte_vllm.method.spans import Spans
from pte_vllm.train.replay.window_cache import WindowCache


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The tokens of one segment, or of a part of it, whose log-probs were asked for."""

    logits: Tensor  # [N, V] fp32, divided by the temperature
    logprobs: Tensor  # [N]
    rows: Tensor  # [N] which sequence
    tokens: Tensor  # [N] which token of it is scored


TokenLoss = Callable[[Scores], Tensor]
"""Computes a scalar from scored tokens; the losses of all calls add up.

It must not depend on which tokens come together.
"""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What one fold did to one sequence."""

    at: int
    """Position of the first token that is computed after the fold."""
    spans: Spans
    """The logical blocks that were folded, as half-open intervals."""
    rho: Tensor  # [L] ‖ΔS‖ / ‖S‖ of each layer with an encoder
    marks: Tensor | None = None
    """Which candidates each KV head of each layer kept, `[layers, H, C]` bool, in the order of
    their positions; None where all stayed, or none was kept."""
    agreement: Tensor | None = None
    """Where the marks were given: which part of them the replay would have set itself, a scalar."""


@dataclass(kw_only=True)
class ReplayResult:
    """What a replay found."""

    logprobs: Tensor  # [B, longest] fp32: of token t given those before it; 0 where not asked for
    states: Tensor | None  # [L, B, G, r] after each sequence's last fold; None without an encoder
    folds: list[list[Fold]]
    """The folds of each sequence, in order."""
    loss: float = 0.0
    """The sum of all losses."""
    cache: WindowCache | None = None
    """What the KV cache holds at the end, by column; only if it was asked for."""
