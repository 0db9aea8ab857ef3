"""Whether what an adapter adds stays a number in the engine's precision.

Finite weights can overflow: the product of B and A, or the model's own products of what they add.
One forward pass would show it for one input; here a bound holds for all. What passes and still
overflows ends its own requests (`engine/failures.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pte_vllm.adapter.files import AdapterError


def largest_output(dtype: torch.dtype) -> float:
    """Return the largest activation that the next operation of a model can take.

    Norms and attention multiply two activations in fp32, so it is the root of fp32's largest
    number, or the largest that `dtype` itself holds.
    """
    return min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float32).max))


def check_lora(where: str, a: Tensor, b: Tensor, *, scale: float, dtype: torch.dtype) -> None:
    """Check one linear's pair of matrices.

    Args:
        where: The file and the module, for the message.
        a: A `[G, d_in]`.
        b: B `[d_out, r]`.
        scale: The factor on what they add.
        dtype: The engine's precision of LoRAs.

    Raises:
        AdapterError: If a value is not finite in `dtype`, or what they add to an input of mean
            square one may be more than the model can go on with.
    """
    for side, tensor in (("lora_A", a), ("lora_B", b)):
        if not torch.isfinite(tensor.to(dtype)).all():
            name = str(dtype).removeprefix("torch.")
            raise AdapterError(f"{where}: {side} has values that are not finite in {name}")
    # ‖B·A·x‖ ≤ ‖B‖·‖A‖·‖x‖; in fp64, as the norms themselves may overflow.
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in (a, b)]
    most = abs(scale) * math.prod(norms) * math.sqrt(a.shape[1])
    limit = largest_output(dtype)
    if most > limit:
        raise AdapterError(
            f"{where}: lora_A and lora_B are too large together: they may add {most:.1e}, and the "
            f"model can go on with {limit:.1e} at most"
        )
