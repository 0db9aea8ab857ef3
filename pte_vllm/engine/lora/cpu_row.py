"""State-modulated LoRA on a CPU where ranks share out the inputs of a linear (o_proj, down_proj).

There A x is a sum over the ranks' inputs, and φ and S must see the whole. So the ranks add A x up,
`[T, R]`, modulate it alike, and the first one adds B's part: vLLM adds the outputs up afterwards
(`RowParallelLinearWithLoRA.forward` in vllm/lora/layers/row_parallel_linear.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pte_vllm.engine.lora.cpu import CPULayerPunica
from pte_vllm.engine.ranks import Ranks


class CPURowPunica(CPULayerPunica):
    """A view of vLLM's punica wrapper for one linear of the decoder whose inputs are shared out.

    Args:
        args: As `CPULayerPunica` has them.
        ranks: Those that share out the inputs.
    """

    def __init__(self, *args: Any, ranks: Ranks) -> None:
        super().__init__(*args)
        self._ranks = ranks
        self._used: dict[int, tuple[object, bool]] = {}

    def add(self, y: Tensor, x: Tensor) -> None:
        """Do the work of `add_lora_linear`; torch.compile does not look into it.

        Whether to wait for the others must not depend on what a rank has of A: B is the same on
        all, and so are the step's tokens.
        """
        if not self._tokens.any:  # A x is not looked at, so its parts can go through B one by one
            super().add(y, x)
            return
        groups = [(index, rows) for index, rows in self._groups() if self._is_used(index)]
        if not groups:
            return
        shrunk = x.new_zeros(len(x), self._a_stacked[0].shape[2], dtype=torch.float32)
        for index, rows in groups:
            ((a,), _) = self._weights(index)
            own = slice(None) if rows is None else rows
            shrunk[own] = F.linear(x[own].to(a.dtype), a).float()
        shrunk = self._modulate(self._ranks.sum_inputs(shrunk), None)
        if self._ranks.rank > 0:
            return
        for index, rows in groups:
            (_, (b,)) = self._weights(index)
            own = slice(None) if rows is None else rows
            y[own] += F.linear(shrunk[own].to(b.dtype), b).to(y.dtype)

    def _is_used(self, index: int) -> bool:
        """Return whether the adapter in a slot of vLLM's has weights for this linear."""
        loaded = self._loaded(index)
        known = self._used.get(index)
        if known is None or known[0] != loaded:
            (_, (b,)) = self._weights(index)
            known = self._used[index] = loaded, bool(b.any())
        return known[1]
