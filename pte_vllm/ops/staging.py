"""Small host data on its way to the device, without the host waiting for what the device does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(data: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers (a list, nested lists or a tensor on the host) as a tensor on `device`.

    A copy from ordinary memory would wait until the device has done all that is queued, which at
    every step costs what asynchronous scheduling gains. PyTorch keeps the pinned memory of a copy
    until it is done.
    """
    pinned = device.type == "cuda"
    if isinstance(data, Tensor):
        host = data.to(dtype)
        host = host.pin_memory() if pinned else host
    else:
        host = torch.tensor(data, dtype=dtype, pin_memory=pinned)
    return host.to(device, non_blocking=True)
