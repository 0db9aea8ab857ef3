"""What the model runners have in common: fold what is due, then say who is who in the batch.

vLLM has two runners, V1 and V2, which keep requests and blocks in different forms; `runner_v1.py`
and `runner_v2.py` read those and call what is here. The order of a step is the same for both:

    _begin_step   before vLLM updates its requests, which zeroes and hands out blocks that the
                  scheduler has just freed: what they hold is folded first, and only when all folds
                  have read do those that keep tokens write
    _start        of every request that is new, or comes back after a preemption
    _publish      once the order of the batch is known, before attention metadata is built
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker import lora_model_runner_mixin

from pte_vllm.adapter.files import layer_of
from pte_vllm.adapter.probes import Probes
from pte_vllm.engine.attention import Gaps, set_gaps
from pte_vllm.engine.failures import FiniteCheck
from pte_vllm.engine.folding import EvictedBlocks
from pte_vllm.engine.keeping import KeptTokens, Selection
from pte_vllm.engine.lora.install import install_views
from pte_vllm.engine.lora.manager import PTELoRAManager
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.engine.messages import PoolReport, SequenceStart, SnapshotOrders
from pte_vllm.engine.paged import PagedCaches, only_group
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.refusals import check_vllm_config
from pte_vllm.engine.sequences import FoldingSequence, Snapshot
from pte_vllm.engine.state import StatePool
from pte_vllm.engine.thoughts import ThoughtStore
from pte_vllm.kernels.cache_layout import RopeTable
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.weight import state_dtype

if TYPE_CHECKING:
    from vllm.config import LoRAConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def _state_dtype(lora_config: LoRAConfig | None) -> torch.dtype:
    """Return the type in which tokens read thought states: that of A and B if it is bfloat16."""
    name = str(lora_config.lora_dtype) if lora_config is not None else ""
    dtype: torch.dtype = getattr(torch, state_dtype(name.removeprefix("torch.")))
    return dtype


class PTERunnerMixin(ABC):
    """The part of a PTE runner that stands over any of vLLM's model runners."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = EngineConfig.from_vllm(self.vllm_config)
        assert engine is not None, "the PTE runner needs additional_config['pte']"
        check_vllm_config(self.vllm_config, engine)
        self.pte_engine = engine
        self.pte_gaps = Gaps.allocate(self.max_num_reqs, self.device)
        self.pte_tokens = TokenSlots.allocate(self.max_num_tokens, self.device)
        self.pte_pool = StatePool(
            num_layers=self.model_config.get_num_layers(self.parallel_config),
            max_num_seqs=self.max_num_reqs,
            max_rank=self.lora_config.max_lora_rank if self.lora_config else 1,
            device=self.device,
            store=ThoughtStore(
                max_count=engine.keep_thoughts, max_bytes=engine.keep_thoughts_mib * 2**20
            ),
            dtype=_state_dtype(self.lora_config),
        )
        self.pte_ranks = Ranks.of(self.vllm_config)
        self.pte_snapshots: dict[bytes, Snapshot] = {}
        self.pte_report = PoolReport(usable_blocks=0, free_blocks=0)
        self.pte_check: FiniteCheck | None = None  # of the step whose tokens are being sampled
        set_gaps(self.pte_gaps)

    # -- start-up ---------------------------------------------------------------------------------

    def load_lora_model(self, model: Any, vllm_config: Any, device: Any) -> Any:
        # The parent names its manager class; swap the name for the length of the call.
        upstream = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = PTELoRAManager
        try:
            model = super().load_lora_model(model, vllm_config, device)
        finally:
            lora_model_runner_mixin.LRUCacheWorkerLoRAManager = upstream
        assert isinstance(self.lora_manager, PTELoRAManager)
        compilation = self.compilation_config
        compiled = compilation.mode != CompilationMode.NONE
        install_views(
            *(model, self.lora_manager, self.pte_pool, self.pte_tokens),
            traced_layers=compilation.static_forward_context if compiled else None,
        )
        return model

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        # The backend's `customize_spec` finds the engine's options through the current config.
        with set_current_vllm_config(self.vllm_config):
            return super().get_kv_cache_spec()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        group = only_group(kv_cache_config)
        self.pte_block_size = group.kv_cache_spec.block_size
        num_blocks = kv_cache_config.num_blocks - 1  # as the scheduler reports from the first step
        self.pte_report = PoolReport(usable_blocks=num_blocks, free_blocks=num_blocks)
        for attn_group in self.attn_groups[0]:
            if attn_group.kernel_block_size not in (None, self.pte_block_size):
                raise ValueError(
                    f"the attention kernel splits blocks of {self.pte_block_size} tokens into "
                    f"{attn_group.kernel_block_size}; set --block-size to the latter for PTE"
                )
        layers = self.compilation_config.static_forward_context
        names = {layer_of(name): name for name in group.layer_names}
        num_layers = self.model_config.get_num_layers(self.parallel_config)
        paged = PagedCaches.of({i: layers[name] for i, name in names.items()}, num_layers)
        self.pte_evicted = EvictedBlocks(
            paged=paged, rope=self._find_rope(names[0]), ranks=self.pte_ranks
        )
        file = self.pte_engine.probes
        self.pte_kept = KeptTokens.of(
            paged,
            self.pte_evicted.rope,
            ranks=self.pte_ranks,
            probes=None if file is None else Probes.load(file),
            scale=layers[names[0]].impl.scale,
        )

    def _find_rope(self, attention_name: str) -> RopeTable | None:
        """Return the table of the model's rotary embedding; None if it has none."""
        parent = self.get_model().get_submodule(attention_name.rpartition(".")[0])
        rotary = getattr(parent, "rotary_emb", None)
        return None if rotary is None else RopeTable.of(rotary)

    # -- what a runner has to answer --------------------------------------------------------------

    @abstractmethod
    def _block_ids(self, request_ids: list[str], blocks: list[list[int]]) -> Tensor:
        """Return the ids in the cache of n logical blocks of each of S requests, `[S, n]` int64.

        The ids are on the device, and are those from before this step.
        """

    @abstractmethod
    def _move_kept(self, request_id: str, places: Sequence[int], block_ids: Sequence[int]) -> None:
        """Note that these logical blocks are others from this step on."""

    @abstractmethod
    def pte_known_requests(self) -> set[str]:
        """Return the requests that may have a sequence: those that vLLM has named and not ended."""

    # -- each step --------------------------------------------------------------------------------

    def _begin_step(self, scheduler_output: SchedulerOutput) -> SnapshotOrders:
        """Stop sequences and fold what is due; return what the starts of this step restore."""
        orders: SnapshotOrders = getattr(scheduler_output, "pte_snapshots", SnapshotOrders())
        self.pte_report = getattr(scheduler_output, "pte_pool", self.pte_report)
        self._stop_sequences(scheduler_output, orders)
        self._fold_due(scheduler_output)
        return orders

    def _stop_sequences(self, scheduler_output: SchedulerOutput, orders: SnapshotOrders) -> None:
        for request_id, key in orders.keep.items():
            self.pte_snapshots[key] = self.pte_pool.snapshot(request_id)
        for request_id in scheduler_output.finished_req_ids:
            self.pte_pool.finish(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            sequence = self.pte_pool.sequences.get(request_id)
            if sequence is not None:
                # Without a slot until it resumes; its plan and its record stay.
                self.pte_pool.start(request_id, sequence.plan, adapter=sequence.adapter)

    def _fold_due(self, scheduler_output: SchedulerOutput) -> None:
        """Fold for running sequences that start a step at or past a boundary."""
        cached = scheduler_output.scheduled_cached_reqs
        behind = [
            (request_id, num_computed)
            for request_id, num_computed in zip(
                cached.req_ids, cached.num_computed_tokens, strict=True
            )
            if request_id not in cached.resumed_req_ids
        ]
        sequences = self.pte_pool.sequences
        while True:
            behind = [
                (request_id, num_computed)
                for request_id, num_computed in behind
                if sequences[request_id].folded_blocks
                < sequences[request_id].plan.folded_blocks(num_computed)
            ]
            if not behind:
                return
            moved = getattr(scheduler_output, "pte_moved", {})
            self._fold_once({request_id: sequences[request_id] for request_id, _ in behind}, moved)

    def _fold_once(self, due: dict[str, FoldingSequence], moved: dict[str, list[int]]) -> None:
        """Fold each sequence once; those that are alike fold together."""
        selections = [
            Selection(request_id=request_id, sequence=sequence, fold=sequence.folds)
            for request_id, sequence in due.items()
            if sequence.plan.keep_blocks
        ]
        alike: dict[tuple[int, str, int], dict[str, FoldingSequence]] = {}
        evicted = {request_id: sequence.evict() for request_id, sequence in due.items()}
        for request_id, sequence in due.items():
            if sequence.loaded is not None and sequence.rule not in (None, "none"):
                key = (id(sequence.loaded), sequence.rule, sequence.plan.evict_blocks)
                alike.setdefault(key, {})[request_id] = sequence
        for group in alike.values():
            self._fold(group, [evicted[request_id] for request_id in group])
        self.pte_kept.keep(selections, self._block_ids, moved)
        for selection in selections:
            if (own := moved.get(selection.request_id)) is not None:
                self._move_kept(selection.request_id, selection.plan.kept_places, own)
        for sequence in due.values():
            plan = sequence.plan
            self.pte_pool.counters.add_fold(
                sequence.rule, num_blocks=plan.evict_blocks, block_size=plan.block_size
            )

    def _fold(self, group: dict[str, FoldingSequence], blocks: list[list[int]]) -> None:
        positions = [[block * self.pte_block_size for block in row] for row in blocks]
        self.pte_evicted.fold_into(
            self.pte_pool,
            list(group.values()),
            self._block_ids(list(group), blocks),
            async_tensor_h2d(positions, device=self.device, dtype=torch.int64),
        )

    def _start(
        self,
        request_id: str,
        start: SequenceStart,
        *,
        lora: LoRARequest | None,
        num_computed_tokens: int,
        snapshot: bytes | None = None,
    ) -> None:
        """Start a request, or a preempted one again, from S_0 or from an earlier request's S."""
        sequence = self.pte_pool.start(
            request_id,
            start.plan,
            adapter=lora.lora_name if lora is not None else None,
            rule=start.rule,
            loaded=self.lora_manager.encoder_of(lora) if lora is not None else None,
            probes=self.lora_manager.probes_of(lora) if lora is not None else None,
            forced=self.pte_ranks.share_of(start.kept, len(self.pte_kept.caches)),
            return_kept=start.return_kept,
        )
        if sequence.loaded is not None and sequence.rule is not None:
            self.pte_evicted.warm_up(sequence.loaded, sequence.rule)
        if snapshot is not None:
            self.pte_pool.restore(sequence, self.pte_snapshots[snapshot])
        # Any other prefix hit ends before the first fold, so nothing is due here.
        assert start.plan.folded_blocks(num_computed_tokens) == sequence.folded_blocks

    def _publish(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """Tell attention the gaps, and LoRA the slots.

        Args:
            rows: The batch in its final order: the id of each request, its computed tokens, and its
                tokens of this step.
        """
        cuts, segments, start = [], [], 0
        for request_id, num_computed, num_scheduled in rows:
            sequence = self.pte_pool.sequences[request_id]
            cuts.append(sequence.held.cuts)
            segments.append((start, start + num_scheduled, sequence.slot))
            start += num_scheduled
            sequence.num_tokens = num_computed + num_scheduled
            sequence.held_blocks = self.pte_report.held_blocks.get(request_id, 0)
            sequence.peak_blocks = max(sequence.peak_blocks, sequence.held_blocks)
        self.pte_gaps.publish(cuts)
        self.pte_tokens.publish(segments)

    def pte_take_check(self) -> FiniteCheck | None:
        """Return the check of the step's output, once; None for a step without one."""
        check, self.pte_check = self.pte_check, None
        return check

    def _publish_nobody(self) -> None:
        """Let rows and tokens belong to no sequence, as in profiling and graph capture."""
        self.pte_gaps.clear()
        self.pte_tokens.publish([])

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self._publish_nobody()
        return super()._dummy_run(*args, **kwargs)
