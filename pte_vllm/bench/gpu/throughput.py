"""Tokens per second of an engine on a GPU whose sequences are at all stages of a rollout."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from pte_vllm.bench.gpu.spec import HEADROOM_TOKENS, Spec, build


class SteadyBatch:
    """Sequences that all decode, spread over the stages that rollouts are at in a steady state.

    Under full attention a sequence's cost grows with its length: lengths are spread evenly over
    `[prompt, prompt + rollout - HEADROOM_TOKENS)`. With a window it only depends on where the
    sequence stands between two folds, whatever its position: lengths are spread evenly over one
    stride after the first fold.
    """

    def __init__(self, engine: Any, lora: Any, spec: Spec, rollout_tokens: int) -> None:
        self.engine = engine
        blocks = engine.vllm_config.cache_config.num_gpu_blocks - 1  # vLLM's null block
        size, prompt = spec.block_size, spec.prompt_tokens
        if spec.window_tokens is None:
            spread = max(size, rollout_tokens - HEADROOM_TOKENS)
            start, extra = prompt, {}
            held = (prompt + spread / 2 + HEADROOM_TOKENS) / size
        else:
            from pte_vllm.method.options import EngineConfig

            config = EngineConfig(window_tokens=spec.window_tokens)
            plan = config.plan(pin_tokens=prompt, block_size=size)
            start, spread, extra = plan.first_fold, plan.stride, {"pte_pin_tokens": prompt}
            held = plan.pinned_blocks + plan.window_blocks + 1
        self.pool_tokens = blocks * size
        self.num_seqs = max(1, min(spec.max_num_seqs, int(blocks / held)))
        self._ids = [f"{rollout_tokens}-{i}" for i in range(self.num_seqs)]
        self.lengths = [int(start + i * spread / self.num_seqs) for i in range(self.num_seqs)]
        self._add(lora, extra)

    def _add(self, lora: Any, extra: dict[str, int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rng, vocabulary = random.Random(0), self.engine.model_config.get_vocab_size()
        for request_id, length in zip(self._ids, self.lengths, strict=True):
            params = SamplingParams(
                max_tokens=self.engine.model_config.max_model_len - length - 1,
                temperature=1.0,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
                output_kind=RequestOutputKind.DELTA,
            )
            tokens = [rng.randrange(2, vocabulary) for _ in range(length)]
            self.engine.add_request(
                request_id, {"prompt_token_ids": tokens}, params, lora_request=lora
            )

    def start(self) -> float:
        """Prefill until every sequence decodes; seconds."""
        began = time.perf_counter()
        seen: set[str] = set()
        while len(seen) < self.num_seqs and self.engine.has_unfinished_requests():
            seen |= {output.request_id for output in self.engine.step()}
        return time.perf_counter() - began

    def run(self, seconds: float) -> dict[str, float]:
        """Decode for a while."""
        tokens, step_ms, began = 0, [], time.perf_counter()
        last = began
        while (now := time.perf_counter()) < began + seconds:
            outputs = self.engine.step()
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            last = time.perf_counter()
            step_ms.append((last - now) * 1e3)
        return {
            "tokens_per_second": tokens / (last - began),
            "sequences_per_step": tokens / len(step_ms),
            "step_ms": statistics.median(step_ms),
            "steps": len(step_ms),
        }

    def stop(self) -> None:
        self.engine.abort_request(self._ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def throughput(spec: Spec) -> dict[str, Any]:
    """Tokens per second in a steady state, for each rollout length (a window: for all at once)."""
    began = time.perf_counter()
    engine, lora = build(spec)
    started_s, runs = time.perf_counter() - began, []
    for rollout in spec.rollouts if spec.window_tokens is None else spec.rollouts[-1:]:
        batch = SteadyBatch(engine, lora, spec, rollout)
        prepared_s = batch.start()
        runs.append(
            {
                "rollout_tokens": rollout if spec.window_tokens is None else None,
                "sequences": batch.num_seqs,
                "pool_tokens": batch.pool_tokens,
                "first_lengths": [batch.lengths[0], batch.lengths[-1]],
                "prepared_s": prepared_s,
                **batch.run(spec.seconds),
            }
        )
        batch.stop()
    return {"window_tokens": spec.window_tokens, "started_s": started_s, "runs": runs}
