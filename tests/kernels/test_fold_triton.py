"""The fold kernel against the definition: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.fold_cases import LARGE, SMALL, Case, check, make_caches, plain_layout
from tests.kernels.triton_tools import check_in_interpreter, compile_for


def test_against_reference() -> None:
    check_in_interpreter("tests.kernels.fold_cases")


def test_what_the_kernel_cannot_read_is_told() -> None:
    from pte_vllm.kernels.fold_triton import unusable

    case = SMALL[0]
    caches, layout = make_caches(case, 3, "cpu"), plain_layout(16, 64, "cpu")
    assert unusable(caches, layout, 32) is None
    assert "rank 200 exceeds" in str(unusable(caches, layout, 200))
    swapped = type(layout)(key_index=layout.value_index, value_index=layout.key_index)
    assert "out of order" in str(unusable(caches, swapped, 32))
    mixed = [*caches, caches[0].clone(memory_format=torch.contiguous_format)]
    assert "strides" in str(unusable(mixed, layout, 32))
    assert "aligned" in str(unusable([caches[0][..., 1:]], layout, 32))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "rank, dim, kind, form",
    [
        (32, 128, "*bf16", "plain"),
        (8, 64, "*fp32", "plain"),
        (32, 128, "*u8", "e4m3"),
        (8, 64, "*u8", "e5m2"),
    ],
)
def test_compiles_for_gpus(capability: int, rank: int, dim: int, kind: str, form: str) -> None:
    """Down to machine code, without a GPU, and with no more shared memory than any has."""
    from pte_vllm.kernels.fold_triton import _TILE, _TOKENS, _moments_kernel, launch_options

    options = launch_options(dim, rank)
    fixed = {
        "FORMAT": form,
        "SQUARED": False,
        "DIM": dim,
        "HALF": dim // 2,
        "WITH_KK": True,
        "CHUNK": options["CHUNK"],
        "BLOCK_R": options["BLOCK_R"],
        "TILE": _TILE,
        "TOKENS": _TOKENS,
    }
    types = dict.fromkeys(("caches_ptr", "blocks_ptr", "positions_ptr"), "*i64")
    warps = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
    compile_for(_moments_kernel, capability, fixed, {"example_ptr": kind, **types}, **warps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", LARGE + SMALL, ids=str)
def test_on_a_gpu(case: Case) -> None:
    check(case, "cuda")
