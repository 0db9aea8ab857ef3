"""What tensor parallelism leaves to a rank: some of the KV heads, and sums with the others.

Every rank runs every fold. It holds the keys and values of its own heads, so it projects those and
adds its share up with the others'; what comes after, the moments and S, is the same on all ranks.
Kept tokens are chosen head by head, so each rank chooses for the heads that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group

from pte_vllm.method.keep_marks import join_heads, select_heads
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.reference import LayerEncoder


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank among those that share the layers of a model."""

    num_heads: int
    """KV heads of the model, H."""
    head_dim: int
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, vllm_config: Any) -> Ranks:
        """Read the sizes of a model and the place of this process, once vLLM has set up ranks."""
        model, size = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
        return cls(
            num_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
            size=size,
            rank=get_tp_group().rank_in_group if size > 1 else 0,
        )

    @property
    def heads(self) -> slice:
        """The KV heads that lie here, as vLLM's `QKVParallelLinear` deals them out.

        Where there are more ranks than heads, ranks in a row hold the same one.
        """
        if self.size >= self.num_heads:
            head = self.rank // self._copies
            return slice(head, head + 1)
        here = self.num_heads // self.size
        return slice(self.rank * here, (self.rank + 1) * here)

    @property
    def num_heads_here(self) -> int:
        """How many KV heads lie here."""
        return len(range(self.num_heads)[self.heads])

    @property
    def counts(self) -> bool:
        """Whether this is the first rank that holds its heads; only that one adds to sums."""
        return self.rank % self._copies == 0

    @property
    def _copies(self) -> int:
        return max(1, self.size // self.num_heads)

    def narrow(self, encoder: LayerEncoder) -> LayerEncoder | None:
        """Return an encoder whose projections read what lies here; None where that is all."""
        if self.size == 1:
            return None
        columns = slice(self.heads.start * self.head_dim, self.heads.stop * self.head_dim)
        own = {name: getattr(encoder, name)[..., columns].contiguous() for name in ("w_k", "w_v")}
        return replace(encoder, **own)

    def sum(self, share: Tensor) -> Tensor:
        """Add up the ranks' shares of a sum over all KV heads; it may change `share`."""
        if not self.counts:
            share.zero_()
        return self.sum_inputs(share)

    def sum_inputs(self, share: Tensor) -> Tensor:
        """Add up the ranks' shares of a sum over a linear's inputs; it may change `share`."""
        whole: Tensor = get_tp_group().all_reduce(share)
        return whole

    def gather(self, own: Any) -> list[Any]:
        """Return what each rank has, in their order; all of them have to call it."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=get_tp_group().cpu_group)
        return found

    def share_of(self, record: KeptRecord, num_layers: int) -> KeptRecord:
        """Return what a record of all KV heads says of those that lie here."""
        if self.size == 1:
            return record
        return tuple(
            None if marks is None else select_heads(marks, num_layers, self.num_heads, self.heads)
            for marks in record
        )

    def gather_records(
        self, own: Sequence[KeptRecord | None], num_layers: int
    ) -> list[KeptRecord | None]:
        """Return records of all KV heads from those of each rank; all of them have to call it.

        None of a request that the ranks do not know: they know the same ones.
        """
        if self.size == 1:
            return list(own)
        by_request = zip(*self.gather(list(own))[:: self._copies], strict=True)
        return [self._joined(shares, num_layers) for shares in by_request]

    def _joined(self, shares: Sequence[KeptRecord | None], num_layers: int) -> KeptRecord | None:
        records = [share for share in shares if share is not None]
        if len(records) < len(shares):
            return None
        return tuple(
            None if None in parts else join_heads(parts, num_layers, self.num_heads_here)
            for parts in zip(*records, strict=True)
        )
