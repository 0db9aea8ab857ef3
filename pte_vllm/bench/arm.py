"""One engine under measurement, in a process of its own that runs a workload when told to.

Arms are started together and take turns, so that what disturbs the machine disturbs all alike.
The parent speaks to an arm in lines of JSON; everything else an engine prints goes to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pte_vllm.bench.parts import REST, Parts, time_engine
from pte_vllm.engine import huge_pages
from pte_vllm.engine.cpu_defaults import share_cores

READY_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """What one arm runs."""

    name: str
    model: str
    window_tokens: int | None = None
    """None: vLLM as it is."""
    keep_tokens: int = 0
    probes: str | None = None
    """The file of probes by which kept tokens are chosen."""
    adapter: str | None = None
    dtype: str = "auto"
    block_size: int = 32
    max_model_len: int = 2_048
    """May exceed the model's own limit: only speed is measured."""
    num_blocks: int = 2_048
    max_num_seqs: int = 16
    rank: int = 32
    ranks: int = 1
    """Processes that share out the model, as `--tensor-parallel-size` has it."""
    draft_tokens: int = 0
    """The most tokens that n-grams foresee for a step; 0: no drafts."""
    prefix_caching: bool = False
    compiled: bool = True
    """Under torch.compile."""
    huge_pages: bool = True
    """Memory of arms with PTE, where system and environment let it."""
    timed: bool = False
    """Also tell where the time of a step goes; for arms with PTE."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequences to generate, all at once, greedily and past any end-of-sequence token."""

    num_seqs: int
    prompt_tokens: int
    output_tokens: int
    group_size: int = 1
    """Sequences that share a prompt."""
    pin_tokens: int | None = None
    seed: int = 0


class Arm:
    """A running arm, as the parent sees it.

    Raises:
        RuntimeError: with the end of the log, if the process dies.
    """

    def __init__(self, spec: ArmSpec, log: Path) -> None:
        self.spec, self._log = spec, log
        env = dict(os.environ)
        if not spec.huge_pages:
            env[huge_pages.DISABLE] = "0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pte_vllm.bench.arm", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=env,
            text=True,
        )

    def wait_ready(self) -> None:
        self._receive()

    def run(self, workload: Workload) -> dict[str, Any]:
        """Run a workload to its end.

        Returns:
            `seconds`; `output_tokens` of all; `decoded`, tokens and seconds after all prompts are
            read; by step with an output `step_ms` and `positions`, the length of the longest
            sequence; by sequence `first_token_ms`; `cached_tokens` of the prompts, found in the
            prefix cache; `mean_running`, sequences per step; `accepted`, tokens that a sequence
            gets from a step, 1 without drafts; `parts_ms` of a timed arm, the mean
            over the steps after all prompts are read.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(workload)) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise RuntimeError(f"arm {self.spec.name} ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _build(spec: ArmSpec) -> tuple[Any, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # vLLM serves with one torch thread per worker unless told otherwise; use the whole machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    from vllm import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    from pte_vllm.method.options import EngineConfig
    from pte_vllm.serve import engine_args

    args: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "block_size": spec.block_size,
        "max_model_len": spec.max_model_len,
        "hf_overrides": {"max_position_embeddings": spec.max_model_len},
        "max_num_seqs": spec.max_num_seqs,
        "num_gpu_blocks_override": spec.num_blocks + 1,
        # What vLLM checks for; it takes as many blocks as are said above.
        "kv_cache_memory_bytes": 2**32 if spec.ranks == 1 else 2**30,
        "enable_prefix_caching": spec.prefix_caching,
        "enforce_eager": not spec.compiled,
        "tensor_parallel_size": spec.ranks,
    }
    cores = sorted(os.sched_getaffinity(0))
    share_cores(os.environ, ranks=spec.ranks, cores=cores, nodes=1)
    if spec.draft_tokens:
        args["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": spec.draft_tokens,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        }
    if spec.window_tokens is not None:
        config = EngineConfig(
            window_tokens=spec.window_tokens, keep_tokens=spec.keep_tokens, probes=spec.probes
        )
        args |= engine_args(config)
    lora = None
    if spec.adapter is not None:
        args |= {"enable_lora": True, "max_lora_rank": spec.rank, "max_loras": 1}
        lora = LoRARequest(lora_name="bench", lora_int_id=1, lora_path=spec.adapter)
    return LLMEngine.from_engine_args(EngineArgs(**args)), lora


def _run(
    engine: Any, lora: Any, workload: Workload, vocab: int, parts: Parts | None = None
) -> dict[str, Any]:
    import random

    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = random.Random(workload.seed)
    pin = {} if workload.pin_tokens is None else {"pte_pin_tokens": workload.pin_tokens}
    prompt: list[int] = []
    for i in range(workload.num_seqs):
        if i % workload.group_size == 0:
            prompt = [rng.randrange(10, vocab) for _ in range(workload.prompt_tokens)]
        params = SamplingParams(
            max_tokens=workload.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            extra_args=pin,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        request_id = f"{workload.seed}-{i}"
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params, lora_request=lora)
    step_ms, positions, produced, num_outputs = [], [], 0, 0
    lengths: dict[str, int] = {}
    first_token_ms: dict[str, float] = {}
    cached: dict[str, int] = {}
    began = decoding = time.perf_counter()
    steps_before = produced_before = 0
    while engine.has_unfinished_requests():
        step_began = time.perf_counter()
        outputs = engine.step()
        if outputs:
            now = time.perf_counter()
            step_ms.append((now - step_began) * 1e3)
            generated = [len(o.outputs[0].token_ids) for o in outputs]
            positions.append(workload.prompt_tokens + max(generated))
            num_outputs += len(outputs)
            lengths |= {o.request_id: n for o, n in zip(outputs, generated, strict=True)}
            produced = sum(lengths.values())
            for output in outputs:
                first_token_ms.setdefault(output.request_id, (now - began) * 1e3)
                cached.setdefault(output.request_id, output.num_cached_tokens or 0)
            if not steps_before and len(first_token_ms) == workload.num_seqs:
                decoding, steps_before, produced_before = now, len(step_ms), produced
                if parts is not None:
                    parts.seconds.clear()  # of reading prompts
    ended = time.perf_counter()
    seconds = ended - began
    return {
        "seconds": seconds,
        "output_tokens": produced,
        "decoded": {"tokens": produced - produced_before, "seconds": ended - decoding},
        "step_ms": step_ms,
        "positions": positions,
        "first_token_ms": list(first_token_ms.values()),
        "cached_tokens": sum(cached.values()),
        "mean_running": num_outputs / max(1, len(step_ms)),
        "accepted": produced / max(1, num_outputs),
        "parts_ms": {}
        if parts is None
        else _per_step(parts, ended - decoding, len(step_ms) - steps_before),
    }


def _per_step(parts: Parts, seconds: float, steps: int) -> dict[str, float]:
    found = {**parts.seconds, REST: seconds - sum(parts.seconds.values())}
    return {part: 1e3 * spent / steps for part, spent in found.items()}


def main() -> None:
    """Serve workloads from standard input until it closes."""
    # Also for the processes of other ranks, whatever they print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = ArmSpec(**json.loads(sys.argv[1]))
    parts = time_engine() if spec.timed else None
    engine, lora = _build(spec)
    vocab = engine.model_config.get_vocab_size()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        result = _run(engine, lora, Workload(**json.loads(line)), vocab, parts)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
