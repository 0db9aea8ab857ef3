"""A scheduler without a model: vLLM's own or ours, real in all but the worker's answers.

What a scheduler does depends on positions and blocks alone, so a step's outcome can be made up:
each sequence whose prompt is read gets one more token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pte_vllm.method.options import EngineConfig

BLOCK_TOKENS = 32


@dataclass
class Steps:
    """What was seen while a scheduler ran."""

    ms: list[float] = field(default_factory=list)
    """Of each step, the CPU time to plan it and to take in its outcome; a scheduler has one thread,
    so that this is what it takes, and other work on the machine does not count."""
    num_tokens: int = 0
    """Tokens that were computed, those that had been before included."""
    num_running: list[int] = field(default_factory=list)


class SimulatedEngine:
    """A scheduler over a pool of blocks that nothing is written to.

    Args:
        engine: PTE's options; None for vLLM's scheduler over full attention.
        num_blocks: blocks of the pool, vLLM's null block not counted.
        max_num_seqs: most sequences at once.
        max_model_len: most tokens of a sequence.
    """

    def __init__(
        self,
        engine: EngineConfig | None,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from pte_vllm.engine.scheduler import PTEScheduler

        config = _vllm_config(engine, num_blocks, max_num_seqs, max_model_len)
        group = KVCacheGroupSpec(["layers.0"], _spec(engine))
        scheduler: Any = (Scheduler if engine is None else PTEScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks + 1, [], [group]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
        )
        self.scheduler = scheduler
        self._given = 0
        self.preemptions = 0
        original = scheduler._preempt_request

        def preempt(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return original(*args, **kwargs)

        scheduler._preempt_request = preempt

    def add(self, lengths: Sequence[int], *, max_tokens: int, pin_tokens: int | None) -> None:
        """Add a request for each of `lengths`, which is the length of its prompt.

        Args:
            lengths: Tokens of each prompt.
            max_tokens: Tokens of each answer; it is always as long.
            pin_tokens: How much of the prompt is the question; None is all of it.
        """
        from vllm import SamplingParams
        from vllm.v1.request import Request

        options = {} if pin_tokens is None else {"pte_pin_tokens": pin_tokens}
        for length in lengths:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=options)
            request = Request(f"sequence-{self._given}", [0] * length, params, None)
            self.scheduler.add_request(request)
            self._given += 1

    @property
    def reading(self) -> bool:
        """Whether a request still waits, or reads its prompt."""
        scheduler = self.scheduler
        return bool(scheduler.waiting) or any(r.is_prefill_chunk for r in scheduler.running)

    def run(self, *, num_steps: int | None = None, until_read: bool = False) -> Steps:
        """Run steps: so many, or until all prompts are read, or until all requests have ended."""
        steps = Steps()
        while self.scheduler.has_unfinished_requests():
            if num_steps is not None and len(steps.ms) == num_steps:
                break
            began = time.thread_time()
            output = self.scheduler.schedule()
            planned = time.thread_time()
            outcome = self._outcome(output.num_scheduled_tokens)
            answered = time.thread_time()
            self.scheduler.update_from_output(output, outcome)
            steps.ms.append(1e3 * (time.thread_time() - answered + planned - began))
            steps.num_tokens += output.total_num_scheduled_tokens
            steps.num_running.append(len(output.num_scheduled_tokens))
            if until_read and not self.reading:
                break
        return steps

    def _outcome(self, scheduled: dict[str, int]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        requests = self.scheduler.requests
        sampled: list[list[int]] = [
            [] if requests[name].num_computed_tokens < requests[name].num_tokens else [1]
            for name in scheduled
        ]
        names = list(scheduled)
        index = {name: row for row, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled)


def _vllm_config(
    engine: EngineConfig | None, num_blocks: int, max_num_seqs: int, max_model_len: int
) -> Any:
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=64,
            max_position_embeddings=max_model_len,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(Path(directory))
        config = EngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=BLOCK_TOKENS,
            max_num_seqs=max_num_seqs,
            # Enough that no step waits for room: a step is what all sequences ask for.
            max_num_batched_tokens=max_num_seqs * max_model_len,
            max_model_len=max_model_len,
            enable_prefix_caching=False,
            async_scheduling=False,
            kv_cache_memory_bytes=2**30,
            additional_config={} if engine is None else {EngineConfig.KEY: engine.to_dict()},
        ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks + 1
    return config


def _spec(engine: EngineConfig | None) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from pte_vllm.engine.cache import PTESpec, register_spec

    full = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=64, dtype=torch.float32
    )
    if engine is None:
        return full
    register_spec()
    return PTESpec.from_full(full, engine)
