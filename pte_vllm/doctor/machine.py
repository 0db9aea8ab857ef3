"""The machine: processor, memory, GPUs, the compiled LoRA code, the spool."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pte_vllm.doctor.checks import Check, Checks, broken, ok, warning
from pte_vllm.engine.cpu_defaults import BF16_FLAGS, cpu_flags, on_cpu

_GIB = 2**30
_LOW_DISK_BYTES = 2 * _GIB
_ISA = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
    "neon": ("asimd",),
    "bf16": ("bf16",),
    "sve": ("sve",),
}
"""Names as shown, and the flags of /proc/cpuinfo that they need."""


def processor() -> Iterator[Check]:
    """Tell the cores that this process may use, and the instructions that kernels differ by."""
    info = _proc("cpuinfo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = info.get("model name") or platform.processor() or "unknown"
    yield ok("CPU", f"{name}, {platform.machine()}, {cores} cores for this process")
    flags = cpu_flags()
    have = [isa for isa, needs in _ISA.items() if flags.issuperset(needs)]
    shown = ", ".join(have) or "none of those that kernels are written for"
    if on_cpu() and not flags & BF16_FLAGS:
        yield warning(
            "instructions",
            f"{shown}; bf16 is emulated",
            "serve with --dtype float32 where memory allows it; --dtype auto does so by itself",
        )
    else:
        yield ok("instructions", shown)


def memory() -> Iterator[Check]:
    """Tell the memory of the machine, and of the control group that this process is in."""
    info = _proc("meminfo")
    total, available = (_kib(info.get(name)) for name in ("MemTotal", "MemAvailable"))
    limit = next(filter(None, map(_limit, _CGROUP_LIMITS)), None)
    within = f", limited to {limit / _GIB:.1f} GiB here" if limit and limit < total else ""
    text = f"{available / _GIB:.1f} GiB available of {total / _GIB:.1f} GiB{within}"
    if available < _LOW_DISK_BYTES:
        yield warning("memory", text, "free some, or lower VLLM_CPU_KVCACHE_SPACE")
    else:
        yield ok("memory", text)


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def gpus() -> Iterator[Check]:
    """Tell which GPUs torch sees."""
    import torch

    present = Path("/proc/driver/nvidia/version").exists()
    if torch.version.cuda is None:
        if present:
            yield warning(
                "GPUs",
                f"there is an NVIDIA driver, but torch {torch.__version__} is for CPUs",
                "make setup LOCK=requirements/cuda.lock, or pip install 'pte-vllm[cuda]'",
            )
        else:
            yield ok("GPUs", f"none; torch {torch.__version__} is for CPUs")
        return
    if not torch.cuda.is_available():
        yield broken(
            "GPUs",
            f"torch {torch.__version__} is for CUDA {torch.version.cuda}, but sees no GPU",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES; for CPUs: make setup, or pte-vllm[cpu]",
        )
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield ok(
            f"GPU {index}",
            f"{about.name}, {about.total_memory / _GIB:.1f} GiB, capability "
            f"{about.major}.{about.minor}, CUDA {torch.version.cuda}",
        )


def compiled_lora() -> Iterator[Check]:
    """Compile, if need be, and load the C++ that LoRA and states go through on a CPU."""
    if not on_cpu():
        return
    from pte_vllm.kernels import native

    try:
        library = native.load()
    except native.NativeError as error:
        fix = f"unset {native.DISABLE}" if native.DISABLE in str(error) else "apt install g++"
        yield warning("compiled LoRA", f"{error}; LoRA goes through torch, more slowly", fix)
    else:
        yield ok("compiled LoRA", library._name)


def spool(path: str | None) -> Checks:
    """Make a check whether pushed adapters can be kept: in `path`, else in the user's cache."""

    def spool() -> Iterator[Check]:
        from pte_vllm.server.adapters.spool import default_root

        root = Path(path).absolute() if path is not None else default_root()
        nearest = next(p for p in (root, *root.parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            yield broken(
                "spool",
                f"{root}: {nearest} cannot be written: {error.strerror}",
                "--pte-spool DIR with a directory that can be written",
            )
            return
        free = shutil.disk_usage(nearest).free
        text = f"{root}, {free / _GIB:.1f} GiB free{_in_use(root / 'lock')}"
        if free < _LOW_DISK_BYTES:
            yield warning("spool", text, "free some space, or --pte-spool DIR on another disk")
        else:
            yield ok("spool", text)

    return spool


def _in_use(lock: Path) -> str:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ", used by a server now"
    except OSError:
        return ""
    return ""


def _proc(name: str) -> dict[str, str]:
    """Return the first values of a `name: value` file in /proc; empty where there is none."""
    try:
        lines = Path("/proc", name).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines) if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _kib(text: str | None) -> int:
    return int(text.split()[0]) * 1024 if text else 0


def _limit(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
