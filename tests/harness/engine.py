"""A real vLLM engine in the test's own process, its scheduler and worker open to inspection."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import EngineArgs, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.executor import Executor  # noqa: E402

from pte_vllm.engine.cpu_defaults import share_cores  # noqa: E402
from pte_vllm.method.kept_record import KeptRecord  # noqa: E402
from pte_vllm.method.options import EngineConfig  # noqa: E402
from pte_vllm.method.plan import FoldPlan  # noqa: E402
from pte_vllm.serve import engine_args  # noqa: E402

BLOCK = 32


def drawn(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a plan that say what leaves and what stays, from a request's options."""
    return {
        "evict": options.get("pte_evict", "oldest"),
        "evict_seed": options.get("pte_evict_seed", 0),
        "keep_tokens": options.get("pte_keep", 0),
        "keep_score": options.get("pte_keep_score", "expected"),
    }


@dataclass
class Job:
    """One request, and after the run what it produced."""

    prompt: list[int]
    max_tokens: int = 64
    adapter: LoRARequest | None = None
    options: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.8
    seed: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_scores: list[float] = field(default_factory=list)
    finished: bool = False
    finish_reason: str | None = None
    kept: KeptRecord = ()
    """What each of its folds kept, of one that keeps tokens."""
    probes: Path | None = None
    """The engine's."""
    cached_tokens: int = 0
    """Of the prompt, those that were not read again."""

    def params(self, default_seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=default_seed if self.seed is None else self.seed,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if self.prompt_logprobs else None,
            extra_args=self.options | ({"pte_return_kept": True} if self.keeps else {}),
            output_kind=RequestOutputKind.FINAL_ONLY,
            n=self.n,
        )

    @property
    def keeps(self) -> bool:
        return bool(self.options.get("pte_keep"))

    def plan(self, window_tokens: int, evict_ratio: float = 0.25) -> FoldPlan:
        return FoldPlan(
            pin_tokens=self.options.get("pte_pin_tokens", len(self.prompt)),
            window_tokens=self.options.get("pte_window", window_tokens),
            evict_ratio=evict_ratio,
            block_size=BLOCK,
            pin_spans=tuple(self.options.get("pte_pin_spans", ())),
            **drawn(self.options),
        )


