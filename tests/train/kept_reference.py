"""Kept tokens spelled out: one forward over a whole sequence with a mask for every KV head.

Layer by layer the mask hides what has left and shows what was kept. What is kept follows from the
keys and values that this very forward has computed, by the scores and choices of `method.keep`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pte_vllm.method import keep
from pte_vllm.method.plan import FoldPlan
from tests.train import naive

NAME = "pte_test_kept"


class KeptReference:
    """Attention of one sequence under a plan that keeps tokens.

    Args:
        queries: Probes `[L, H, n, D]`.
        marks: What is kept at the first folds, `[L, H, C]` each; None: the scores say.
        cut: Whether keys and values of earlier segments count as constants.
    """

    def __init__(
        self,
        model: Any,
        plan: FoldPlan,
        queries: Tensor,
        *,
        marks: Sequence[Tensor | None] = (),
        cut: bool = False,
    ) -> None:
        self._model, self._plan, self._queries = model, plan, queries
        self._forced, self._cut = marks, cut
        self.own: dict[int, dict[int, Tensor]] = defaultdict(dict)
        """What the scores would have kept, `[H, C]` bool, by fold and layer."""

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Make it the model's attention inside the block."""
        before = self._model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)
        self._model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)

    def log_probs(self, ids: list[int]) -> Tensor:
        """Log-probs `[T - 1]` of the tokens after the first."""
        with self.attending():
            logits = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        k, v = key[0], value[0]  # [H, T, D]
        group, length = query.shape[1] // len(k), k.shape[1]
        visible, segment = self._visible(module.layer_idx, k.detach(), v.detach(), scaling)
        visible = visible.repeat_interleave(group, 0)
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        logits = query[0] @ k.mT * scaling
        if self._cut:
            same = segment[:, None] == segment[None]
            logits = torch.where(same, logits, query[0] @ k.detach().mT * scaling)
            shares = logits.masked_fill(~visible, -torch.inf).softmax(-1)
            out = (shares * same) @ v + (shares * ~same) @ v.detach()
        else:
            out = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        return out.transpose(0, 1)[None].reshape(1, length, len(k), -1), None

    def _visible(self, layer: int, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What each token sees by KV head, `[H, T, T]`, and after how many folds it comes `[T]`."""
        plan = self._plan
        heads, length = k.shape[:2]
        window, folds = naive.walk(length, plan)
        visible = window.repeat(heads, 1, 1)
        segment = torch.zeros(length, dtype=torch.int64)
        kept: list[list[int]] = [[] for _ in range(heads)]
        for fold, (at, evicted) in enumerate(folds):
            segment[at:] += 1
            candidates = [[*of_head, *evicted] for of_head in kept]
            if len(candidates[0]) > plan.keep_tokens:
                self.own[fold][layer] = self._choose(layer, fold, at, candidates, k, v, scale)
                marks = self.own[fold][layer]
                if fold < len(self._forced) and self._forced[fold] is not None:
                    marks = self._forced[fold][layer]
                kept = [
                    [token for token, stays in zip(tokens, row.tolist(), strict=True) if stays]
                    for tokens, row in zip(candidates, marks, strict=True)
                ]
            else:
                kept = candidates
            for head, tokens in enumerate(kept):
                # Until the next fold, which may drop some of them again.
                end = folds[fold + 1][0] if fold + 1 < len(folds) else length
                visible[head, at:end, tokens] = True
        return visible, segment

    def _choose(
        self,
        layer: int,
        fold: int,
        at: int,
        candidates: list[list[int]],
        k: Tensor,
        v: Tensor,
        scale: float,
    ) -> Tensor:
        plan, heads, size = self._plan, len(k), len(candidates[0])
        if plan.keep_score == "random":
            seed, number, which = (torch.tensor([x]) for x in (plan.evict_seed, fold, layer))
            scores = keep.random_scores(seed, number, which, heads, size)[0, 0]
        else:
            probes = self._queries[layer]  # [H, n, D]
            last = self._model.config.max_position_embeddings - 1
            offsets = (0, 8, 24, 48, 96, 160)
            positions = [min(at + offsets[i % 6], last) for i in range(probes.shape[1])]
            side_by_side = probes.transpose(0, 1).flatten(1)
            turned = naive.rotate(self._model, side_by_side, positions)
            turned = turned.unflatten(1, (heads, -1)).transpose(0, 1)
            scores = torch.stack(
                [
                    keep.expected_scores(q, k_h[tokens], v_h[tokens], k_h[at - plan.stride : at], s)
                    for q, k_h, v_h, tokens, s in zip(
                        turned, k, v, candidates, [scale] * heads, strict=True
                    )
                ]
            )
        return keep.survival(keep.best(scores, plan.keep_tokens), size)
