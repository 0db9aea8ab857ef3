"""Kept tokens: which of the evicted tokens each KV head goes on attending to.

At a fold the candidates are the tokens kept before and those that leave the window. Each KV head
of each layer keeps the `keep_tokens` of them with the highest scores, in position order, as
ordinary keys and values. A score is a function of what is in the cache and of fixed parameters; it
needs no query of the sequence, so it can be computed where a fold runs, and again anywhere else.

    expected   probes, which are queries of the model's own from before RoPE, stand for queries to
               come: turned to positions soon after the fold, they attend to the candidates and to
               as many of the newest tokens as leave. The score of a candidate is the root mean
               square of its share of that attention, times the norm of its value.
    random     drawn by a hash of the request's seed, the fold, the layer, the head and the place
               among the candidates: the control

Letters in shapes: S sequences, L layers, H KV heads, D head size, n probes, C candidates, m tokens
that leave (and as many newest ones), K tokens that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFSETS = (0, 8, 24, 48, 96, 160)
"""How far after a fold the queries stand for which probe i is rotated, by i modulo their number."""


def probe_positions(fold_at: Tensor, num_probes: int, num_positions: int) -> Tensor:
    """Return the position to which each probe is rotated, `[S, n]` int64.

    Args:
        fold_at: The position of the first token after the fold, `[S]` int64.
        num_probes: n.
        num_positions: How many positions the model's rotary table has; the last one stands for
            those past it.
    """
    offsets = torch.tensor(OFFSETS, device=fold_at.device)
    of_probes = offsets[torch.arange(num_probes, device=fold_at.device) % len(OFFSETS)]
    return (fold_at[:, None] + of_probes).clamp(max=num_positions - 1)


def expected_scores(
    probes: Tensor, keys: Tensor, values: Tensor, newest: Tensor, scale: float
) -> Tensor:
    """Score candidates by the attention that probes pay them, `[*, C]` float32.

    Args:
        probes: Queries, rotated to where they stand, `[*, n, D]`.
        keys: The candidates' keys as cached, after RoPE, `[*, C, D]`.
        values: Their values, `[*, C, D]`.
        newest: The keys of the newest tokens as cached, `[*, m, D]`.
        scale: What the model multiplies products of queries and keys with.
    """
    probes, keys, newest = probes.float(), keys.float(), newest.float()
    logits = probes @ keys.mT * scale  # [*, n, C]
    others = probes @ newest.mT * scale  # [*, n, m]
    total = torch.cat((logits, others), -1).logsumexp(-1, keepdim=True)
    shares = (logits - total).exp()
    scores: Tensor = shares.square().mean(-2).sqrt() * values.float().norm(dim=-1)
    return scores


def random_scores(
    seeds: Tensor, folds: Tensor, layers: Tensor, num_heads: int, num_candidates: int
) -> Tensor:
    """Draw a score for each candidate, `[L, S, H, C]` float64 in [0, 1).

    Args:
        seeds: The seed of each sequence, `[S]` int64.
        folds: The number of this fold of each sequence, from 0, `[S]` int64.
        layers: The indices of the model's layers, `[L]` int64.
        num_heads: H.
        num_candidates: C.
    """
    device = seeds.device
    heads = torch.arange(num_heads, device=device)
    places = torch.arange(num_candidates, device=device)
    state = _mixed(_mixed(seeds) ^ folds)[None, :, None, None]
    for numbers in (layers[:, None, None, None], heads[:, None], places):
        state = _mixed(state ^ numbers)
    return ((state >> 11) & (2**53 - 1)).double() / 2**53


def _mixed(x: Tensor) -> Tensor:
    """Mix 64 bits so that each depends on all (the finalizer of splitmix64)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift int64 right as if it had no sign."""
    shifted: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return shifted


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def best(scores: Tensor, keep_tokens: int) -> Tensor:
    """Return which candidates are kept, `[*, K]` int64: places among them, ascending.

    Of equal scores the earlier place wins, on every device.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep_tokens].sort(dim=-1).values


def survival(kept: Tensor, num_candidates: int) -> Tensor:
    """Turn places `[*, K]` into a mark for each candidate, `[*, C]` bool: what records carry."""
    marks = torch.zeros(*kept.shape[:-1], num_candidates, dtype=torch.bool, device=kept.device)
    return marks.scatter_(-1, kept, True)


def places(marks: Tensor, keep_tokens: int) -> Tensor:
    """Turn marks `[*, C]`, K of them in every row, back into places `[*, K]`, ascending."""
    return marks.byte().sort(dim=-1, descending=True, stable=True).indices[..., :keep_tokens]