class Engine:
    """`LLMEngine` over one in-process core.

    Args:
        model: checkpoint directory.
        window_tokens: `--pte-window`.
        probes: the file of probes, for requests that keep tokens.
        num_blocks: blocks of the pool, vLLM's null block not counted.
        pte: False starts vLLM as it is.
        async_scheduling: forced on; vLLM's CPU platform turns it off.
        ranks: `--tensor-parallel-size`; more than one run in processes of their own, into which
            `worker` and `runner` cannot look.
        vllm_args: any of vLLM's engine arguments.
    """

    def __init__(
        self,
        model: Path,
        *,
        window_tokens: int = 4 * BLOCK,
        evict_ratio: float = 0.25,
        max_prompt_tokens: int | None = None,
        pin_tokens: int | None = None,
        keep_thoughts: int = EngineConfig.keep_thoughts,
        reserve_windows: bool = True,
        probes: Path | None = None,
        num_blocks: int = 400,
        pte: bool = True,
        async_scheduling: bool = False,
        ranks: int = 1,
        lora_rank: int | None = None,
        **vllm_args: Any,
    ) -> None:
        self.window_tokens, self.evict_ratio = window_tokens, evict_ratio
        self.probes = probes
        engine_config = EngineConfig(
            window_tokens=window_tokens,
            evict_ratio=evict_ratio,
            max_prompt_tokens=max_prompt_tokens,
            pin_tokens=pin_tokens,
            keep_thoughts=keep_thoughts,
            reserve_windows=reserve_windows,
            probes=None if probes is None else str(probes),
        )
        args: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "block_size": BLOCK,
            "max_model_len": 4096,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 2048,
            "num_gpu_blocks_override": num_blocks + 1,
            "kv_cache_memory_bytes": 2**30,
            "enforce_eager": True,
            "disable_log_stats": True,
            "tensor_parallel_size": ranks,
            **(engine_args(engine_config) if pte else {}),
            **(
                {"enable_lora": True, "max_lora_rank": lora_rank, "max_loras": 4}
                if lora_rank
                else {}
            ),
            **vllm_args,
        }
        cores = sorted(os.sched_getaffinity(0))
        share_cores(os.environ, ranks=ranks, cores=cores, nodes=1)
        config = EngineArgs(**args).create_engine_config()
        if async_scheduling:
            config.scheduler_config.async_scheduling = True
        self.engine = LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            multiprocess_mode=False,
        )
        self._count = 0

    @property
    def core(self) -> Any:
        return self.engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def worker(self) -> Any:
        return self.core.model_executor.driver_worker.worker

    @property
    def runner(self) -> Any:
        return self.worker.model_runner

    def ask(self, method: str, *args: Any) -> Any:
        """Ask all workers, as the API server does, and return what the first says."""
        return self.core.model_executor.collective_rpc(method, args=args)[0]

    def run(
        self, jobs: Iterable[Job], on_step: Callable[[int, list[str]], None] | None = None
    ) -> list[Job]:
        """Run jobs to the end, all at once; returns them filled in.

        `on_step(step, request_ids)` runs before each step and may abort or preempt.
        """
        jobs = list(jobs)
        by_id: dict[str, Job] = {}
        for job in jobs:
            request_id = f"job-{self._count}"
            by_id[request_id] = job
            self._add(request_id, job)
            self._count += 1
        step = 0
        while self.engine.has_unfinished_requests():
            if on_step is not None:
                on_step(step, list(by_id))
            for output in self.engine.step():
                _fill(by_id[output.request_id], output)
            step += 1
        self.settle()
        for request_id, job in by_id.items():
            if job.keeps:
                job.kept = self.ask("pte_kept", [request_id])[0] or ()
                job.probes = self.probes
        return jobs

    def _add(self, request_id: str, job: Job) -> None:
        self.engine.add_request(
            request_id,
            {"prompt_token_ids": job.prompt},
            job.params(default_seed=self._count),
            lora_request=job.adapter,
        )

    def settle(self) -> None:
        """Let the worker hear of the last finished requests, as a server's loop does."""
        while self.scheduler.has_finished_requests():
            self.core.step_fn()

    def preempt(self, position: int = -1) -> None:
        """Preempt a running request, as the scheduler does when the pool runs out."""
        running = self.scheduler.running
        if running:
            self.scheduler._preempt_request(running.pop(position), 0.0)

    def count_preemptions(self) -> Counter[str]:
        """Return what counts, from now on, how often each request is preempted."""
        counts: Counter[str] = Counter()
        original = self.scheduler._preempt_request

        def count(request: Any, *args: Any, **kwargs: Any) -> Any:  # and leave it to the real one
            counts[request.request_id] += 1
            return original(request, *args, **kwargs)

        self.scheduler._preempt_request = count
        return counts

    def check_idle(self) -> None:
        """Every block, plan and slot is free."""
        self.settle()
        report = self.scheduler.pte_pool_report()
        self.scheduler.pte_check_integrity()
        assert report.free_blocks == report.usable_blocks, report
        assert not self.scheduler.pte_plans
        for counts in self.core.model_executor.collective_rpc("pte_check_integrity"):
            assert counts["sequences"] == counts["slots_in_use"] == 0, counts

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()
        gc.collect()


def _fill(job: Job, output: Any) -> None:
    completion = output.outputs[0]
    job.tokens = list(completion.token_ids)
    job.logprobs = [
        entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=True)
    ]
    if output.prompt_logprobs:
        job.prompt_scores = [
            entry[token].logprob
            for token, entry in zip(job.prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]
    job.finished, job.finish_reason = output.finished, completion.finish_reason
    job.cached_tokens = output.num_cached_tokens or 0


def lora(name: str, path: Path, lora_id: int) -> LoRARequest:
    return LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=str(path))
