"""Which evicted tokens each KV head of a replay goes on attending to (`method.keep`).

Every layer keeps, with an encoder or without, and a base model keeps too. The choice has no
gradient. A record of another run may say what was kept there: that is then kept here as well,
whatever the replay would have chosen.

Shapes: B sequences in T columns (`AlignedBatch`), L layers of the model, H KV heads, D head size,
n probes, C candidates, m tokens that leave, K tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.probe_scoring import rotated, scale_of
from pte_vllm.adapter.probes import Probes
from pte_vllm.method import keep
from pte_vllm.method.keep_marks import num_candidates
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.window_cache import WindowCache

Marks = Sequence[Tensor | None]
"""What one sequence kept at each of its first folds, `[L, H, C]` bool with K of C marked in each
row; None for a fold that kept all its candidates, and for one that is to be chosen."""


class Keeper:
    """The probes of a base model where the model is; made once, for any number of replays.

    Args:
        model: The model that is replayed.
        probes: Probes of that model.

    Raises:
        ProbesError: If they are for a model of other sizes.
    """

    def __init__(self, model: PTEModel, probes: Probes) -> None:
        ModelShape.from_hf(model.base.config).check_probes(probes)
        self.queries = probes.queries.to(model.device)
        """`[L, H, n, D]` fp32."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the sequences of a batch keep at one fold."""

    marks: Tensor  # [L, B, H, C] bool
    places: Tensor  # [L, B, H, K] int64, the marked candidates in order
    agreement: Tensor  # [B] which part of the marks the replay would have set itself


class Keeping:
    """The choices of one replay.

    Args:
        model: The model that is replayed.
        batch: Its sequences; their plan has `keep_tokens`.
        keeper: The model's probes, by which the score `expected` chooses unless the adapter brings
            its own.
        marks: What each sequence is made to keep; None, or an empty list for one: it chooses.

    Raises:
        ValueError: If probes are needed and missing, or marks do not fit a sequence and its folds.
    """

    def __init__(
        self,
        model: PTEModel,
        batch: AlignedBatch,
        keeper: Keeper | None,
        marks: Sequence[Marks] | None,
    ) -> None:
        own = model.probe_queries
        self._queries = own if own is not None or keeper is None else keeper.queries
        if batch.plan.keep_score == "expected" and self._queries is None:
            raise ValueError(
                f"{batch.plan.keep_tokens} kept tokens of score expected are chosen by probes: "
                "give the replay a Keeper with the model's file of probes, or use score random"
            )
        self._base = model.base
        self._batch, self._plan = batch, batch.plan
        self._shape = ModelShape.from_hf(model.base.config)
        self._marks = marks if marks is not None else [()] * len(batch.ids)
        self._check_marks()

    def _check_marks(self) -> None:
        plan, batch = self._plan, self._batch
        if len(self._marks) != len(batch.ids):
            raise ValueError(f"{len(batch.ids)} sequences, and marks of {len(self._marks)}")
        ends = (batch.left + batch.lengths).tolist()
        for b, (end, of_folds) in enumerate(zip(ends, self._marks, strict=True)):
            if len(of_folds) > plan.folds(end - 1):
                raise ValueError(
                    f"sequence {b} folds {plan.folds(end - 1)} times, and has marks of "
                    f"{len(of_folds)} folds"
                )
            for fold, marks in enumerate(of_folds):
                if marks is not None:
                    self._check(f"sequence {b}, fold {fold}", fold, marks)

    def _check(self, where: str, fold: int, marks: Tensor) -> None:
        plan = self._plan
        if not plan.selects(fold):
            raise ValueError(f"{where}: it keeps all candidates, and there are marks for it")
        wanted = (self._shape.num_layers, self._shape.num_kv_heads, num_candidates(plan, fold))
        if marks.dtype != torch.bool or tuple(marks.shape) != wanted:
            raise ValueError(
                f"{where}: marks must be bool of shape {list(wanted)}, got {marks.dtype} of "
                f"{list(marks.shape)}"
            )
        counts = marks.sum(-1)
        wrong = counts[counts != plan.keep_tokens]
        if len(wrong):
            raise ValueError(
                f"{where}: every head keeps {plan.keep_tokens} tokens, and one has "
                f"{int(wrong[0])} marks"
            )

    def forced(self, b: int, fold: int) -> Tensor | None:
        """Return what sequence b is made to keep at a fold, `[L, H, C]`; None: its own choice."""
        of_folds = self._marks[b]
        return of_folds[fold] if fold < len(of_folds) else None

    @torch.no_grad()
    def choose(self, cache: WindowCache, candidates: Tensor, fold: int, start: int) -> Kept:
        """Choose what stays at a fold, counted from 0, before column `start`.

        Args:
            cache: Everything that is held, candidates and window, before anything leaves.
            candidates: The places of the candidates in it, `[C]`; more than may stay.
        """
        scores = self._scores(cache, candidates, fold, start)
        keep_tokens = self._plan.keep_tokens
        chosen = [keep.best(of_layer, keep_tokens) for of_layer in scores]
        own = keep.survival(torch.stack(chosen), scores[0].shape[-1])  # [L, B, H, C]
        used = own.clone()
        for b in range(len(self._marks)):
            forced = self.forced(b, fold)
            if forced is not None:
                used[:, b] = forced.to(used.device)
        agreed = (own & used).sum((0, 2, 3)) / own[:, 0].sum()
        return Kept(marks=used, places=keep.places(used, keep_tokens), agreement=agreed)

    def _scores(
        self, cache: WindowCache, candidates: Tensor, fold: int, start: int
    ) -> Sequence[Tensor]:
        """Score the candidates of each layer, `[B, H, C]` each."""
        plan, device = self._plan, self._batch.ids.device
        shape = self._shape
        if plan.keep_score == "random":
            rows = torch.ones(len(self._batch.ids), dtype=torch.int64, device=device)
            layers = torch.arange(shape.num_layers, device=device)
            drawn = keep.random_scores(
                rows * plan.evict_seed, rows * fold, layers, shape.num_kv_heads, len(candidates)
            )
            return list(drawn)
        assert self._queries is not None
        positions = keep.probe_positions(
            start - self._batch.left,
            self._queries.shape[2],
            self._base.config.max_position_embeddings,
        )
        found = []
        for i, layer in enumerate(cache.layers):
            keys, values = layer.past
            # One layer's rotated probes at a time: all of them would be L times as many numbers.
            probes = rotated(self._base, self._queries[i], positions, keys)
            found.append(
                keep.expected_scores(
                    probes,
                    keys[:, :, candidates],
                    values[:, :, candidates],
                    keys[:, :, -plan.stride :],
                    scale_of(self._base, i, shape),
                )
            )
        return found
