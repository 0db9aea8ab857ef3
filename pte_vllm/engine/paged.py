"""A worker's paged cache as folds read it: the caches of its layers, and what is in their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pte_vllm.kernels.cache_layout import BlockLayout
from pte_vllm.kernels.cache_numbers import FLOAT8, layer_scales, stored_dtype

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


def only_group(config: KVCacheConfig) -> KVCacheGroupSpec:
    """Return the one group of layers that a cache has.

    Raises:
        ValueError: If there are several.
    """
    if len(config.kv_cache_groups) > 1:
        raise ValueError(
            "PTE supports one kind of KV cache, and this model has several, or the head of "
            "--speculative-config has other KV heads than the model"
        )
    (group,) = config.kv_cache_groups
    return group


@dataclass(frozen=True)
class PagedCaches:
    """The caches of decoder layers; it lives as long as they do."""

    caches: Mapping[int, Tensor]
    """The cache of each layer of the model, `[blocks, H, bs, 2 D]`, in the dtype that is stored."""
    layout: BlockLayout
    scales: Mapping[int, Tensor] | None
    """What the stored keys and values of each layer are multiplied with, `[2]` float32 on the
    device; None where they are stored as they are."""
    drafting: tuple[Tensor, ...] = ()
    """The caches of layers of a head that drafts, which share the model's blocks."""

    @classmethod
    def of(cls, layers: Mapping[int, Any], num_layers: int) -> PagedCaches:
        """Find out what vLLM's `Attention` layers keep, whose caches are allocated.

        Args:
            layers: The layers by number.
            num_layers: How many of them are the model's; those of a head that drafts follow.

        Raises:
            RuntimeError: If what a layer writes cannot be found again.
            ValueError: If the heads of a layer have scales of their own.
        """
        example = layers[0]
        dtype = stored_dtype(example)
        scales = None
        if dtype in FLOAT8:
            device = example.kv_cache.device
            scales = {
                i: torch.tensor(layer_scales(layers[i]), device=device) for i in range(num_layers)
            }
        caches = {i: layer.kv_cache.view(dtype) for i, layer in layers.items()}
        return cls(
            caches={i: caches[i] for i in range(num_layers)},
            layout=BlockLayout.probe(example),
            scales=scales,
            drafting=tuple(cache for i, cache in caches.items() if i >= num_layers),
        )

    def scales_of(self, layers: Sequence[int]) -> Tensor | None:
        """Return the scales of some layers, `[L, 2]`, without waiting for the device."""
        return None if self.scales is None else torch.stack([self.scales[i] for i in layers])
