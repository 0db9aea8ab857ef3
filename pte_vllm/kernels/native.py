"""Compiling and loading our C++, `*_cpu.cpp`, once per machine and version.

Plain C++ with OpenMP, called through ctypes: it compiles in seconds, and shares the threads of
torch's own OpenMP library. Without a compiler the caller keeps to torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / f"{name}_cpu.cpp" for name in ("lora", "fold", "keep"))
_HEADERS = (_FOLDER / "cpu_numbers.h",)
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
_TIMEOUT_S = 120
DISABLE = "PTE_NATIVE"
"""Set to 0 in the environment to do without."""


class NativeError(Exception):
    """Why there is no compiled code, in one line."""


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_LORA_ARGUMENTS = [
    *(_POINTER, _POINTER, _POINTER),  # a, b, tiles
    *(_NUMBER, _NUMBER, _NUMBER),  # num_tiles, d_in, d_pad
    *(_NUMBER, _NUMBER, _NUMBER),  # rank, r_pad, num_slices
    *(_POINTER, _POINTER, _POINTER),  # states, squared, slots
    *(_POINTER, _NUMBER),  # x, its stride
    *(_POINTER, _NUMBER),  # y, its stride
    _NUMBER,  # tokens
]
_FOLD_ARGUMENTS = [
    *(_POINTER, _POINTER),  # caches, scales
    *(_NUMBER, _NUMBER),  # strides of a block and of a head
    *(_POINTER, _POINTER),  # key_index, value_index
    *(_POINTER, _POINTER),  # block_ids, first
    *(_POINTER, _POINTER),  # cos, sin
    *(_POINTER, _POINTER, _POINTER, _POINTER),  # w_k, w_v, b_k, b_v
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # num_layers, num_sequences, num_blocks, block_size
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # heads, dim, half, rank
    *(ctypes.c_bool, _NUMBER),  # squared, vectors
    *(_POINTER, _POINTER),  # kv, kk
]
_CACHE_ARGUMENTS = [
    *(_POINTER, _POINTER),  # caches, scales
    *(_NUMBER, _NUMBER, _POINTER),  # strides of a block and of a head, cells
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),  # layers, sequences, heads, block_size, dim
]
_SCORE_ARGUMENTS = [
    *_CACHE_ARGUMENTS,
    *(_POINTER, _POINTER, _POINTER, _POINTER),  # queries, positions, cos, sin
    *(_NUMBER, _NUMBER, ctypes.c_float),  # count, half, scale
    *(_POINTER, _NUMBER, _POINTER, _NUMBER),  # candidates, their number, newest, their number
    _POINTER,  # scores
]
_COPY_ARGUMENTS = [
    *_CACHE_ARGUMENTS,
    *(_POINTER, _NUMBER, _POINTER, _NUMBER),  # blocks, their number, places, their number
    *(_POINTER, ctypes.c_bool),  # staged, whether out of the cache
]


@functools.cache
def load() -> ctypes.CDLL:
    """Return the compiled code, which is compiled first if this machine has not done so yet.

    Raises:
        NativeError: If it is switched off, no compiler is found, or it fails.
    """
    if os.environ.get(DISABLE, "1") == "0":
        raise NativeError(f"{DISABLE}=0")
    torch.get_num_threads()  # torch's OpenMP library comes first, so that ours resolves to it
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    file = _cache() / f"ops-{_key()}.so"
    if not file.exists():
        if compiler is None:
            raise NativeError("no C++ compiler (g++ or CXX) was found")
        _compile(compiler, file)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeError(f"{file} does not load: {error}") from error
    for dtype in ("float32", "bfloat16"):
        _declare(getattr(library, f"pte_lora_{dtype}"), _LORA_ARGUMENTS)
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"):  # of a cache
        _declare(getattr(library, f"pte_fold_{dtype}"), _FOLD_ARGUMENTS)
        _declare(getattr(library, f"pte_keep_scores_{dtype}"), _SCORE_ARGUMENTS)
        _declare(getattr(library, f"pte_keep_copy_{dtype}"), _COPY_ARGUMENTS)
    return library


def _declare(function: Any, arguments: list[Any]) -> None:
    function.restype, function.argtypes = None, arguments


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "pte-vllm" / "native"


def _key() -> str:
    """Return a hash of all that the machine code depends on."""
    cpu = next(
        (line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")),
        platform.processor(),
    )
    sources = (file.read_text() for file in (*_SOURCES, *_HEADERS))
    text = "\n".join((*sources, *_FLAGS, platform.machine(), cpu))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _compile(compiler: str, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            made = Path(scratch) / file.name
            command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode:
                raise NativeError(f"`{compiler}` failed: {done.stderr.strip()[-300:]}")
            os.replace(made, file)  # whole or not at all; others may be compiling too
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"cannot compile into {file.parent}: {error}") from error
