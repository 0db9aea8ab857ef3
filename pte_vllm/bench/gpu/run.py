"""`pte-vllm bench gpu`: what a GPU gains, in one command for a machine without a network.

Parts are independent, and what is measured is kept in `gpu.json`: a command that ran out of time
goes on where it stopped when it is given again with the same `--out`. Imports the standard library
only, until a part runs; each part is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pte_vllm.bench.flags import adapter_features, add_adapter_flags, parse_token_list
from pte_vllm.bench.sizing.hardware import hardware_of
from pte_vllm.bench.sizing.model import Model
from pte_vllm.bench.sizing.roofline import plan_rows
from pte_vllm.models.location import check_model

PARTS = ("kernels", "parity", "throughput", "profile")
_START_S = 150
"""An engine's start and preparation, until the first one has shown how long they take."""


def main(argv: list[str]) -> int:
    """Run what is missing, then write `gpu.json`, `gpu.md` and `gpu.png`; the exit status."""
    args = _parser().parse_args(argv)
    args.features = adapter_features(args)
    parts = _choices("--parts", args.parts, PARTS)
    if args.model:
        check_model(args.model, flag="--model")
    args.windows = parse_token_list(args.windows, flag="--windows")
    args.rollouts = sorted(parse_token_list(args.rollouts, flag="--rollouts"))
    if args.seconds <= 0 or args.minutes <= 0:
        raise ValueError("--seconds and --minutes must be positive")
    if args.dry_run:
        _shrink(args)
    else:
        _need_gpu()
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "gpu.json"
    results: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        complete = _run(args, parts, results, known, Path(scratch))
    from pte_vllm.bench.gpu import tables

    tables.write(args.out, results)
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm bench gpu",
        description="Kernels, exactness, throughput and overhead on one GPU; nothing is fetched. "
        "Give the same command again to go on after --minutes ran out (exit status 1).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="any of these")
    parser.add_argument("--arms", default="all", help="of throughput, by name; see gpu.md")
    parser.add_argument("--windows", default="2k,4k,1k", help="tokens, the most wanted first")
    parser.add_argument("--rollouts", default="8k,32k", help="tokens of a finished rollout")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a question, pinned")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new engine beyond them")
    parser.add_argument("--model", help="directory with a config.json (default: Qwen2.5-7B's)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model: bfloat16 or float16")
    add_adapter_flags(parser)
    parser.add_argument("--memory", type=float, default=0.9, help="share that engines may use")
    parser.add_argument("--attention-backend", help="of the baselines (default: vLLM's choice)")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU, tiny")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="for results")
    return parser


def _choices(flag: str, given: str, known: tuple[str, ...]) -> list[str]:
    chosen = given.split(",")
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise ValueError(f"{flag}: {', '.join(wrong)} is none of {', '.join(known)}")
    return chosen


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "bench gpu needs a CUDA device; --dry-run tries the script on a CPU, without figures"
        )


def _shrink(args: argparse.Namespace) -> None:
    """What a CPU can do in a minute; figures of such a run mean nothing."""
    args.windows, args.rollouts, args.prompt = [128], [2048], 40
    args.seconds, args.rank, args.dtype = 0.5, 8, "float32"


def _run(
    args: argparse.Namespace,
    parts: list[str],
    results: dict[str, Any],
    known: Path,
    scratch: Path,
) -> bool:
    """Fill in what is missing in `results`; False if time ran out or a part failed."""
    from pte_vllm.bench.gpu.spec import Spec
    from pte_vllm.bench.report import console

    deadline, longest, complete = time.monotonic() + 60 * args.minutes, 0.0, True
    if args.again:
        results.clear()
    results["options"] = {k: str(v) for k, v in vars(args).items() if k not in ("out", "again")}
    for key, options in _jobs(args, parts, scratch):
        if "result" in results.get(key, {}):
            continue
        left = deadline - time.monotonic()
        needs = (longest or _START_S) if options["part"] != "kernels" else 0
        if left < needs:
            console.print(f"{key}: no time left; give the command again", highlight=False)
            complete = False
            continue
        console.print(f"{key} ...", highlight=False)
        began = time.monotonic()
        results[key] = _child(Spec(**options), scratch / "log", timeout_s=max(30.0, left))
        results[key]["seconds"] = round(time.monotonic() - began, 1)
        if options["part"] in ("throughput", "profile"):
            longest = max(longest, results[key]["seconds"])
        if "error" in results[key]:
            console.print(f"{key} failed: {results[key]['error']}", highlight=False, markup=False)
            complete = False
        known.write_text(json.dumps(results, indent=1) + "\n")
    return complete


