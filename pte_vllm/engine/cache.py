"""KV-cache spec and manager: the question stays, folded blocks go back to the pool.

Kept tokens lie in the places of the first folded blocks, in blocks that belong to one sequence
alone and have no hash while it runs: a fold writes into them.

Nearest relative upstream: `RSWASpec` and `RSWAManager` (vllm/v1/kv_cache_interface.py and
vllm/v1/core/single_type_kv_cache_manager.py at v0.32.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from pte_vllm.engine.reserve import WindowReserve
from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.plan import FoldPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


@dataclass(frozen=True, kw_only=True)
class PTESpec(FullAttentionSpec):
    """Full attention over a bounded part of the sequence.

    Sizes the pool for the engine's default plan: O(max_prompt_tokens + window_tokens), whatever
    `max_model_len` is.
    """

    window_tokens: int
    evict_ratio: float
    max_prompt_tokens: int | None
    keep_tokens: int

    @classmethod
    def from_full(cls, spec: AttentionSpec, engine: EngineConfig) -> PTESpec:
        return replace_as(spec, cls, **{name: getattr(engine, name) for name in _OURS})

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        # The parent merges its own fields and drops ours, which are the engine's in every layer.
        return replace_as(
            FullAttentionSpec.merge([replace_as(s, FullAttentionSpec, drop=_OURS) for s in specs]),
            cls,
            **{name: getattr(specs[0], name) for name in _OURS},
        )

    def max_blocks_per_sequence(self, max_model_len: int) -> int:
        """Return the most blocks that one sequence under the default plan holds."""
        engine = EngineConfig(**{name: getattr(self, name) for name in _OURS})
        pin_tokens = min(self.max_prompt_tokens or max_model_len, max_model_len)
        plan = engine.plan(pin_tokens=pin_tokens, block_size=self.block_size)
        return plan.peak_blocks(max_model_len)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return what vLLM's start-up check and its "maximum concurrency" line count a sequence."""
        max_model_len = vllm_config.model_config.max_model_len
        return self.max_blocks_per_sequence(max_model_len) * self.page_size_bytes


_OURS = ("window_tokens", "evict_ratio", "max_prompt_tokens", "keep_tokens")


