"""Devices that `pte-vllm plan` knows, by their vendors' figures. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device; vendors' figures, dense bf16."""

    name: str
    memory_bytes: float
    bandwidth: float
    """Bytes per second."""
    peak: float
    """Operations per second."""
    fp32_peak: float
    """The same in float32, without tensor cores: folds compute so."""


def _gpu(
    name: str, gigabytes: float, terabytes_s: float, teraflops: float, fp32_teraflops: float
) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=gigabytes * 1e9,
        bandwidth=terabytes_s * 1e12,
        peak=teraflops * 1e12,
        fp32_peak=fp32_teraflops * 1e12,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 2.039, 312, 19.5),
        _gpu("h100", 80, 3.35, 989, 67),
        _gpu("h200", 141, 4.8, 989, 67),
        _gpu("b200", 180, 8.0, 2250, 75),
        _gpu("l40s", 48, 0.864, 362, 91.6),
        _gpu("rtx4090", 24, 1.008, 165, 82.6),
    )
}


FP32_PART = 30
"""What a device's float32 speed is taken to be below its peak, where only this is known."""


def hardware_of(name: str, given: Mapping[str, float | None]) -> Hardware:
    """A GPU of the table, or one given by `memory_gb`, `bandwidth_gb_s` and `tflops`.

    `fp32_tflops` may be left out: where the GPU or its `tflops` are not those of the table, they
    are guessed.

    Raises:
        ValueError: naming the flag.
    """
    known = GPUS.get(name.lower())
    units = {
        "memory_bytes": ("memory_gb", 1e9),
        "bandwidth": ("bandwidth_gb_s", 1e9),
        "peak": ("tflops", 1e12),
        "fp32_peak": ("fp32_tflops", 1e12),
    }
    found: dict[str, float] = {}
    for field, (option, unit) in units.items():
        value = given.get(option)
        if value is None:
            continue
        if not 0 < value < math.inf:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, got {value}")
        found[field] = value * unit
    if known is None and not found.keys() >= {"memory_bytes", "bandwidth", "peak"}:
        raise ValueError(
            f"--gpu {name}: known are {', '.join(GPUS)}; for another give --memory-gb, "
            "--bandwidth-gb-s and --tflops"
        )
    base = asdict(known) if known is not None else {}
    if known is None or "peak" in found:
        # As slow beside its peak as the slowest of the table: a cautious guess.
        base["fp32_peak"] = found["peak"] / FP32_PART
    return Hardware(**{**base, "name": name, **found})
