"""Where our kernels run: the one choice of device that folds and LoRA share."""

from __future__ import annotations

import os

import torch

from pte_vllm.kernels import native


def use_kernels(device: torch.device) -> bool:
    """Return whether Triton kernels run on a device: on a GPU, unless PTE_NATIVE=0 is set."""
    return device.type == "cuda" and os.environ.get(native.DISABLE, "1") != "0"