class PTEManager(FullAttentionManager):
    """A manager that nulls gaps and never shares a block that depends on what was folded.

    `plans` is owned by the scheduler, which enters a request when it arrives and removes it when
    its blocks are freed for good; a preempted request keeps its plan.
    """

    def __init__(self, kv_cache_spec: PTESpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plans: dict[str, FoldPlan] = {}
        self._held: dict[str, HeldBlocks] = {}  # as of the fold freed last, by request
        self.reserve: WindowReserve | None = None
        """What keeps room for windows; the scheduler sets it where the engine's options ask."""
        self._moved: dict[str, list[int]] = {}  # what `take_moved` returns
        self._due: dict[str, list[int]] = {}  # places whose blocks a fold may not write into
        # vLLM has the worker zero new blocks where a model needs it. Here they always are: what an
        # adapter gone wrong leaves in a block may be no number, and attention multiplies what lies
        # behind a sequence's end by zero, which is no number either.
        self._record_new_block_ids = True

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if apply_admission_cap:
            more = 0
            # Admission asks for the whole sequence at once; it never holds more than its peak. The
            # gap of an earlier sequence that it takes up costs nothing.
            gap = sum(block.is_null for block in new_computed_blocks)
            peak = self.plans[request_id].peak_blocks(num_tokens)
            num_tokens = min(num_tokens, (peak + gap) * self.block_size)
            if self.reserve is not None and any(
                other != request_id for other in self.req_to_blocks
            ):
                more = self.reserve.growth(request_id)
                whole = self.reserve.peak(request_id)
                if whole is not None:  # what it will hold, and not only what its prompt will
                    num_tokens = (whole + gap) * self.block_size
        else:
            more = self._count_due(request_id, total_computed_tokens)
            num_tokens = self._within_step(request_id, num_tokens, num_tokens_main_model)
        return more + super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def _within_step(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> int:
        """Return for how many tokens blocks are held, of those that a draft looks ahead to.

        No step goes past the next fold, so drafts beyond it are dropped, and need no place.
        """
        plan = self.plans[request_id]
        end = num_tokens_main_model
        if not plan.bounded:
            return num_tokens
        if not plan.is_boundary(end):
            end = plan.next_boundary(end)
        return min(num_tokens, end)

    def _count_due(self, request_id: str, num_computed: int) -> int:
        """Note which blocks the next chunk's fold needs for kept tokens; return what they take.

        A fold that selects writes into the blocks of kept tokens. Those that others hold too, or
        that may be found by their hash, are left behind for new ones, once.
        """
        self._due.pop(request_id, None)
        plan, blocks = self.plans[request_id], self.req_to_blocks.get(request_id)
        if not plan.keep_blocks or not blocks or not plan.is_boundary(num_computed):
            return 0
        if not plan.selects(plan.folds(num_computed) - 1):
            return 0
        due = [
            i for i in plan.kept_places if blocks[i].ref_cnt > 1 or blocks[i].block_hash is not None
        ]
        if due:
            self._due[request_id] = due
        return sum(blocks[i].ref_cnt > 1 for i in due)  # the others come back to the pool first

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate new blocks, also for the kept tokens of a fold that is due."""
        due = self._due.pop(request_id, None)
        if due is not None:
            blocks, plan = self.req_to_blocks[request_id], self.plans[request_id]
            # The fold of this step reads them first, and only then does anybody write.
            self.block_pool.free_blocks([blocks[i] for i in reversed(due)])
            fresh = self.block_pool.get_new_blocks(len(due))
            for i, block in zip(due, fresh, strict=True):
                blocks[i] = block
            # The fold fills them before vLLM zeroes what is new. One may have been another
            # request's earlier in this step, and be on that list.
            written = {block.block_id for block in fresh}
            self.new_block_ids = [i for i in self.new_block_ids if i not in written]
            self._moved[request_id] = [blocks[i].block_id for i in plan.kept_places]
        num_tokens = self._within_step(request_id, num_tokens, num_tokens_main_model)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def take_moved(self) -> dict[str, list[int]]:
        """Return the blocks for kept tokens of each request that got others in this step.

        Then the next step begins.
        """
        moved, self._moved = self._moved, {}
        return moved

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the blocks of every fold up to these tokens.

        Judged by processed tokens: the worker folds these blocks before the step that reuses them.
        """
        plan, held = self.plans[request_id], self._held.get(request_id)
        folds = plan.folds(processed_computed_tokens)
        if held is None:
            held = self._held[request_id] = HeldBlocks(plan)
        if folds != held.folds:  # most steps of most sequences free nothing
            for span in held.freed(held.fold_to(folds)):
                self._remove_blocks_in_range(request_id, *span)

    def forget(self, request_id: str) -> None:
        """Drop the plan of a request whose blocks are freed for good."""
        self.plans.pop(request_id, None)
        self._held.pop(request_id, None)
        self._due.pop(request_id, None)
        if self.reserve is not None:
            self.reserve.forget(request_id)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash blocks before `first_fold` only; later ones depend on the thought state."""
        super().cache_blocks(
            request,
            min(num_tokens, self.plans[request.request_id].first_fold),
            retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def num_held_blocks(self, request_id: str) -> int:
        """Return how many blocks of the pool the request holds now.

        Every step asks for it, of every request: so what it costs must not grow with their length.
        """
        blocks = len(self.req_to_blocks.get(request_id, ()))
        held = self._held.get(request_id)
        return blocks if held is None else held.count(blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError unless plans and blocks agree."""
        stray = set(self.req_to_blocks) - set(self.plans)
        assert not stray, f"requests with blocks but no plan: {sorted(stray)[:5]}"
        for request_id, blocks in self.req_to_blocks.items():
            plan = self.plans[request_id]
            held = sum(not block.is_null for block in blocks)
            counted = self.num_held_blocks(request_id)
            assert counted == held, f"{request_id} holds {held} blocks, and {counted} are counted"
            peak = plan.peak_blocks(len(blocks) * self.block_size)
            assert held <= peak, f"{request_id} holds {held} blocks, its plan allows {peak}"


def register_spec() -> None:
    """Make vLLM build `PTEManager` for `PTESpec`; safe to repeat."""
    # Registering into an empty registry would keep vLLM from adding its own specs.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(PTESpec, PTEManager, uniform_type_base_spec=FullAttentionSpec)


def check_spec(spec: KVCacheSpec) -> None:
    """Raise ValueError unless the layer is plain full attention."""
    if type(spec) is not FullAttentionSpec:
        raise ValueError(
            f"PTE supports models with full attention only, this one has {type(spec).__name__} "
            "(sliding-window, MLA, chunked and cross attention are not supported)"
        )
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise ValueError("PTE does not support sliding-window or chunked attention")
