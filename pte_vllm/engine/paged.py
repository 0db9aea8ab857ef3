"""A worker's paged cache as folds read it: the caches of its layers, and what is in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout
from pte_vllm.kernels.cache_numbers import FLOAT8, layer_scales, stored_dtype


@dataclass(frozen=True)
class PagedCaches:
    """The caches of decoder layers; it lives as long as they do."""

    caches: Mapping[int, Tensor]
    """The cache of each layer, `[blocks, H, bs, 2 D]`, in the dtype of what is stored."""
    layout: BlockLayout
    scales: Mapping[int, Tensor] | None
    """What the stored keys and values of each layer are multiplied with, `[2]` float32 on the
    device; None where they are stored as they are."""

    @classmethod
    def of(cls, layers: Mapping[int, Any]) -> PagedCaches:
        """Find out what vLLM's `Attention` layers keep, whose caches are allocated.

        Raises:
            RuntimeError: If what a layer writes cannot be found again.
            ValueError: If the heads of a layer have scales of their own.
        """
        example = next(iter(layers.values()))
        dtype = stored_dtype(example)
        scales = None
        if dtype in FLOAT8:
            device = example.kv_cache.device
            scales = {
                i: torch.tensor(layer_scales(layer), device=device) for i, layer in layers.items()
            }
        return cls(
            caches={i: layer.kv_cache.view(dtype) for i, layer in layers.items()},
            layout=BlockLayout.probe(example),
            scales=scales,
        )

    def scales_of(self, layers: Sequence[int]) -> Tensor | None:
        """Return the scales of some layers, `[L, 2]`, without waiting for the device."""
        return None if self.scales is None else torch.stack([self.scales[i] for i in layers])
