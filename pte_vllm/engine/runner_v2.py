"""Model Runner V2 with PTE: vLLM's default on a GPU, of the same class on a CPU with Triton.

V2 keeps what V1 has on the host (tokens, lengths, block tables) on the device and never waits for
it, so the fold takes the ids of evicted blocks from V2's block table there. The other differences
that matter here: a preempted request is forgotten and comes back as a new one, and the batch has
an order of its own, which `prepare_inputs` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from pte_vllm.engine.failures import FiniteCheck
from pte_vllm.engine.messages import SequenceStart, SnapshotOrders
from pte_vllm.engine.runner_base import PTERunnerMixin
from pte_vllm.method.plan import FoldPlan

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch


class PTERunnerV2Mixin(PTERunnerMixin):
    """A mixin over vLLM's V2 model runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pte_preempted: set[str] = set()
        self._orders = SnapshotOrders()
        self._warming_up = False

    # `execute_model` calls the next three of its steps in this order.

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Begin our step too, while no request has lost its row of the block table."""
        if self._warming_up:
            for request_id in scheduler_output.finished_req_ids:
                self.pte_pool.stop(request_id)
        self._orders = self._begin_step(scheduler_output)
        self.pte_preempted |= scheduler_output.preempted_req_ids or set()
        self.pte_preempted -= scheduler_output.finished_req_ids
        super().finish_requests(scheduler_output)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            if self._warming_up:  # unbounded: a prompt of vLLM's own may exceed our limits
                plan = FoldPlan(
                    pin_tokens=new.prompt_len, window_tokens=0, block_size=self.pte_block_size
                )
                start = SequenceStart(plan=plan)
            else:
                start = scheduler_output.pte_starts[new.req_id]
            self._start(
                new.req_id,
                start,
                lora=new.lora_request,
                num_computed_tokens=new.num_computed_tokens,
                snapshot=self._orders.restore.get(new.req_id),
            )
            self.pte_preempted.discard(new.req_id)
        for key in self._orders.forget:
            self.pte_snapshots.pop(key, None)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        batch = super().prepare_inputs(*args, **kwargs)
        self._publish(
            zip(
                batch.req_ids,
                batch.num_computed_tokens_np.tolist(),
                batch.num_scheduled_tokens.tolist(),
                strict=True,
            )
        )
        return batch

    def sample(self, hidden_states: Tensor, input_batch: InputBatch, *args: Any) -> Any:
        self.pte_check = FiniteCheck.start(
            input_batch.req_ids, hidden_states[input_batch.logits_indices]
        )
        return super().sample(hidden_states, input_batch, *args)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        # V1 captures through `_dummy_run`, V2 does not.
        self._publish_nobody()
        return super().capture_model(*args, **kwargs)

    @contextmanager
    def pte_warm_up(self) -> Iterator[None]:
        """Let requests inside leave no record: vLLM makes them up to warm up kernels."""
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False

    def _block_ids(self, request_ids: list[str], blocks: list[list[int]]) -> Tensor:
        index = self.req_states.req_id_to_index
        where = [[index[name], *row] for name, row in zip(request_ids, blocks, strict=True)]
        where_d = async_tensor_h2d(where, device=self.device, dtype=torch.int64)  # [S, 1 + n]
        table = self.block_tables.block_tables[0].gpu  # [max_num_reqs, blocks] int32
        return table[where_d[:, :1], where_d[:, 1:]].long()

    def _move_kept(self, request_id: str, places: Sequence[int], block_ids: Sequence[int]) -> None:
        row = self.req_states.req_id_to_index[request_id]
        table = self.block_tables.block_tables[0].gpu
        moved = async_tensor_h2d([places, block_ids], device=self.device, dtype=torch.int64)
        table[row, moved[0]] = moved[1].to(table.dtype)

    def pte_known_requests(self) -> set[str]:
        return self.pte_preempted.union(self.req_states.req_id_to_index)

    def _sync_device(self) -> None:
        torch.accelerator.synchronize()


class PTEGPUModelRunnerV2(PTERunnerV2Mixin, GPUModelRunner):
    """The V2 runner on a GPU."""


class PTECPUModelRunnerV2(PTERunnerV2Mixin, CPUModelRunner):
    """The V2 runner on a CPU, whose Triton can compile for it, or interprets."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        self._init_kv_zero_meta()  # vLLM's worker on a GPU does it
