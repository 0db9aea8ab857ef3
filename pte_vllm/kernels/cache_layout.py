"""Reading evicted keys and values back from the paged cache.

Attention kernels are free to store a block in any order: vLLM's CPU kernels keep keys transposed
(ISA `vec`) or tiled (`amx`). The order is found once, by writing known values through the
backend's own `do_kv_cache_update`, and undone by a gather: right on every ISA and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pte_vllm.kernels.cache_numbers import raw, stored_dtype, unreadable, written
from pte_vllm.method.rope import unrotate

_TOLERANCE = 0.05  # of a digit that is written: 8 bits store 1.25 for 1.3


@dataclass(frozen=True)
class BlockLayout:
    """The places of one head's keys and values within a block, as flat offsets over `[bs, 2 D]`."""

    key_index: Tensor  # [bs, D] int64
    value_index: Tensor  # [bs, D] int64

    @classmethod
    def probe(cls, layer: Any) -> BlockLayout:
        """Find the layout of a vLLM `Attention` layer whose cache is allocated.

        Raises:
            RuntimeError: If what was written cannot be found again.
            ValueError: If the layer's heads have scales of their own.
        """
        cache, dtype = layer.kv_cache, stored_dtype(layer)  # [blocks, heads, bs, 2 D]
        _, _, block_size, width = cache.shape
        dim, cells = width // 2, block_size * (width // 2)
        numbers = torch.arange(2 * cells, device=cache.device)
        symbols = _symbols(cache.device)
        # Every cell of the block gets a number; each pass writes one digit of it.
        found, digit = torch.zeros_like(numbers), 1
        while digit < 2 * cells:
            stored = written(layer, symbols[numbers // digit % len(symbols)]).view(dtype).float()
            error, symbol = (stored[:, None] / symbols - 1).abs().min(1)
            if not bool((error < _TOLERANCE).all()):
                raise unreadable(layer)
            found += digit * symbol  # [2 cells], by offset
            digit *= len(symbols)
        offset_of = torch.full((2 * cells,), -1, dtype=torch.int64, device=cache.device)
        offset_of[found.clamp(max=2 * cells - 1)] = numbers
        if not torch.equal(found[offset_of.clamp(min=0)], numbers):
            raise unreadable(layer)
        return cls(
            key_index=offset_of[:cells].view(block_size, dim),
            value_index=offset_of[cells:].view(block_size, dim),
        )

    def gather(
        self, caches: Sequence[Tensor], block_ids: Tensor, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read keys (as cached) and values of whole blocks, in token order, in fp32.

        Blocks are collected first, to put all layers in order at once.

        Args:
            caches: The caches of L layers, each `[blocks, H, bs, 2 D]`.
            block_ids: Which blocks to read, `[n]` int64.
            scales: What the L layers' stored keys and values are multiplied with, `[L, 2]`
                float32; None: with 1.

        Returns:
            Keys and values, each `[L, n * bs, H, D]`.
        """
        block_size, dim = self.key_index.shape
        blocks = torch.stack([raw(cache).index_select(0, block_ids) for cache in caches]).flatten(3)
        keys, values = (
            blocks[..., index.flatten()]  # [L, n, H, bs * D]
            .view(caches[0].dtype)
            .unflatten(3, (block_size, dim))
            .transpose(2, 3)
            .flatten(1, 2)
            .float()
            for index in (self.key_index, self.value_index)
        )
        if scales is not None:
            k_scale, v_scale = scales[:, :, None, None, None].unbind(1)
            keys, values = keys * k_scale, values * v_scale
        return keys, values


def _symbols(device: torch.device) -> Tensor:
    """Return the digits that a probe writes, `[16]`: far from each other, and from zero.

    In 8 bits each is stored as 1.25 times a power of two however a backend rounds, so that no two
    are stored alike. Integers would not do: above 16 e4m3 rounds them, and e5m2 above 8.
    """
    sizes = 1.3 * 2.0 ** torch.arange(8, device=device)
    return torch.cat((sizes, -sizes))


@dataclass(frozen=True)
class RopeTable:
    """The cos and sin that the model applies, each `[max_position, rotary_dim / 2]` in fp32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rotary: Any) -> RopeTable:
        """Read the table of a vLLM `RotaryEmbedding`.

        Raises:
            ValueError: For a rotation in interleaved layout.
        """
        if not getattr(rotary, "is_neox_style", True):
            raise ValueError("PTE supports rotary embeddings in half layout only (is_neox_style)")
        cos, sin = rotary.cos_sin_cache.float().chunk(2, dim=-1)
        return cls(cos=cos.contiguous(), sin=sin.contiguous())


def read_evicted(
    caches: Sequence[Tensor],
    layout: BlockLayout,
    block_ids: Tensor,
    positions: Tensor,
    rope: RopeTable | None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read `K_e, V_e: [L, S, m, d_kv]`, the keys and values that S sequences fold, in fp32.

    Args:
        caches: The caches of the L layers that have a state, each `[blocks, H, bs, 2 D]`.
        layout: How the attention backend orders the numbers of a block.
        block_ids: The n blocks that each sequence folds, `[S, n]` int64 in token order; m = n * bs.
        positions: The position of the first token of each of these blocks, `[S, n]` int64.
        rope: The model's table, to undo RoPE; None leaves keys as cached.
        scales: As `BlockLayout.gather` has them.
    """
    keys, values = (
        found.unflatten(1, (len(block_ids), -1))  # [L, S, m, H, D]
        for found in layout.gather(caches, block_ids.flatten(), scales)
    )
    if rope is not None:
        steps = torch.arange(len(layout.key_index), device=block_ids.device)
        of_tokens = (positions[..., None] + steps).flatten(1)  # [S, m]
        keys = unrotate(keys, rope.cos[of_tokens], rope.sin[of_tokens])
    return keys.flatten(3), values.flatten(3)
