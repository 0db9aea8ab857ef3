"""`pte-vllm bench WHAT`: speed and memory, every baseline in the same run, the arms taking turns.

Imports the standard library only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pte_vllm.bench.flags import adapter_features, add_adapter_flags
from pte_vllm.engine.cpu_defaults import choose_dtype, on_cpu
from pte_vllm.models.location import check_model

_WITH_RANKS = ("throughput", "lora", "fold")
"""Benchmarks whose engines may have several ranks."""
_ABOUT = {
    "throughput": "tokens/s of many long rollouts in a small KV pool: full cache, window, PTE",
    "lora": "tokens/s of a batch: base model, vLLM's LoRA, ours, PTE",
    "drafts": "tokens/s with n-gram drafts and without, and how many tokens a step gives",
    "latency": "time per token by position, and time to the first token",
    "schedule": "planning a step, at short and long sequences and in a full pool; no model runs",
    "fold": "what folding costs per token",
    "keep": "tokens/s with kept tokens, against vLLM and a window that hold as many blocks",
    "prefix": "a group that shares a question: how much of it is read once",
    "push": "tokens/s while new adapter versions arrive, against the steady state",
    "huge-pages": "PTE on huge pages of memory, as a server on a CPU is, and on small ones",
    "profile": "where the time of a step goes on a CPU",
    "gpu": "one GPU without a network: kernels, exactness, throughput at long rollouts, overhead",
    "soak": "a server under mixed traffic for long: errors, latencies, and what grows",
    "train": "memory and time of a training step by answer length (pte-vllm train memory-curve)",
}


def main(argv: list[str]) -> int:
    """Run one benchmark; returns the exit status."""
    if argv[:1] == ["train"]:  # has options of its own
        from pte_vllm.train.experiments.memory_curve import main as memory_curve

        return memory_curve(argv[1:])
    if argv[:1] == ["gpu"]:  # so does this
        from pte_vllm.bench.gpu.run import main as gpu

        return gpu(argv[1:])
    if argv[:1] == ["schedule"]:
        from pte_vllm.bench.schedule import main as schedule

        return schedule(argv[1:])
    args = _parser().parse_args(argv)
    if not Path(args.model).exists():
        raise ValueError(
            f"--model {args.model} does not exist; make it with "
            f"`pte-vllm model fetch smollm2 {args.model}`"
        )
    check_model(args.model, flag="--model")
    for name, least in (
        *(("repeats", 1), ("window", 0), ("tokens", 2), ("seqs", 1)),
        *(("tensor_parallel_size", 1), ("drafts", 1)),
        *(("streams", 1), ("minutes", 0), ("every", 0), ("pool", 1), ("keep", 0)),
    ):
        if getattr(args, name, least) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, name)}")
    args.features = adapter_features(args)
    if args.dtype == "auto" and on_cpu():
        # Once for all arms, the servers' among them, and so that the results tell.
        args.dtype, why = choose_dtype(args.model)
        if why is not None:
            print(f"bench: {why}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "soak":
        from pte_vllm.bench.soak import run as soak

        return soak(args)
    if args.what == "keep":
        from pte_vllm.bench.kept import run
    elif args.what == "push":
        from pte_vllm.bench.push import run
    else:
        from pte_vllm.bench.engine_runs import run
    run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm bench",
        description="Measure speed. Baselines run in the same run, in turn with ours; each command "
        "prints median, spread and ratio, and writes JSON and a plot.",
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    adders: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "throughput": _throughput,
        "lora": _lora,
        "drafts": _drafts,
        "latency": _latency,
        "fold": _fold,
        "keep": _keep,
        "prefix": _prefix,
        "huge-pages": _lora,
        "profile": _profile,
        "push": _push,
        "soak": _soak,
    }
    for name, about in _ABOUT.items():
        command = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name in adders:
            _common(command)
            if name != "soak":  # has one arm
                command.add_argument(
                    "--repeats", type=int, default=3, help="runs of each arm, alternating"
                )
            adders[name](command)
            if name in _WITH_RANKS:
                _ranks(command)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=".cache/models/smollm2", help="checkpoint directory")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--window", type=int, default=256, help="tokens of the window")
    add_adapter_flags(parser)
    parser.add_argument(
        "--eager",
        action="store_true",
        help="all engines without torch.compile, which takes a minute at their start",
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="for JSON and plot")


def _throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqs", type=int, default=16, help="rollouts at once")
    parser.add_argument("--group", type=int, default=4, help="rollouts that share a question")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a question")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of an answer")
    parser.add_argument("--pool", type=int, default=4, help="full rollouts that the pool holds")
    parser.add_argument(
        "--with-lora", action="store_true", help="also a full cache with a plain LoRA"
    )


def _lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqs", type=int, default=8, help="sequences at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a question")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer")


def _profile(parser: argparse.ArgumentParser) -> None:
    _lora(parser)
    parser.set_defaults(seqs=16, tokens=512)


def _latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--positions", default="1000,2000,4000,8000,16000", help="measured at")
    parser.add_argument("--tokens", type=int, default=64, help="generated at each")


def _fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqs", type=int, default=8, help="sequences, which fold together")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of an answer")


def _keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=int, default=64, help="kept tokens of each KV head")
    parser.add_argument("--seqs", type=int, default=16, help="sequences at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a question, pinned")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer")


def _drafts(parser: argparse.ArgumentParser) -> None:
    _lora(parser)
    parser.add_argument("--drafts", type=int, default=4, help="tokens that are foreseen at most")


def _ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="processes that share out each model"
    )


def _prefix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group", type=int, default=16, help="rollouts that share a question")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the question")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")


def _push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=16, help="rollouts that run all the time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--every", type=float, default=2.0, help="seconds from push to push")


def _soak(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=20.0, help="how long")
    parser.add_argument("--streams", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=300, help="longest answer")
    parser.add_argument("--pool", type=int, default=160, help="KV blocks; few: preemptions")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from push to push")
    parser.add_argument("--seed", type=int, default=0, help="of what the requests are")
