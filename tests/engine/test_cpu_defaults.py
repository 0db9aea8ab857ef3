"""What is chosen on a CPU: by its flags, the checkpoint's size and the memory that is free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pte_vllm.engine import cpu_defaults
from pte_vllm.engine.cpu_defaults import (
    BOUND_CORES,
    RESERVED_CORES,
    choose_dtype,
    choose_reserved_cores,
    cpu_flags,
    fitting_utilization,
)

AVX2 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx avx2 fma\nbugs\t\t: spectre_v1\n"
AVX512 = AVX2.replace("fma", "fma avx512f avx512_bf16")
ARM = "processor\t: 0\nFeatures\t: fp asimd\n"
ARM_BF16 = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
PARAMETERS = 3 * 5 + 7
GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    one, two = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.float16)
    save_file({"one": one}, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"two": two}, tmp_path / "model-2.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [(AVX2, "float32"), (AVX512, "auto"), (ARM, "float32"), (ARM_BF16, "auto"), ("", "auto")],
)
def test_dtype_follows_the_cpu(model: Path, cpuinfo: str, dtype: str) -> None:
    chosen, why = choose_dtype(model, flags=cpu_flags(cpuinfo), free_bytes=GIB)
    assert chosen == dtype
    assert (why is None) == (dtype == "auto")


def test_dtype_follows_the_memory(model: Path) -> None:
    flags, fits = cpu_flags(AVX2), int(4 * PARAMETERS / cpu_defaults.WEIGHTS_SHARE) + 1
    assert choose_dtype(model, flags=flags, free_bytes=fits)[0] == "float32"
    dtype, why = choose_dtype(model, flags=flags, free_bytes=fits - 2)
    assert dtype == "auto" and why is not None and "GiB of weights" in why


def test_a_small_machine_computes_on_all_its_cores() -> None:
    few: dict[str, str] = {}
    line = choose_reserved_cores(few, cores=2)
    assert few == {RESERVED_CORES: "0"} and line is not None and "all 2 cores" in line
    for chosen, cores in (({}, 4), ({RESERVED_CORES: "1"}, 2), ({BOUND_CORES: "0"}, 2)):
        environ = dict(chosen)
        assert choose_reserved_cores(environ, cores) is None
        assert environ == chosen


def test_dtype_of_what_cannot_be_measured(model: Path, tmp_path: Path) -> None:
    flags = cpu_flags(AVX2)
    dtype, why = choose_dtype("owner/name-on-the-hub", flags=flags, free_bytes=GIB)
    assert dtype == "auto" and why is not None and "--dtype float32" in why
    (model / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert choose_dtype(model, flags=flags, free_bytes=GIB)[0] == "auto"
    (model / "config.json").write_text("{}")
    (model / "model-1.safetensors").write_bytes(b"half")
    assert choose_dtype(model, flags=flags, free_bytes=GIB)[0] == "auto"


@pytest.mark.parametrize(
    ("free", "share"),
    [(62, 0.92), (58, 0.78), (20, 0.25), (2, 0.01), (0, 0.01)],
)
def test_utilization_fits_what_is_free(free: int, share: float) -> None:
    found = fitting_utilization(total_bytes=64 * GIB, free_bytes=free * GIB, default=0.92)
    assert found == share


def test_facts_of_this_machine() -> None:
    assert cpu_defaults.on_cpu()
    assert cpu_flags() and cpu_defaults.free_memory() > 2**28


def test_imports_the_standard_library_only() -> None:
    code = "import sys, pte_vllm.engine.cpu_defaults as d; d.on_cpu(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "numpy"} & set(done.stdout.split())
