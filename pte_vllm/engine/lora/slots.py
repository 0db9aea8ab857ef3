"""Which thought state modulates which token of a step; LoRA layers read it in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from pte_vllm.kernels.modulate import Segment


@dataclass
class TokenSlots:
    """The slot of each token of the step; the runner writes it before the forward pass."""

    slots: Tensor  # [max_num_batched_tokens] int64, persistent: graphs replay over it
    segments: list[Segment] = field(default_factory=list)
    any: bool = False
    """Whether any token has a thought state."""
    groups: list[tuple[int, Tensor | None]] | None = None
    """Per adapter of the step its index and its tokens (None: all); found by the first layer."""

    @classmethod
    def allocate(cls, max_num_batched_tokens: int, device: torch.device) -> TokenSlots:
        return cls(slots=torch.zeros(max_num_batched_tokens, dtype=torch.int64, device=device))

    def publish(self, segments: list[Segment]) -> None:
        """Set the step's tokens, in batch order; tokens past them use the identity."""
        self.segments, self.groups = segments, None
        self.any = any(slot for _, _, slot in segments)
        self.slots.zero_()
        if self.any:
            # numpy, as torch's would share these few numbers out among threads.
            lengths = [end - start for start, end, _ in segments]
            per_token = np.repeat([slot for _, _, slot in segments], lengths)
            async_tensor_h2d(torch.from_numpy(per_token), out=self.slots[: len(per_token)])
