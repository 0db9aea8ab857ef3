"""State-modulated LoRA on a GPU, between vLLM's own kernels for A and B.

What runs here is traced by torch.compile and captured into CUDA graphs: shapes come from the
inputs, states and slots stay at their addresses, and the host decides nothing by their values.

Letters in shapes: T tokens, n slices of a merged linear (such as gate and up), R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pte_vllm.engine.lora import operators
from pte_vllm.engine.lora.punica_view import PunicaView
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.engine.ranks import Ranks
from pte_vllm.kernels.choice import use_kernels
from pte_vllm.kernels.modulate import modulate_slices, modulate_tokens


def _modulate(
    a: torch.Tensor, states: torch.Tensor, squared: torch.Tensor, token_slots: torch.Tensor
) -> None:
    from pte_vllm.kernels.modulate_triton import modulate_slices_  # a CPU may have no Triton

    modulate_slices_(a, states, squared, token_slots)


_modulate_ = operators.register("modulate_", _modulate, mutates=["a"])


class CUDALayerPunica(PunicaView):
    """A view of vLLM's punica wrapper for one linear of the decoder, on a GPU.

    Args:
        wrapper: vLLM's punica wrapper, whose kernels multiply by A and by B.
        states: The states of the layer, `[slots, R, R]`, as they are multiplied from the right.
        squared: Whether A x is squared first for a slot, `[slots]` bool; see `kernels.modulate`.
        tokens: Which state each token of the step uses.
        ranks: Those that share out the inputs of the linear; None where each has all of them.
    """

    def __init__(
        self,
        wrapper: Any,
        states: Tensor,
        squared: Tensor,
        tokens: TokenSlots,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(wrapper)
        self._ranks = ranks
        self._states, self._squared = states, squared
        self._tokens = tokens
        self._modulate_ = _modulate_ if use_kernels(states.device) else modulate_slices

    @property
    def _adds(self) -> bool:
        """Whether this rank adds B's part, which all would make alike: the first one does."""
        return self._ranks is None or self._ranks.rank == 0

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

        `y: [T, d_out]`, `x: [T, d_in]`, each A `[adapters, 1, R, d_in]`, B `[adapters, 1, d, R]`.
        Without `add_inputs` y holds zeros.
        """
        assert scale == 1.0, "vLLM merges the scale into B; here it would come before φ"
        if x.dtype == torch.float32:
            self._add_in_fp32(y, x, lora_a_stacked, lora_b_stacked)
            return
        rank = lora_b_stacked[0].size(-1)
        # The shrink kernel zeroes the buffer itself.
        buffer = torch.empty(
            (len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device
        )
        self._wrapper.add_shrink(buffer, x, lora_a_stacked, scale)
        if self._ranks is not None:
            buffer = self._ranks.sum_inputs(buffer)
        self._modulate_(buffer, self._states, self._squared, self._tokens.slots)
        if not self._adds:
            return
        self._wrapper.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs)

    def _add_in_fp32(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
    ) -> None:
        """Add in fp32, which checks of exactness need: vLLM's kernels take 16-bit numbers only.

        Every adapter is multiplied by every token, and what belongs to others is dropped.
        """
        num_tokens = x.size(0)
        slots = self._tokens.slots[:num_tokens]
        # Not the wrapper's property, whose length is a number that a trace would keep.
        indices = self._wrapper._token_lora_indices[:num_tokens]
        for adapter in range(lora_a_stacked[0].size(0)):
            mine, offset = (indices == adapter)[:, None], 0
            for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True):
                shrunk = x @ a[adapter, 0].mT
                if self._ranks is not None:
                    shrunk = self._ranks.sum_inputs(shrunk)
                shrunk = modulate_tokens(shrunk, self._states, self._squared, slots)
                if self._adds:
                    out = y[:, offset : offset + b.size(2)]
                    out += torch.where(mine, shrunk @ b[adapter, 0].mT, 0.0)
                offset += b.size(2)
