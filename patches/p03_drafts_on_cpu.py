"""Sample what drafts are compared with at the request's own temperature, on a CPU.

vLLM spreads each request's temperature, top-k and top-p over the tokens that it verifies. Where
C++ does that in Triton's place, it writes into a copy unless the numbers are 64-bit integers, which
none of the three are. What is sampled then depends on whatever the memory held before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from pte_vllm.patches.base import Patch


def _wrap(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(original)
    def expand_batch_to_tokens(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        replaced = x.masked_fill(x == replace_from, replace_to)
        return replaced.repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


PATCH = Patch(
    name="p03_drafts_on_cpu",
    target="vllm.v1.sample.rejection_sampler.expand_batch_to_tokens",
    upstream="vllm/v1/sample/rejection_sampler.py at v0.32.0",
    why="temperature, top-k and top-p of sampled requests with drafts are not set on a CPU",
    remove_when="`_expand_kernel_impl` (vllm/utils/cpu_triton_utils.py) writes into its output",
    sha256="7bf9592af7310793b925aa057e461008cc307a85f656320ef00c068edce09e86",
    wrap=_wrap,
)
