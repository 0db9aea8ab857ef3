"""Model runner: folds what is due before each step, then tells attention and LoRA who is who.

Over vLLM's V1 runner (`GPUModelRunner`, also the base of `CPUModelRunner`). The order matters:
`_update_states` of the parent zeroes and hands out blocks that the scheduler has just freed, so
they are read before it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pte_vllm.adapter import layer_of
from pte_vllm.attention import Gaps, set_gaps
from pte_vllm.config import EngineConfig, RequestOptions, request_plan
from pte_vllm.folding import EvictedBlocks
from pte_vllm.lora import PTELoRAManager, TokenSlots, install_views
from pte_vllm.ops.fold import BlockLayout, RopeTable
from pte_vllm.plan import FoldPlan
from pte_vllm.queries import QueriesMixin
from pte_vllm.state import Sequence, Snapshot, StatePool
from pte_vllm.support import check_vllm_config
from pte_vllm.thoughts import ThoughtStore
from pte_vllm.types import PoolReport, SnapshotOrders

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes


class PTERunnerMixin(QueriesMixin):
    """Over one of vLLM's V1 model runners."""

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
            kept=ThoughtStore(
                max_count=engine.keep_thoughts, max_bytes=engine.keep_thoughts_mib * 2**20
            ),
        )
        self.pte_snapshots: dict[bytes, Snapshot] = {}
        self.pte_report = PoolReport(usable_blocks=0, free_blocks=0)
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
        install_views(model, self.lora_manager, self.pte_pool, self.pte_tokens)
        return model

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        # The backend's `customize_spec` finds the engine's options through the current config.
        with set_current_vllm_config(self.vllm_config):
            return super().get_kv_cache_spec()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        (group,) = kv_cache_config.kv_cache_groups
        self.pte_block_size = group.kv_cache_spec.block_size
        for attn_group in self.attn_groups[0]:
            if attn_group.kernel_block_size not in (None, self.pte_block_size):
                raise ValueError(
                    f"the attention kernel splits blocks of {self.pte_block_size} tokens into "
                    f"{attn_group.kernel_block_size}; set --block-size to the latter for PTE"
                )
        layers = self.compilation_config.static_forward_context
        self.pte_evicted = EvictedBlocks(
            caches={layer_of(name): layers[name].kv_cache for name in group.layer_names},
            layout=BlockLayout.probe(layers[group.layer_names[0]]),
            rope=self._find_rope(group.layer_names[0]),
        )

    def _find_rope(self, attention_name: str) -> RopeTable | None:
        """The table of the model's rotary embedding; None if it has none."""
        parent = self.get_model().get_submodule(attention_name.rpartition(".")[0])
        rotary = getattr(parent, "rotary_emb", None)
        return None if rotary is None else RopeTable.of(rotary)

    # -- each step --------------------------------------------------------------------------------

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable | None:
        orders = getattr(scheduler_output, "pte_snapshots", SnapshotOrders())
        self._stop_sequences(scheduler_output, orders)
        self._fold_due(scheduler_output)
        result = super()._update_states(scheduler_output)
        self._start_sequences(scheduler_output, orders)
        self._publish(scheduler_output)
        return result

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
            (self.pte_pool.sequences[request_id], num_computed, request_id)
            for request_id, num_computed in zip(
                cached.req_ids, cached.num_computed_tokens, strict=True
            )
            if request_id not in cached.resumed_req_ids
        ]
        while True:
            behind = [
                (sequence, num_computed, request_id)
                for sequence, num_computed, request_id in behind
                if sequence.folded_blocks < sequence.plan.folded_blocks(num_computed)
            ]
            if not behind:
                return
            self._fold_once(
                [(sequence, self.requests[name].block_ids[0]) for sequence, _, name in behind]
            )

    def _fold_once(self, due: list[tuple[Sequence, list[int]]]) -> None:
        """One fold of each sequence, given its blocks; those that are alike fold together."""
        alike: dict[tuple[int, str, int], list[tuple[Sequence, list[int]]]] = {}
        for sequence, block_ids in due:
            plan = sequence.plan
            if sequence.loaded is not None and sequence.rule not in (None, "none"):
                key = (id(sequence.loaded), sequence.rule, plan.evict_blocks)
                alike.setdefault(key, []).append((sequence, block_ids))
        for group in alike.values():
            self._fold(group)
        for sequence, _ in due:
            plan = sequence.plan
            sequence.folded_blocks += plan.evict_blocks
            self.pte_pool.counters.add_fold(
                sequence.rule, num_blocks=plan.evict_blocks, block_size=plan.block_size
            )

    def _fold(self, group: list[tuple[Sequence, list[int]]]) -> None:
        first = [s.plan.pinned_blocks + s.folded_blocks for s, _ in group]
        blocks = [
            block_ids[start : start + sequence.plan.evict_blocks]
            for (sequence, block_ids), start in zip(group, first, strict=True)
        ]
        self.pte_evicted.fold_into(
            self.pte_pool, [sequence for sequence, _ in group], blocks, first
        )

    def _start_sequences(self, scheduler_output: SchedulerOutput, orders: SnapshotOrders) -> None:
        """Start new requests, and preempted ones again, from S_0 or from an earlier request's S."""
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            plan = request_plan(
                self.pte_engine,
                request.sampling_params,
                request.num_prompt_tokens,
                self.pte_block_size,
            )
            self._start(new.req_id, plan, orders.restore.get(new.req_id))
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self._start(request_id, self.pte_pool.sequences[request_id].plan)
        for key in orders.forget:
            self.pte_snapshots.pop(key, None)

    def _start(self, request_id: str, plan: FoldPlan, snapshot: bytes | None = None) -> None:
        request = self.requests[request_id]
        lora: LoRARequest | None = request.lora_request
        loaded = self.lora_manager.encoder_of(lora) if lora is not None else None
        params = request.sampling_params
        options = RequestOptions.parse(params.extra_args if params is not None else None)
        sequence = self.pte_pool.start(
            request_id,
            plan,
            adapter=lora.lora_name if lora is not None else None,
            rule=options.rule,
            loaded=loaded,
        )
        if loaded is not None and sequence.rule is not None:
            self.pte_evicted.warm_up(loaded, sequence.rule)
        if snapshot is not None:
            self.pte_pool.restore(sequence, self.pte_snapshots[snapshot])
        # Any other prefix hit ends before the first fold, so nothing is due here.
        assert plan.folded_blocks(request.num_computed_tokens) == sequence.folded_blocks

    def _publish(self, scheduler_output: SchedulerOutput) -> None:
        """Tell attention the gaps, and LoRA the slots, of the batch in its final order."""
        report = getattr(scheduler_output, "pte_pool", None)
        if report is not None:
            self.pte_report = report
        first, length, segments, start = [], [], [], 0
        for request_id in self.input_batch.req_ids:
            sequence = self.pte_pool.sequences[request_id]
            num_scheduled = scheduler_output.num_scheduled_tokens[request_id]
            first.append(sequence.plan.pinned_blocks)
            length.append(sequence.folded_blocks)
            segments.append((start, start + num_scheduled, sequence.slot))
            start += num_scheduled
            sequence.num_tokens = self.requests[request_id].num_computed_tokens + num_scheduled
            sequence.held_blocks = self.pte_report.held_blocks.get(request_id, 0)
            sequence.peak_blocks = max(sequence.peak_blocks, sequence.held_blocks)
        self.pte_gaps.publish(first, length)
        self.pte_tokens.publish(segments)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        # Profiling and graph capture use rows and tokens that belong to no sequence.
        self.pte_gaps.clear()
        self.pte_tokens.publish([])
        return super()._dummy_run(*args, **kwargs)


class PTECPUModelRunner(PTERunnerMixin, CPUModelRunner):
    """On CPU, where a seeded request must also survive a chunked prefill.

    vLLM samples for every row, drops the tokens of rows that are still prefilling, and takes their
    generators back by a CUDA offset, which CPU generators do not have (a crash at v0.32.0). With
    folds, chunked prefill is the rule rather than the exception.
    TODO(vllm>=0.33): drop if `GPUModelRunner._bookkeeping_sync` handles CPU generators.
    """

    def _discarded_generators(self) -> dict[int, torch.Generator]:
        generators = self.input_batch.generators
        rows = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        return {row: generators[row] for row in rows if row in generators}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        saved = [(g, g.get_state()) for g in self._discarded_generators().values()]
        output = super()._sample(*args, **kwargs)
        for generator, state in saved:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self._discarded_generators()
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)


class PTEGPUModelRunner(PTERunnerMixin, GPUModelRunner):
    """On CUDA."""
