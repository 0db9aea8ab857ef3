"""Model Runner V1 with PTE: `GPUModelRunner`, also the base of `CPUModelRunner`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pte_vllm.engine.failures import FiniteCheck
from pte_vllm.engine.runner_base import PTERunnerMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput

    from pte_vllm.engine.messages import SequenceStart, SnapshotOrders


class PTERunnerV1Mixin(PTERunnerMixin):
    """A mixin over vLLM's V1 model runners, which keep requests and their blocks on the host."""

    def _update_states(self, scheduler_output: SchedulerOutput) -> Callable | None:
        orders = self._begin_step(scheduler_output)
        result = super()._update_states(scheduler_output)
        if self.pte_kept.drafting:
            self._end_tables()
        self._start_sequences(scheduler_output, orders)
        scheduled = scheduler_output.num_scheduled_tokens
        self._publish(
            (request_id, self.requests[request_id].num_computed_tokens, scheduled[request_id])
            for request_id in self.input_batch.req_ids
        )
        return result

    def _end_tables(self) -> None:
        """Let vLLM's null block stand behind each row of the block table.

        A head may draft past the next fold, where a sequence holds no block yet. What the row has
        there would be a block of the request before.
        """
        table, rows = self.input_batch.block_table[0], self.input_batch.num_reqs
        ends, width = table.num_blocks_per_row[:rows], table.block_table.np.shape[1]
        for beyond in range(-(-self.num_spec_tokens // self.pte_block_size)):
            row = (ends + beyond < width).nonzero()[0]
            table.block_table.np[row, ends[row] + beyond] = 0

    def _start_sequences(self, scheduler_output: SchedulerOutput, orders: SnapshotOrders) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            start = scheduler_output.pte_starts[new.req_id]
            self._start_request(new.req_id, start, orders.restore.get(new.req_id))
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self._start_request(request_id, scheduler_output.pte_starts[request_id])
        for key in orders.forget:
            self.pte_snapshots.pop(key, None)

    def _start_request(
        self, request_id: str, start: SequenceStart, snapshot: bytes | None = None
    ) -> None:
        request = self.requests[request_id]
        self._start(
            request_id,
            start,
            lora=request.lora_request,
            num_computed_tokens=request.num_computed_tokens,
            snapshot=snapshot,
        )

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state
        if state is not None and state.sample_hidden_states is not None:
            self.pte_check = FiniteCheck.start(self._row_names(state), state.sample_hidden_states)
        return super().sample_tokens(*args, **kwargs)

    def _row_names(self, state: Any) -> list[str]:
        """Return the request of each row that is sampled from, in the order of the batch."""
        names: list[str] = self.input_batch.req_ids
        if state.spec_decode_metadata is None:
            return names
        drafts = state.spec_decode_metadata.num_draft_tokens
        return [name for name, count in zip(names, drafts, strict=True) for _ in range(count + 1)]

    def _block_ids(self, request_ids: list[str], blocks: list[list[int]]) -> Tensor:
        held = [self.requests[request_id].block_ids[0] for request_id in request_ids]
        ids = [[own[block] for block in row] for own, row in zip(held, blocks, strict=True)]
        return async_tensor_h2d(ids, device=self.device, dtype=torch.int64)

    def _move_kept(self, request_id: str, places: Sequence[int], block_ids: Sequence[int]) -> None:
        own = self.requests[request_id].block_ids[0]
        for place, block_id in zip(places, block_ids, strict=True):
            own[place] = block_id
        row = self.input_batch.req_id_to_index.get(request_id)
        if row is not None:  # else vLLM makes a row from the list above
            self.input_batch.block_table[0].block_table.np[row, list(places)] = block_ids

    def pte_known_requests(self) -> set[str]:
        return set(self.requests)


WARM_UP_TOKENS = 256
"""Of the step that makes torch.compile trace the model on a CPU, where nothing else depends on it.
Enough that the loops of the compiled code are split among all cores, as in larger steps."""


class PTECPUModelRunner(PTERunnerV1Mixin, CPUModelRunner):
    """The V1 runner on a CPU, where a seeded request must also survive a chunked prefill.

    vLLM samples for every row, drops the tokens of rows that are still prefilling, and takes their
    generators back by a CUDA offset, which CPU generators do not have (a crash at v0.32.0). With
    folds, chunked prefill is the rule rather than the exception.
    TODO(vllm>=0.33): drop if `GPUModelRunner._bookkeeping_sync` handles CPU generators.
    """

    def warming_up_model(self) -> None:
        """Run vLLM's one step before the first request, over no more tokens than it has a use for.

        vLLM runs `--max-num-batched-tokens` (2,048 for a server), which takes minutes on a small
        CPU. That step has two purposes. torch.compile traces the model, once for all sizes: a few
        tokens will do. And what the process holds afterwards is what the KV cache cannot have:
        for that it must be as large as a step can be, unless the user gave the cache's size.
        """
        most, config = self.max_num_tokens, self.vllm_config
        if config.cache_config.kv_cache_memory_bytes is not None:
            self.max_num_tokens = min(most, WARM_UP_TOKENS)
        else:  # vLLM bounds its own default like this, and not what the user gave
            self.max_num_tokens = min(most, self.max_num_reqs * self.max_model_len)
        try:
            super().warming_up_model()
        finally:
            self.max_num_tokens = most

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


class PTEGPUModelRunner(PTERunnerV1Mixin, GPUModelRunner):
    """The V1 runner on a GPU."""