def _jobs(
    args: argparse.Namespace, parts: list[str], scratch: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `Spec` of each child process, the most wanted first."""
    from pte_vllm.bench.gpu.setup import QWEN_7B, TINY, random_adapter, write_model

    common: dict[str, Any] = {"scratch": str(scratch), "dry_run": args.dry_run}
    for part in ("kernels", "parity"):
        if part in parts:
            yield part, {"part": part, "memory_utilization": args.memory, **common}
    if not {"throughput", "profile"} & set(parts):
        return
    model = args.model or write_model(scratch / "model", TINY if args.dry_run else QWEN_7B)
    adapters = {
        plain: random_adapter(
            model,
            scratch / name,
            rank=args.rank,
            rule=args.rule,
            features=args.features,
            plain=plain,
        )
        for plain, name in ((False, "pte"), (True, "lora"))
    }
    common |= {
        "model": model,
        "rollouts": args.rollouts,
        "prompt_tokens": args.prompt,
        "seconds": args.seconds,
        "dtype": args.dtype,
        "rank": args.rank,
        "memory_utilization": args.memory,
        "attention_backend": args.attention_backend,
    }

    def job(part: str, name: str, window_tokens: int | None, adapter: str | None) -> dict[str, Any]:
        most = _most_sequences(args, model, window_tokens)
        about = {"part": part, "name": name, "window_tokens": window_tokens, "adapter": adapter}
        return {**common, **about, "max_num_seqs": most}

    window_tokens = args.windows[0]
    arms: list[tuple[str, int | None, str | None]] = [
        ("full", None, None),
        (f"pte-{window_tokens}", window_tokens, adapters[False]),
        (f"window-lora-{window_tokens}", window_tokens, adapters[True]),
        (f"window-{window_tokens}", window_tokens, None),
        ("full-lora", None, adapters[True]),
        *((f"pte-{other}", other, adapters[False]) for other in args.windows[1:]),
    ]
    chosen = [arm[0] for arm in arms]
    if args.arms != "all":
        chosen = _choices("--arms", args.arms, tuple(chosen))
    if "profile" in parts:
        yield "profile", job("profile", f"pte-{window_tokens}", window_tokens, adapters[False])
    if "throughput" in parts:
        for name, arm_window, adapter in arms:
            if name in chosen:
                yield f"throughput {name}", job("throughput", name, arm_window, adapter)


def _most_sequences(args: argparse.Namespace, model: str, window_tokens: int | None) -> int:
    """A little more than a roofline expects to fit, for `--max-num-seqs`."""
    if args.dry_run:
        return 3
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    given = {"memory_gb": memory, "bandwidth_gb_s": 1000.0, "tflops": 100.0}  # only memory counts
    rows = plan_rows(
        Model.load(model),
        hardware_of("this", given),
        rollout_tokens=args.rollouts[0],  # the shortest: most sequences of full attention
        prompt_tokens=args.prompt,
        windows=[window_tokens] if window_tokens else [],
        rank=args.rank,
        rule=args.rule,
    )
    return min(2048, 8 * math.ceil(1.05 * rows[-1].sequences / 8))


def _child(spec: Any, log: Path, *, timeout_s: float) -> dict[str, Any]:
    """What the part found; or `error`, with the end of its log."""
    from dataclasses import asdict

    env = dict(os.environ)
    if spec.dry_run and spec.part == "kernels":
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pte_vllm.bench.gpu.part", json.dumps(asdict(spec))]
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {timeout_s:.0f} s", "log": _tail(log)}
    if done.returncode or not done.stdout.strip():
        tail = _tail(log)
        return {"error": tail[-1] if tail else f"status {done.returncode}", "log": tail}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _tail(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.strip()][-40:]
