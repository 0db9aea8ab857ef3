"""State-modulated LoRA on CPU.

vLLM's own path gathers the weights of every token; adapters of a batch are few, so tokens are
grouped by adapter here. Compiled code does all slices and all three products of a linear in one
call: at the sizes of decoding a call of torch costs more than its arithmetic. Machines without a
compiler go through torch, slice by slice.

Letters in shapes: T tokens, n slices of a merged linear (such as gate and up), R rank, D outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.logger import init_logger

from pte_vllm.engine.huge_pages import Arena
from pte_vllm.engine.lora.punica_view import OpaquePunicaView
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.kernels import native
from pte_vllm.kernels.modulate import modulate_segments, modulate_tokens

if TYPE_CHECKING:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_LANES, _TILE = 16, 64  # as kernels/lora_cpu.cpp


class NativeLoRA:
    """One adapter's share of one linear, packed for the compiled code.

    Args:
        library: The compiled code, from `native.load`.
        a: A of each slice, `[R, d_in]`, fp32 or bf16.
        b: B of each slice, `[d, R]`, of the same type; slices of zeros are left out.
        arena: The memory that the packed weights go to.
    """

    def __init__(
        self, library: ctypes.CDLL, a: list[Tensor], b: list[Tensor], arena: Arena
    ) -> None:
        used = [i for i in range(len(a)) if a[i].any() and b[i].any()]
        self.empty = not used
        if self.empty:
            return
        dtype = a[0].dtype
        self._function = getattr(library, f"pte_lora_{str(dtype).removeprefix('torch.')}")
        pairs = 4 // dtype.itemsize  # numbers that are multiplied together, side by side
        d_in, rank = a[0].shape[1], a[0].shape[0]
        r_pad = rank + -rank % pairs
        stacked = torch.cat([a[i] for i in used])
        self._a = arena.keep(F.pad(stacked, (0, -d_in % (_LANES * pairs))))
        tiles, about, first = [], [], 0
        for i, matrix in enumerate(b):
            if i in used:
                padded = F.pad(matrix, (0, r_pad - rank, 0, -len(matrix) % _TILE))
                # [tiles, 64, r_pad / pairs, pairs] to [tiles, r_pad / pairs, 64, pairs]
                tiles.append(padded.reshape(-1, _TILE, r_pad // pairs, pairs).transpose(1, 2))
                for start in range(0, len(matrix), _TILE):
                    width = min(_TILE, len(matrix) - start)
                    about.append((used.index(i), first + start, width))
            first += len(matrix)
        self._b = arena.keep(torch.cat(tiles))
        self._tiles = torch.tensor(about, dtype=torch.int32)
        self._packed = (
            self._a.data_ptr(),
            self._b.data_ptr(),
            self._tiles.data_ptr(),
            len(about),
            d_in,
            self._a.shape[1],
            rank,
            r_pad,
            len(used),
        )

    def add(
        self, y: Tensor, x: Tensor, states: Tensor | None, squared: Tensor, slots: Tensor
    ) -> None:
        """Add B Sᵀ φ(A x) to y, in place.

        Args:
            y: The layer's output, `[T, D]`.
            x: The layer's input, `[T, d_in]`; rows of x and y may be apart, the numbers of a row
                may not.
            states: The state in each slot, `[slots, R, R]` of the type of A and B; None if all are
                the identity.
            squared: Whether φ squares for a slot, `[slots]` bool.
            slots: The slot of each token, `[T]` int64.
        """
        self._function(
            *self._packed,
            None if states is None else states.data_ptr(),
            squared.data_ptr(),
            slots.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            x.shape[0],
        )


class CPULayerPunica(OpaquePunicaView):
    """A view of vLLM's punica wrapper for one linear of the decoder, on a CPU.

    Args:
        module: vLLM's LoRA layer around the linear; its adapters' weights stay where they are.
        states: The states of the layer, `[slots, R, R]`, as they are multiplied from the right; the
            compiled code wants them in the type of A and B.
        squared: Whether A x is squared first for a slot, `[slots]` bool; see `kernels.modulate`.
        tokens: Which state each token of the step uses.
        loaded: Says what is in one of vLLM's adapter slots; the answer changes whenever the weights
            there do.
        library: The compiled code, if there is any.
        arena: The memory that packed weights go to.
    """

    def __init__(
        self,
        module: BaseLinearLayerWithLoRA,
        states: Tensor,
        squared: Tensor,
        tokens: TokenSlots,
        loaded: Callable[[int], object],
        library: ctypes.CDLL | None,
        arena: Arena,
    ) -> None:
        super().__init__(module.punica_wrapper)
        self._a_stacked, self._b_stacked = module.lora_a_stacked, module.lora_b_stacked
        self._states, self._squared = states, squared
        self._tokens = tokens
        self._loaded = loaded
        self._library = library
        self._arena = arena
        self._packed: dict[int, tuple[object, NativeLoRA]] = {}

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
        """Set y[:, slice] += B_slice (Sᵀ φ(A_slice x)); alpha/r is already merged into B.

        `y: [T, D]`, `x: [T, d_in]`, each A `[adapters, 1, R, d_in]`, B `[adapters, 1, d, R]`.
        """
        assert scale == 1.0 and add_inputs, "vLLM merges the scale into B, and adds in place"
        self.apply(y, x)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Do the work of `add_lora_linear`; torch.compile does not look into it."""
        tokens = self._tokens
        same_dtype = x.dtype == y.dtype == self._states.dtype == self._a_stacked[0].dtype
        states = self._states if tokens.any else None
        for index, rows in self._groups():
            if self._library is None or not same_dtype:
                self._add_by_slice(y, x, *self._weights(index), rows)
                continue
            packed = self._pack(index)
            if packed.empty:
                continue
            if rows is None:
                packed.add(y, x, states, self._squared, tokens.slots)
            else:
                part = y[rows]
                packed.add(part, x[rows], states, self._squared, tokens.slots[rows])
                y[rows] = part

    def _groups(self) -> list[tuple[int, Tensor | None]]:
        """Return the step's tokens of each adapter, which the first layer of a step finds."""
        if self._tokens.groups is None:
            self._tokens.groups = _group_by_adapter(self._wrapper.token_lora_indices)
        return self._tokens.groups

    def _weights(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return A `[R, d_in]` and B `[d, R]` of each slice, of the adapter in a slot of vLLM's."""
        return [a[index, 0] for a in self._a_stacked], [b[index, 0] for b in self._b_stacked]

    def _pack(self, index: int) -> NativeLoRA:
        loaded = self._loaded(index)
        known = self._packed.get(index)
        if known is None or known[0] != loaded:
            assert self._library is not None
            packed = NativeLoRA(self._library, *self._weights(index), self._arena)
            known = self._packed[index] = (loaded, packed)
        return known[1]

    def _add_by_slice(
        self, y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], rows: Tensor | None
    ) -> None:
        offset, part = 0, x if rows is None else x[rows]
        for a_slice, b_slice in zip(a, b, strict=True):
            shrunk = self._modulate(F.linear(part, a_slice).float(), rows)
            delta = F.linear(shrunk.to(b_slice.dtype), b_slice).to(y.dtype)
            out = y[:, offset : offset + len(b_slice)]
            if rows is None:
                out += delta
            else:
                out.index_add_(0, rows, delta)
            offset += len(b_slice)

    def _modulate(self, a: Tensor, rows: Tensor | None) -> Tensor:
        """Multiply `a: [T, R]`, every token by its state."""
        tokens = self._tokens
        if not tokens.any:
            return a
        about = self._states, self._squared
        if rows is not None:
            return modulate_tokens(a, *about, tokens.slots[rows])
        return modulate_segments(a, *about, tokens.slots[: len(a)], tokens.segments)


def load_native(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled code for a type of LoRA; None, with a line in the log, without any."""
    if dtype not in (torch.float32, torch.bfloat16):
        logger.info("LoRA on CPU: through torch, as there is no compiled code for %s", dtype)
        return None
    try:
        library = native.load()
    except native.NativeError as error:
        logger.warning("LoRA on CPU: through torch, which is slower: %s", error)
        return None
    logger.info("LoRA on CPU: compiled code")
    return library


def _group_by_adapter(indices: Tensor) -> list[tuple[int, Tensor | None]]:
    """Return the tokens of each adapter; `indices: [T]`, -1 for no adapter."""
    present = indices.unique().tolist()
    if len(present) == 1:
        return [(present[0], None)] if present[0] >= 0 else []
    return [(i, (indices == i).nonzero()[:, 0]) for i in present if i >= 0]
