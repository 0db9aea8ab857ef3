"""What a server, the demo and benchmarks choose on a CPU where the user chose nothing.

vLLM's own defaults are made for a machine of its own with bf16 instructions. The standard library
suffices here, so that commands can decide before they import vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESERVED_CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"
BOUND_CORES = "VLLM_CPU_OMP_THREADS_BIND"
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of /proc/cpuinfo on x86 and Arm; any of them means that bf16 is multiplied natively."""
WEIGHTS_SHARE = 0.6
"""Most of the free memory that weights may take when they are widened to float32."""
SERVER_BYTES = 2 << 30
"""What a server's processes take beside weights and KV cache: three Pythons with torch loaded."""
FEW_CORES = 3
"""Most cores of which none is left for the front end, which has little to do."""
FREE_SHARE = 0.9
"""Of the free memory: the rest stays for programs that grow while the server runs."""


def on_cpu() -> bool:
    """Return whether the installed vLLM is its build for CPUs, as vLLM itself tells them apart."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return False


def cpu_flags(cpuinfo: str | None = None) -> set[str]:
    """Return what the CPU can do, in Linux's words; empty where /proc does not say.

    Args:
        cpuinfo: text to read in place of /proc/cpuinfo.
    """
    text = _text("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    lines = [line.partition(":") for line in text.splitlines()]
    return {
        f for key, _, value in lines if key.strip() in ("flags", "Features") for f in value.split()
    }


def choose_dtype(
    model: str | Path, *, flags: set[str] | None = None, free_bytes: int | None = None
) -> tuple[str, str | None]:
    """Choose `--dtype` for a model that is served on this machine's CPU.

    Without bf16 instructions a product in bf16 takes several times as long as one in float32, so
    float32 is chosen there, as long as the weights leave room for a KV cache.

    Args:
        model: directory of a checkpoint. What only the hub has cannot be measured: vLLM decides.
        flags: of the CPU; default: this machine's.
        free_bytes: memory for weights and KV cache; default: this machine's.

    Returns:
        `float32`, or `auto` where vLLM's choice stands; and why, in a line, where there is
        something to say.
    """
    flags = cpu_flags() if flags is None else flags
    if not flags or flags & BF16_FLAGS:
        return "auto", None
    slow = "this CPU has no bf16 instructions"
    parameters = num_parameters(Path(model))
    if parameters is None:
        return "auto", f"--dtype auto, though {slow}: --dtype float32 is faster if memory allows it"
    wanted, free = 4 * parameters, free_memory() if free_bytes is None else free_bytes
    if wanted > WEIGHTS_SHARE * free:
        sizes = f"{wanted / 2**30:.1f} GiB of weights with {free / 2**30:.1f} GiB free"
        return "auto", f"--dtype auto, though {slow}: float32 would need {sizes}"
    return "float32", f"--dtype float32: {slow}"


def choose_reserved_cores(environ: MutableMapping[str, str], cores: int) -> str | None:
    """Let the worker of a small machine compute on all its cores, unless the user said how many.

    vLLM keeps one core for the front end: half of a machine that has two.

    Args:
        environ: where vLLM reads how many cores it keeps; changed.
        cores: how many cores this process may use.

    Returns:
        What was chosen, in a line, if something was.
    """
    if cores > FEW_CORES or RESERVED_CORES in environ or BOUND_CORES in environ:
        return None
    environ[RESERVED_CORES] = "0"
    return f"{RESERVED_CORES}=0: the worker computes on all {cores} cores"


def share_cores(
    environ: MutableMapping[str, str], *, ranks: int, cores: Sequence[int], nodes: int
) -> str | None:
    """Share the cores out among ranks where vLLM would not start: it wants a NUMA node for each.

    Args:
        environ: where vLLM reads which rank computes where; changed.
        ranks: how many run on this machine.
        cores: those that this process may use.
        nodes: how many NUMA nodes they lie on.

    Returns:
        What was chosen, in a line, if something was.
    """
    if ranks <= nodes or BOUND_CORES in environ:
        return None
    each = max(1, len(cores) // ranks)
    parts = [[cores[(i * each + j) % len(cores)] for j in range(each)] for i in range(ranks)]
    environ[BOUND_CORES] = "|".join(",".join(map(str, part)) for part in parts)
    return f"{BOUND_CORES}='{environ[BOUND_CORES]}': {ranks} ranks share {len(cores)} cores"


def num_parameters(model: Path) -> int | None:
    """Count a local checkpoint's parameters from the headers of its safetensors files.

    Returns:
        None where they cannot be told: no such directory, other files, or weights that are
        quantised, whose kernels ask for a dtype of their own.
    """
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
        if "quantization_config" in config:
            return None
        counts = [_parameters_of(file) for file in model.glob("*.safetensors")]
    except (OSError, ValueError):
        return None
    return sum(counts) or None


def _parameters_of(file: Path) -> int:
    """Count the numbers of one safetensors file: eight bytes of length, then a JSON header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(about["shape"]) for name, about in header.items() if name[0] != "_")


def free_memory() -> int:
    """Return the bytes that programs can still take: of the machine, or of a container's limit."""
    free = 0
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    # What a container holds is mostly the page cache of its own files, which makes room.
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min([free, *(int(text) for text in map(_text, limits) if text.strip().isdecimal())])


def _text(path: str) -> str:
    """Read a file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def fitting_utilization(
    *, total_bytes: int, free_bytes: int, default: float, ranks: int = 1
) -> float:
    """Choose `--gpu-memory-utilization`, which on a CPU is a share of all memory.

    vLLM's worker ends unless that share is free when it starts, and takes weights and KV cache out
    of it. So where the default is not free, it is what is, less what the server's other processes
    take until then, and something for programs that grow.

    Args:
        total_bytes: memory as vLLM counts it.
        free_bytes: of it, free now.
        default: vLLM's own share, for a machine on which nothing else runs.
        ranks: how many take that share of the same memory.

    Returns:
        The default, or a share of two digits after the point, at least 0.01.
    """
    room = (free_bytes - SERVER_BYTES) / ranks
    if default * total_bytes <= room:
        return default
    return max(0.01, math.floor(100 * FREE_SHARE * room / total_bytes) / 100)
