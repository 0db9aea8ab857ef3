"""The kernels of kept tokens against the definition: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.fold_cases import Case
from tests.kernels.keep_cases import LARGE, SMALL, check
from tests.kernels.triton_tools import check_in_interpreter, compile_for


def test_against_definition() -> None:
    check_in_interpreter("tests.kernels.keep_cases")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dim, kind, form", [(128, "*bf16", "plain"), (64, "*fp32", "plain"), (128, "*u8", "e4m3")]
)
def test_compiles_for_gpus(capability: int, dim: int, kind: str, form: str) -> None:
    from pte_vllm.kernels.keep_triton import _TILE, _attention_kernel, _copy_kernel

    integers = ("caches_ptr", "blocks_ptr", "positions_ptr", "places_ptr")
    types = {"example_ptr": kind, "scale": "fp32", **dict.fromkeys(integers, "*i64")}
    chunk = 32 if dim > 64 else 16
    for scores in (False, True):
        fixed = {"SCORES": scores, "DIM": dim, "HALF": dim // 2, "CHUNK": chunk, "TILE": _TILE}
        fixed["FORMAT"] = form
        compile_for(_attention_kernel, capability, fixed, types)
    for out in (False, True):
        fixed = {"OUT": out, "WIDTH": 2 * dim, "CHUNK": 64, "TILE": _TILE}
        compile_for(_copy_kernel, capability, fixed, {**types, "staged_ptr": kind})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", LARGE + SMALL, ids=str)
def test_on_a_gpu(case: Case) -> None:
    check(case, "cuda")
