"""Attention backend: the platform's own, over a block table without the gaps.

Physical position = logical position − folded tokens. Kernels need no change, and the work per
token is O(pinned + window). The runner publishes the gaps of the step in `Gaps`; here they are cut
out of the metadata.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from pte_vllm.engine.cache import PTESpec, check_spec
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.spans import Spans


@dataclass
class Gaps:
    """The gaps of the rows of the running batch, in blocks; the runner writes them at each step.

    Persistent tensors on the model's device, so that CUDA graphs replay over them.
    """

    first: torch.Tensor  # [max_num_seqs] int32: blocks held before the row's first gap
    length: torch.Tensor  # [max_num_seqs] int32: blocks left out, in all gaps of the row
    length_cpu: torch.Tensor  # [max_num_seqs] int32
    scattered: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where a row has more than one gap, of all rows: how many blocks are held before each of its
    K gaps, `[max_num_seqs, K]`, and how many are left out before the first, up to the first's end,
    up to the second's ..., `[max_num_seqs, K + 1]`, both int32."""
    any: bool = False
    """Whether any row has a gap; without one the metadata passes through untouched."""

    @classmethod
    def allocate(cls, max_num_seqs: int, device: torch.device) -> Gaps:
        zeros = torch.zeros(max_num_seqs, dtype=torch.int32)
        return cls(
            first=zeros.to(device), length=zeros.clone().to(device), length_cpu=zeros.clone()
        )

    def publish(self, rows: Sequence[Spans]) -> None:
        """Set the rows of this step, in batch order; rows past them have no gap.

        Args:
            rows: The gaps of each sequence, as `HeldBlocks.cuts` has them.
        """
        num_rows = len(rows)
        first = [cuts[0][0] if cuts else 0 for cuts in rows]
        length = [cuts[-1][1] if cuts else 0 for cuts in rows]
        self.any = any(length)
        self.length_cpu.zero_()
        self.length_cpu[:num_rows] = torch.tensor(length, dtype=torch.int32)
        # Through pinned memory: the host must not wait for the step that is under way.
        async_tensor_h2d(self.length_cpu, out=self.length)
        if first:
            async_tensor_h2d(first, out=self.first[:num_rows])
        self.scattered = self._scattered(rows, max(map(len, rows), default=0))

    def _scattered(
        self, rows: Sequence[Spans], most: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if most < 2:
            return None
        before = np.full((len(self.length), most), np.iinfo(np.int32).max, dtype=np.int32)
        left_out = np.zeros((len(self.length), most + 1), dtype=np.int32)
        for row, cuts in enumerate(rows):
            if cuts:
                before[row, : len(cuts)], left_out[row, 1 : len(cuts) + 1] = np.transpose(cuts)
        device = self.length.device
        return async_tensor_h2d(before, device=device), async_tensor_h2d(left_out, device=device)

    def clear(self) -> None:
        """Publish that there are no gaps, as for profiling and graph capture."""
        self.publish([])


_gaps: Gaps | None = None


def set_gaps(gaps: Gaps | None) -> None:
    """Install the worker's gaps; one engine worker lives in a process."""
    global _gaps
    _gaps = gaps


def cut_gaps(
    common: CommonAttentionMetadata,
    gaps: Gaps,
    block_size: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> CommonAttentionMetadata:
    """Return metadata of the same queries over physical positions.

    Args:
        common: The step's metadata over logical positions, of `num_reqs` rows.
        gaps: The gaps of each row.
        block_size: The number of tokens in a block.
        out: Persistent `(block_table [max_reqs, blocks], seq_lens [max_reqs])` to write into, where
            captured graphs hold on to addresses; None makes new tensors.
    """
    rows = common.num_reqs
    table, seq_lens = common.block_table_tensor[:rows], common.seq_lens[:rows]
    changes: dict[str, object] = {}
    width, longest = table.shape[1], common.max_seq_len
    upper = common.seq_lens_cpu_upper_bound
    # Without gaps the caller's bounds stand. When a graph is captured the longest sequence is
    # `max_model_len`, far beyond the batch's own: kernels keep that number for all replays.
    if upper is not None and gaps.any:
        physical = upper[:rows] - gaps.length_cpu[:rows] * block_size
        changes["seq_lens_cpu_upper_bound"] = physical
        changes["max_seq_len"] = longest = int(physical.max())
    # Nobody reads the rest, which grows with the longest sequence that the model allows.
    columns = min(width, -(-longest // block_size))
    first, length = gaps.first[:rows, None], gaps.length[:rows, None]
    column = torch.arange(columns, device=table.device, dtype=torch.int32)[None]
    if gaps.scattered is None:
        source = torch.where(column < first, column, column + length)
    else:
        before, left_out = (t[:rows] for t in gaps.scattered)
        gap = torch.searchsorted(before, column.repeat(rows, 1), right=True)
        source = column + left_out.gather(1, gap)
    source = source.clamp_(max=width - 1).long()
    new_table = table.gather(1, source)
    new_seq_lens = seq_lens - length[:, 0] * block_size
    if out is not None:
        out[0][:rows, :columns].copy_(new_table)
        out[1][:rows].copy_(new_seq_lens)
        new_table, new_seq_lens = out[0][:rows, :width], out[1][:rows]
    changes |= {"block_table_tensor": new_table, "seq_lens": new_seq_lens}
    return replace(
        common,
        **changes,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class GapCuttingBuilder:
    """A mixin over a platform's metadata builder that makes `build` see physical positions."""

    _persistent: tuple[torch.Tensor, torch.Tensor] | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AttentionMetadata:
        if _gaps is not None and (_gaps.any or self._graphs):
            common_attn_metadata = cut_gaps(
                common_attn_metadata,
                _gaps,
                self.kv_cache_spec.block_size,
                self._buffers(common_attn_metadata) if self._graphs else None,
            )
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    @property
    def _graphs(self) -> bool:
        """Whether captured graphs may hold on to the addresses of the metadata."""
        return self.device.type != "cpu"

    def _buffers(self, common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        if self._persistent is None:
            assert _gaps is not None
            max_reqs, width = _gaps.length.shape[0], common.block_table_tensor.shape[1]
            self._persistent = (
                common.block_table_tensor.new_zeros(max_reqs, width),
                common.seq_lens.new_zeros(max_reqs),
            )
        return self._persistent


class PTEBackend:
    """A mixin over a platform's attention backend that brings our spec and our builder."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)
        engine = EngineConfig.from_vllm(get_current_vllm_config_or_none())
        if engine is None:
            return spec
        check_spec(spec)
        return PTESpec.from_full(spec, engine)

    @classmethod
    def get_builder_cls(cls):
        return _with_gap_cutting(super().get_builder_cls())


@cache
def _with_gap_cutting(builder: type) -> type:
    return type(f"PTE{builder.__name__}", (GapCuttingBuilder, builder), {"__module__": __name__})


class PTECPUAttentionBackend(PTEBackend, CPUAttentionBackend):
    """vLLM's CPU backend with gaps cut out; it keeps the name CPU_ATTN of its registration."""


_CUDA_BACKENDS = {
    "PTEFlashAttentionBackend": "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "PTETritonAttentionBackend": "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
}


def __getattr__(name: str) -> type[AttentionBackend]:
    """Our backend over one of CUDA's, built when vLLM asks for it by path."""
    if name == "PTECUDAAttentionBackend":
        name = cuda_backend()
    if name not in _CUDA_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _over_cuda(name)


def cuda_backend() -> str:
    """Choose FlashAttention where vLLM was built with it, else Triton.

    Triton is also for models in fp32, and for 8-bit caches that FlashAttention cannot read here.
    """
    config = get_current_vllm_config_or_none()  # set whenever vLLM chooses a backend
    use_flash = _has_flash_attention()
    if use_flash and config is not None:
        flash = resolve_obj_by_qualname(_CUDA_BACKENDS["PTEFlashAttentionBackend"])
        reads_cache = flash.supports_kv_cache_dtype(config.cache_config.cache_dtype)
        use_flash = config.model_config.dtype != torch.float32 and reads_cache
    return "PTEFlashAttentionBackend" if use_flash else "PTETritonAttentionBackend"


@cache
def _has_flash_attention() -> bool:
    try:
        importlib.import_module("vllm.vllm_flash_attn")
    except ImportError:  # it refuses to be imported without its extensions
        return False
    return True


@cache
def _over_cuda(name: str) -> type[AttentionBackend]:
    base = resolve_obj_by_qualname(_CUDA_BACKENDS[name])
    # vLLM finds the class again by module and name; without the former it would look in `abc`.
    about = {"__module__": __name__, "get_name": staticmethod(lambda: "CUSTOM")}
    return type(name, (PTEBackend, base), about)
