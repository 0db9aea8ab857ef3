"""State-modulated LoRA on CPU: one product into the states, one batched product, one product out.

vLLM's own path gathers the weights of every token. Here an adapter's matrices of a merged linear
(such as gate and up) are packed once, and all tokens of the adapter go through them together. At
the sizes of decoding a call costs more than its arithmetic, so B of several slices is one block
diagonal matrix: more zeros, fewer calls.

Letters in shapes: T tokens, n slices of a merged linear, R rank, D outputs of all slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as vllm_ops

from pte_vllm.ops.modulate import modulate_segments, modulate_tokens

if TYPE_CHECKING:
    from pte_vllm.lora import TokenSlots

_PRIMITIVES = 32
"""Shapes for which oneDNN keeps compiled code; as vLLM's own linears."""


class Product:
    """x Wᵀ with W `[d_out, d_in]` laid out for it by oneDNN where vLLM was built with that."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.contiguous()
        self._handler: Any = None
        if vllm_ops._supports_onednn:
            # A dtype that this CPU lacks; vLLM's own linears fall back alike.
            with contextlib.suppress(RuntimeError):
                self._handler = vllm_ops.create_onednn_mm(self._weight.t(), _PRIMITIVES)

    def __call__(self, x: Tensor) -> Tensor:
        """`x: [T, d_in]`; returns `[T, d_out]`."""
        if self._handler is None:
            return F.linear(x, self._weight)
        out: Tensor = vllm_ops.onednn_mm(self._handler, x, None)
        return out


class PackedLoRA:
    """One adapter's share of one linear, slices that it leaves alone left out."""

    def __init__(self, a: list[Tensor], b: list[Tensor], used: list[int]) -> None:
        self.shrink = Product(torch.cat([a[i] for i in used]))  # [n R, d_in]
        rank, outputs = a[0].shape[0], [part.shape[0] for part in b]
        block_diagonal = b[0].new_zeros(sum(outputs), len(used) * rank)  # [D, n R]
        for column, i in enumerate(used):
            first = sum(outputs[:i])
            block_diagonal[first : first + outputs[i], column * rank : (column + 1) * rank] = b[i]
        self.expand = Product(block_diagonal)
        self.num_slices, self.rank = len(used), rank

    @classmethod
    def pack(cls, a: list[Tensor], b: list[Tensor]) -> PackedLoRA | None:
        """Of each slice A `[R, d_in]` and B `[d, R]`; None if the adapter adds nothing here."""
        used = [i for i in range(len(a)) if a[i].any() and b[i].any()]
        return cls(a, b, used) if used else None


class CPULayerPunica:
    """vLLM's punica wrapper as one linear of the decoder sees it.

    Args:
        wrapper: vLLM's.
        states: of the layer, `[slots, R, R]`, as they are multiplied from the right.
        layer: its index.
        tokens: of the step.
        loaded: what is in one of vLLM's adapter slots; changes whenever its weights do.
    """

    def __init__(
        self,
        wrapper: Any,
        states: Tensor,
        layer: int,
        tokens: TokenSlots,
        loaded: Callable[[int], object],
    ) -> None:
        self._wrapper = wrapper
        self._states = states
        self._layer = layer
        self._tokens = tokens
        self._loaded = loaded
        self._packed: dict[int, tuple[object, PackedLoRA | None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice] += B_slice (Sᵀ (A_slice x)); alpha/r is already merged into B.

        `y: [T, D]`, `x: [T, d_in]`, each A `[adapters, 1, R, d_in]`, B `[adapters, 1, d, R]`.
        """
        if self._tokens.groups is None:
            self._tokens.groups = _group_by_adapter(self._wrapper.token_lora_indices)
        for index, rows in self._tokens.groups:
            packed = self._pack(index, lora_a_stacked, lora_b_stacked)
            if packed is None:
                continue
            shrunk = packed.shrink(x if rows is None else x[rows])
            if self._tokens.any:
                per_slice = shrunk.float().unflatten(1, (packed.num_slices, packed.rank))
                shrunk = self._modulate(per_slice, rows).flatten(1).to(x.dtype)
            delta = packed.expand(shrunk).to(y.dtype)
            if scale != 1.0:
                delta *= scale
            if rows is None:
                y += delta
            else:
                y.index_add_(0, rows, delta)

    def _pack(
        self, index: int, a_stacked: tuple[Tensor, ...], b_stacked: tuple[Tensor, ...]
    ) -> PackedLoRA | None:
        loaded = self._loaded(index)
        known = self._packed.get(index)
        if known is None or known[0] != loaded:
            packed = PackedLoRA.pack(
                [a[index, 0] for a in a_stacked], [b[index, 0] for b in b_stacked]
            )
            known = self._packed[index] = (loaded, packed)
        return known[1]

    def _modulate(self, a: Tensor, rows: Tensor | None) -> Tensor:
        """`a: [T, n, R]`, every token's slices by the token's state."""
        tokens = self._tokens
        if tokens.states is not None:
            own = tokens.states[self._layer]
            return torch.bmm(a, own if rows is None else own[rows])
        if rows is not None:
            return modulate_tokens(a, self._states, tokens.slots[rows])
        return modulate_segments(a, self._states, tokens.slots[: len(a)], tokens.segments)


def _group_by_adapter(indices: Tensor) -> list[tuple[int, Tensor | None]]:
    """Tokens of each adapter; `indices: [T]`, -1 for no adapter."""
    present = indices.unique().tolist()
    if len(present) == 1:
        return [(present[0], None)] if present[0] >= 0 else []
    return [(i, (indices == i).nonzero()[:, 0]) for i in present if i >= 0]
