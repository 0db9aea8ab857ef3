"""How much later tokens attend to each token that leaves the window, under full attention.

This is what trained probes learn to predict (`adapter.probe_training`). The base model reads its
own answers once. What is kept of an answer grows with the square of its length, divided by the
tokens that leave at once.

Letters in shapes: L layers, H KV heads, G query heads of a KV head, D head size, N tokens of a
sequence, T of them after the pinned ones, F folds that choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pte_vllm.adapter.shown_attention import visit_attention
from pte_vllm.method.plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Future:
    """One sequence under full attention, and what becomes of its tokens later."""

    plan: FoldPlan
    keys: Tensor
    """`[L, H, T, D]` float16, as cached, after RoPE."""
    norms: Tensor
    """`[L, H, T]` float16: the norms of the values."""
    worth: Tensor
    """`[L, H, F, T]` float16: root mean square, over the queries after a fold, of the share of
    attention that each token gets, times the norm of its value; 0 for tokens after the fold."""
    folds: tuple[int, ...]
    """The numbers of the F folds."""


@torch.no_grad()
def look_ahead(model: Any, token_ids: Sequence[int], plan: FoldPlan) -> Future | None:
    """Read a sequence under full attention.

    Args:
        model: a transformers causal LM, an adapter switched off.
        token_ids: the sequence.
        plan: what would leave when.

    Returns:
        None where no fold of the sequence has to choose.

    Raises:
        ValueError: if a layer of the model shows no attention.
    """
    folds = tuple(f for f in range(plan.folds(len(token_ids) - 1)) if plan.selects(f))
    if not folds:
        return None
    starts = [plan.first_fold + f * plan.stride for f in folds]
    first = plan.pinned_blocks * plan.block_size
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        keys, norms = key[0].float(), value[0].float().norm(dim=-1)
        queries = query[0].float().unflatten(0, (len(keys), -1))
        worth = _worth(queries, keys, norms, scale, starts)
        found[layer] = (
            keys[:, first:].half(),
            norms[:, first:].half(),
            worth[..., first:].half(),
        )

    visit_attention(model, torch.tensor(list(token_ids)), look)
    layers = range(model.config.num_hidden_layers)
    if set(found) != set(layers):
        raise ValueError(f"{type(model).__name__} has layers whose attention is not shown")
    keys, norms, worth = (torch.stack([found[i][j] for i in layers]) for j in range(3))
    return Future(plan=plan, keys=keys, norms=norms, worth=worth, folds=folds)


def _worth(query: Tensor, key: Tensor, norms: Tensor, scale: float, starts: list[int]) -> Tensor:
    """Compute `Future.worth` of one layer, `[H, F, N]` float32.

    Args:
        query: `[H, G, N, D]` float32, after RoPE.
        key: `[H, N, D]`, likewise.
        norms: `[H, N]`.
        scale: what the model multiplies products of queries and keys with.
        starts: the position of the first token after each fold.
    """
    num_tokens = key.shape[1]
    later = torch.arange(starts[0], num_tokens, device=key.device)
    logits = query[:, :, starts[0] :] @ key[:, None].mT * scale  # [H, G, n, N]
    hidden = torch.arange(num_tokens, device=key.device)[None] > later[:, None]
    shares = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    squares = shares.square().mean(1)  # [H, n, N]
    sums = squares.flip(1).cumsum(1).flip(1)  # over the queries from each one on
    found = []
    for start in starts:
        mean = sums[:, start - starts[0]] / (num_tokens - start)
        mean[:, start:] = 0
        found.append(mean.sqrt() * norms)
    return torch.stack(found, 1)
