"""Gaps cut out of attention metadata the way captured CUDA graphs need it; backends by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata

from pte_vllm.engine import attention
from pte_vllm.engine.attention import Gaps, cut_gaps
from pte_vllm.method.blocks import HeldBlocks, held_spans
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import blocks_of

BLOCK, WIDTH, MAX_REQS = 16, 12, 5


def _common(lengths: list[int], max_seq_len: int) -> CommonAttentionMetadata:
    rows = len(lengths)
    return CommonAttentionMetadata(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=max_seq_len,
        block_table_tensor=torch.arange(rows * WIDTH, dtype=torch.int32).view(rows, WIDTH),
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
    )


def _buffers() -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.full((MAX_REQS, WIDTH), -1, dtype=torch.int32)
    return table, torch.full((MAX_REQS,), -1, dtype=torch.int32)


def test_graphs_find_every_step_at_the_same_address() -> None:
    gaps, out = Gaps.allocate(MAX_REQS, torch.device("cpu")), _buffers()
    steps = [
        ([40, 100, 160], [1, 2, 1], [0, 3, 6]),
        ([41, 101, 0], [1, 2, 0], [0, 3, 0]),  # the last row pads the batch
        ([170, 20, 90], [4, 0, 1], [2, 0, 4]),
    ]
    for lengths, first, length in steps:
        gaps.publish([((f, n),) if n else () for f, n in zip(first, length, strict=True)])
        common = _common(lengths, max(lengths))
        cut = cut_gaps(common, gaps, BLOCK, out)
        assert cut.block_table_tensor.data_ptr() == out[0].data_ptr()
        assert cut.block_table_tensor.stride() == out[0].stride()
        assert cut.seq_lens.data_ptr() == out[1].data_ptr()
        physical = [n - gap * BLOCK for n, gap in zip(lengths, length, strict=True)]
        assert cut.seq_lens.tolist() == physical
        assert cut.max_seq_len == max(physical)
        for row, tokens in enumerate(physical):
            logical = common.block_table_tensor[row].tolist()
            kept = logical[: first[row]] + logical[first[row] + length[row] :]
            used = -(-tokens // BLOCK)
            assert cut.block_table_tensor[row, :used].tolist() == kept[:used]
        without = cut_gaps(common, gaps, BLOCK)
        assert torch.equal(without.seq_lens, cut.seq_lens)
        # No more is copied than the longest row needs, however long sequences may get.
        assert without.block_table_tensor.shape[1] == -(-max(physical) // BLOCK)


def test_scattered_gaps() -> None:
    """Rows with one gap, with several and with none, in one batch."""
    plans = [
        FoldPlan(pin_tokens=16, window_tokens=2 * BLOCK, block_size=BLOCK),
        FoldPlan(pin_tokens=16, window_tokens=5 * BLOCK, block_size=BLOCK, evict="random"),
        FoldPlan(pin_tokens=0, window_tokens=0, block_size=BLOCK),
    ]
    lengths, out = [5 * BLOCK + 3, 9 * BLOCK + 1, 2 * BLOCK], _buffers()
    seen = [held_spans(plan, n - 1) for plan, n in zip(plans, lengths, strict=True)]
    assert [len(spans) for spans in seen] == [2, 5, 1]
    gaps = Gaps.allocate(MAX_REQS, torch.device("cpu"))
    gaps.publish([HeldBlocks(p, p.folds(n - 1)).cuts for p, n in zip(plans, lengths, strict=True)])
    common = _common(lengths, max(lengths))
    for cut in (cut_gaps(common, gaps, BLOCK, out), cut_gaps(common, gaps, BLOCK)):
        for row, spans in enumerate(seen):
            kept = [common.block_table_tensor[row, block].item() for block in blocks_of(spans)]
            assert cut.block_table_tensor[row, : len(kept)].tolist() == kept
            left_out = plans[row].folded_blocks(lengths[row] - 1) * BLOCK
            assert cut.seq_lens[row] == lengths[row] - left_out
    gaps.publish([((1, 2),)])
    assert gaps.scattered is None


def test_without_gaps_bounds_stand() -> None:
    """A graph is captured with short sequences, and keeps the longest length it was told."""
    gaps = Gaps.allocate(MAX_REQS, torch.device("cpu"))
    gaps.publish([((1, 2),), ()])
    gaps.clear()
    cut = cut_gaps(_common([1, 1], max_seq_len=32_768), gaps, BLOCK, _buffers())
    assert cut.max_seq_len == 32_768
    assert torch.equal(cut.block_table_tensor, _common([1, 1], 0).block_table_tensor)


def test_cuda_backends_are_found_by_module_and_name() -> None:
    backend = attention.PTECUDAAttentionBackend  # over Triton's where FlashAttention is missing
    assert resolve_obj_by_qualname(".".join(backend.full_cls_name())) is backend
    assert backend.get_name() == "CUSTOM"
    assert issubclass(backend.get_builder_cls(), attention.GapCuttingBuilder)
    assert backend.get_builder_cls() is backend.get_builder_cls()


@pytest.mark.parametrize(
    ("dtype", "cache", "flash_reads_8_bits", "chosen"),
    [
        (torch.bfloat16, "auto", False, "FlashAttention"),
        (torch.float32, "auto", True, "TritonAttention"),
        (torch.bfloat16, "fp8", True, "FlashAttention"),
        (torch.bfloat16, "fp8", False, "TritonAttention"),
        (torch.bfloat16, "fp8_e5m2", True, "TritonAttention"),
    ],
)
def test_backend_that_reads_the_cache(
    dtype: torch.dtype,
    cache: str,
    flash_reads_8_bits: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's FlashAttention takes `fp8` where its library can, and never `fp8_e5m2`."""
    from vllm.v1.attention.backends import flash_attn

    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype), cache_config=SimpleNamespace(cache_dtype=cache)
    )
    monkeypatch.setattr(attention, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(attention, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(
        *(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args: flash_reads_8_bits)
    )
    assert attention.cuda_backend() == f"PTE{chosen}Backend"
    monkeypatch.setattr(attention, "_has_flash_attention", lambda: False)
    assert attention.cuda_backend() == "PTETritonAttentionBackend"
