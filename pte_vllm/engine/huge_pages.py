"""A worker's memory on huge pages: weights and KV cache are read whole at every step of a CPU.

With pages of 4 KiB that is tens of thousands of address translations a step. Linux 6.1 and newer
moves memory that is in use to pages of 2 MiB when asked (MADV_COLLAPSE); nothing else changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

DISABLE = "PTE_HUGE_PAGES"
"""Set to 0 in the environment to do without."""
_COLLAPSE = 25  # MADV_COLLAPSE of linux/mman.h
_PAGE = 2 << 20
_LEAST_RESIDENT = 0.8
"""The least part of a mapping that must be in use: a huge page takes memory whole, and stacks of
threads are mostly empty."""


def collapse() -> int:
    """Move this process's large mappings to huge pages, once, and return the bytes that moved.

    The log tells how long it took. Where the system cannot, nothing happens but a line in the log.
    """
    if not _wanted():
        return 0
    began, moved = time.monotonic(), 0
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, end in _resident_mappings():
            for page in range(start, end, _PAGE):
                moved += _PAGE * (madvise(page, _PAGE, _COLLAPSE) == 0)
    except (OSError, AttributeError) as error:
        logger.info("No huge pages: %s", error)
        return 0
    if moved:
        seconds = time.monotonic() - began
        logger.info("%d MiB on huge pages after %.1f s (%s)", moved >> 20, seconds, DISABLE)
    else:
        logger.info("No huge pages: they need Linux 6.1 or newer")
    return moved


def _wanted() -> bool:
    return os.environ.get(DISABLE, "1") != "0"


def _resident_mappings() -> Iterator[tuple[int, int]]:
    """Bounds of anonymous writable mappings that are in use, in whole huge pages."""
    start = end = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # of a new mapping: bounds, rights, offset, device, inode, path
            wanted = rest[0] == "rw-p" and rest[3] == "0" and rest[4:] in ([], ["[heap]"])
            bounds = [int(part, 16) for part in key.split("-")] if wanted else [0, 0]
            start, end = -(-bounds[0] // _PAGE) * _PAGE, bounds[1] // _PAGE * _PAGE
        elif key == "Size:":
            size = int(rest[0])
        elif key == "Rss:" and end > start and int(rest[0]) >= _LEAST_RESIDENT * size:
            yield start, end


class Arena:
    """Memory for small tensors that are read together, on huge pages where there are any.

    Each block of it lives as long as any tensor in it.
    """

    _BLOCK = 2 * _PAGE

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of the tensor in the arena, aligned to 64 bytes."""
        size = tensor.numel() * tensor.element_size()
        start = -(-self._used // 64) * 64
        if start + size > len(self._block):
            self._block, start = self._new(max(self._BLOCK, size)), 0
        self._used = start + size
        copy = self._block[start : start + size].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    @staticmethod
    def _new(size: int) -> Tensor:
        if not (_wanted() and hasattr(mmap, "MADV_HUGEPAGE")):
            return torch.empty(size, dtype=torch.uint8)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, -(-size // _PAGE) * _PAGE, flags=private)
        with contextlib.suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)
