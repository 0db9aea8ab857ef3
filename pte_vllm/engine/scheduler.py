"""Scheduler: a chunk of tokens never crosses a fold boundary, and blocks are counted as held.

`make_scheduler` is what `--scheduler-cls` names; it follows vLLM's choice of async scheduling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from pte_vllm.adapter.probes import Probes
from pte_vllm.engine.cache import PTEManager
from pte_vllm.engine.failures import ATTRIBUTE as FAILURES
from pte_vllm.engine.failures import StepFailures
from pte_vllm.engine.messages import PoolReport, SequenceStart
from pte_vllm.engine.orphans import end_with_parent
from pte_vllm.engine.reserve import WindowReserve
from pte_vllm.engine.snapshots import SnapshotIndex
from pte_vllm.engine.waiting import sleep_while_waiting
from pte_vllm.method.options import EngineConfig, PTEConfig
from pte_vllm.method.requests import RequestOptions
from pte_vllm.method.weight import weigh_state

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


class PTESchedulerMixin:
    """A mixin over vLLM's schedulers that ends chunks at fold boundaries and sends plans along."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sleep_while_waiting()
        self.needs_kv_cache_zeroing = True  # see PTEManager
        engine = EngineConfig.from_vllm(self.vllm_config)
        assert engine is not None, "the PTE scheduler needs additional_config['pte']"
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, PTEManager), "the attention backend did not register PTESpec"
        self.pte_engine = engine
        self.pte_manager = manager
        self.pte_plans = manager.plans
        if engine.reserve_windows:
            manager.reserve = WindowReserve(manager.req_to_blocks, manager.num_held_blocks)
        self.pte_starts: dict[str, SequenceStart] = {}
        probes = b"" if engine.probes is None else Probes.load(engine.probes).content_hash.encode()
        self.pte_snapshots = SnapshotIndex(manager, _capacity(engine, self.vllm_config), probes)

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            options = RequestOptions.of(request.sampling_params)
            plan = self.pte_plans[request.request_id] = options.plan(
                self.pte_engine,
                num_prompt_tokens=request.num_prompt_tokens,
                block_size=self.pte_manager.block_size,
            )
            if self.pte_manager.reserve is not None:
                most = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
                self.pte_manager.reserve.enter(request.request_id, plan, most)
            self.pte_starts[request.request_id] = SequenceStart(
                plan=plan,
                rule=options.rule,
                kept=options.kept,
                return_kept=options.return_kept,
            )
        super().add_request(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if request.status != RequestStatus.FINISHED_ERROR:
            self.pte_snapshots.end(request)
        found: tuple[Any, Any] = super()._free_request(request, *args, **kwargs)
        return found

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.pte_manager.forget(request.request_id)
        self.pte_starts.pop(request.request_id, None)

    def _get_local_prefix_cache_hit(
        self, request: Request, *longest: int | None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """End a prefix hit before the first fold, or take up an earlier sequence past it.

        Blocks from `first_fold` on belong to another plan's view of the same tokens, and a hit
        that ended at the boundary itself would hold the blocks to fold and a whole new chunk. Since
        0.33 vLLM may also say how long a hit is at most.
        """
        blocks, num_hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *longest)
        plan = self.pte_plans[request.request_id]
        if num_hit and not request.num_preemptions:
            found = self.pte_snapshots.find(request, plan, blocks.blocks[0])
            if found is not None and all(most is None or found[1] <= most for most in longest):
                window = self.kv_cache_manager.create_kv_cache_blocks((found[0],))
                return window, found[1], boundary, diverged
        limit = plan.first_fold - self.pte_manager.block_size
        if num_hit > limit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, limit)
            num_hit = limit
        return blocks, num_hit, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End every chunk, running or waiting, at the next boundary.

        With async scheduling a fold may still be under way, its blocks not yet free: then the
        chunk may fill one block more than the plan holds, and no further.
        """
        if self.num_prefill_lookahead:
            num_new_tokens = super()._reserve_prefill_lookahead(
                request, num_computed_tokens, num_new_tokens
            )
        plan = self.pte_plans[request.request_id]
        in_flight = request.num_in_flight_tokens
        if not plan.bounded or (num_new_tokens == 1 and not in_flight):
            return num_new_tokens
        processed = max(0, num_computed_tokens - in_flight)
        room = plan.most_pinned_blocks + plan.window_blocks + 1 + plan.folded_blocks(processed)
        end = min(plan.next_boundary(num_computed_tokens), room * plan.block_size)
        return max(0, min(num_new_tokens, end - num_computed_tokens))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.pte_manager.reserve is not None:
            self.pte_manager.reserve.begin_step()
        output = super().schedule(*args, **kwargs)
        output.pte_pool = self.pte_pool_report()
        output.pte_snapshots = self.pte_snapshots.orders(
            (self.requests[new.req_id], new.num_computed_tokens)
            for new in output.scheduled_new_reqs
        )
        output.pte_moved = {
            request_id: blocks
            for request_id, blocks in self.pte_manager.take_moved().items()
            if request_id in output.num_scheduled_tokens
        }
        starting = [new.req_id for new in output.scheduled_new_reqs]
        starting += output.scheduled_cached_reqs.resumed_req_ids
        output.pte_starts = {name: self.pte_starts[name] for name in starting}
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Also end, with an error that says why, the requests that failed in this step."""
        failed = self._failed(scheduler_output, model_runner_output)
        if not failed:
            return super().update_from_output(scheduler_output, model_runner_output)
        for request_id in failed:  # what was computed for them is found by nobody
            self.kv_cache_manager.evict_blocks(
                {block.block_id for block in self.pte_manager.req_to_blocks[request_id]}
            )
        self.encoder_cache_mismatch_reqs |= failed.keys()  # vLLM's own list of what to end so
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for sent in outputs.values():
            # What was sampled for them goes to nobody.
            sent.outputs = [
                output
                for output in sent.outputs
                if output.request_id not in failed or output.finish_reason is not None
            ]
            for output in sent.outputs:
                if output.request_id in failed:
                    output.finish_reason = FinishReason.ERROR
                    output.stop_reason = failed[output.request_id]
                    output.new_token_ids, output.new_logprobs = [], None
                    output.new_prompt_logprobs_tensors = None
        return outputs

    def _failed(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[str, str]:
        """Return the requests of a step that failed in it, and why."""
        failures: StepFailures | None = getattr(model_runner_output, FAILURES, None)
        if failures is None:
            return {}
        failed: dict[str, str] = {}
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is None:
                continue
            lora = request.lora_request
            if lora is not None and lora.lora_int_id in failures.adapters:
                why = failures.adapters[lora.lora_int_id]
                failed[request_id] = f"adapter {lora.lora_name} cannot be loaded again: {why}"
            elif request_id in failures.not_finite:
                whose = "the model" if lora is None else f"adapter {lora.lora_name}"
                failed[request_id] = (
                    f"the output of {whose} is not finite: its numbers overflow, or are none"
                )
        return failed

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self.pte_snapshots.clear()  # weights may have changed
        return super().reset_prefix_cache(*args, **kwargs)

    def pte_pool_report(self) -> PoolReport:
        """Return who holds how much of the pool now."""
        pool, manager = self.kv_cache_manager.block_pool, self.pte_manager
        errors = []
        if len(self.pte_plans) != len(self.requests):
            errors.append(f"{len(self.pte_plans)} plans for {len(self.requests)} requests")
        held = {
            request.request_id: manager.num_held_blocks(request.request_id)
            for request in self.running
        }
        adapters = {r.lora_request.lora_name for r in self.requests.values() if r.lora_request}
        return PoolReport(
            usable_blocks=pool.num_gpu_blocks - 1,  # block 0 is vLLM's null block
            free_blocks=pool.get_num_free_blocks(),
            held_blocks=held,
            adapters=tuple(sorted(adapters)),
            errors=tuple(errors),
        )

    def pte_check_integrity(self) -> None:
        """Raise AssertionError unless plans, requests and blocks agree."""
        assert set(self.pte_plans) == set(self.requests)
        assert set(self.pte_starts) == set(self.requests)
        self.pte_manager.check_integrity()


def _capacity(engine: EngineConfig, vllm_config: Any) -> int:
    """Thought states to keep for requests that take up another: as the API keeps them."""
    lora = vllm_config.lora_config
    rank = lora.max_lora_rank if lora is not None else 1
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    # No rule takes more than `ridge`.
    largest = PTEConfig(rank=rank, global_tokens=rank, rule="ridge")
    num_bytes = weigh_state(largest, layers, "float32").total
    return min(engine.keep_thoughts, engine.keep_thoughts_mib * 2**20 // num_bytes)


class PTEScheduler(PTESchedulerMixin, Scheduler):
    """The scheduler that waits for each step of the worker."""


class PTEAsyncScheduler(PTESchedulerMixin, AsyncScheduler):
    """The scheduler that plans one step ahead of the worker."""


def make_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """Build the scheduler that vLLM's config asks for.

    It lives in the engine core's process, which ends with its parent from now on at the latest.
    """
    end_with_parent()
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    scheduler_class = (
        PTEAsyncScheduler if config.scheduler_config.async_scheduling else PTEScheduler
    )
    return scheduler_class(*args, **kwargs)
