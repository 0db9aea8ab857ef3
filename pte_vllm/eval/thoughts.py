"""`pte-vllm eval thoughts`: a model's own answers under full attention, sampled once for all arms.

Standard library only until the flags are read.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pte_vllm.engine.cpu_defaults import on_cpu
from pte_vllm.launch import LaunchError, Server
from pte_vllm.models.location import check_model

if TYPE_CHECKING:
    from rich.console import Console

    from pte_vllm.train.options.runs import DistillRun

TEMPLATE = "{prompt}\nThink step by step, and end with the answer in \\boxed{}."
_FLAGS = {
    "model.base": "model",
    "data.source": "source",
    "data.task": "task",
    "data.path": "path",
    "data.seed": "seed",
    "data.prompt_template": "template",
    "data.max_prompt_tokens": "max_prompt_tokens",
    "sampling.temperature": "temperature",
    "sampling.max_tokens": "max_tokens",
    "sampling.group_size": "answers",
    "server.api_key_env": "api_key_env",
    "server.url": "url",
}
"""Flags by the options of a distillation that they are."""
BLOCK_SIZE, MAX_SEQS = 32, 16
"""Of the server that the command starts: the tokens of a block, the answers that run at once."""


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm eval thoughts ...`; returns the exit status.

    Raises:
        ValueError, OSError: naming the flag, if something does not fit or is not there.
    """
    options = parse(arguments)
    check_model(options.model)
    for flag in ("questions", "answers", "max_tokens", "max_prompt_tokens"):
        if getattr(options, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, flag)}")
    if options.out.exists():
        raise ValueError(f"OUT: {options.out} exists already: name another file, or remove it")
    from pte_vllm.wire.transport import ServerError

    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Without this SIGTERM would end us at once and leave the server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _sample(options)
    except (LaunchError, ServerError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        raise ValueError(_with_own_flags(str(error))) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="pte-vllm eval thoughts",
        description="Sample answers of the base model under full attention, as rollout records. "
        "Without --url it starts a server of its own for the time. The file appears when it is "
        "whole.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="name or directory of the base model")
    add("out", metavar="OUT", type=Path, help="file to write, such as thoughts.jsonl")
    add("--url", help="use this server in place of one that is started for the time")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add(
        "--source",
        default="reasoning-gym",
        help="where the questions come from, as --data.source of `train` (%(default)s)",
    )
    add("--task", help="task of the source, such as gsm_symbolic; reasoning-gym needs one")
    add("--path", help="local copy of the source, or the file of the source jsonl")
    add("--questions", type=int, default=112, metavar="N", help="(%(default)s)")
    add("--answers", type=int, default=1, metavar="N", help="answers to each (%(default)s)")
    add("--max-tokens", type=int, default=400, metavar="N", help="of one answer (%(default)s)")
    add("--max-prompt-tokens", type=int, default=1024, metavar="N", help="(%(default)s)")
    add("--temperature", type=float, default=0.7, metavar="T", help="(%(default)s)")
    add("--seed", type=int, default=5, help="of the questions and the answers (%(default)s)")
    add(
        "--template",
        default=TEMPLATE,
        help="text around the question, which stands for {prompt}; without the flag it asks for "
        "steps and an answer in \\boxed{}",
    )
    add("--no-chat", action="store_true", help="ask without the model's chat template")
    return parser.parse_args(arguments)


def _sample(options: argparse.Namespace) -> None:
    from rich.console import Console

    from pte_vllm.train.distill.samples import sample_answers
    from pte_vllm.train.run.start import load_tokenizer

    console = Console(stderr=True, highlight=False)
    _run(options, url=options.url)  # a mistake shows before a server starts
    with _server(options, console) as url:
        tokenizer = load_tokenizer(options.model)
        sample_answers(_run(options, url=url), tokenizer, options.out, console)
    console.print(f"wrote {options.out}", soft_wrap=True)


def _run(options: argparse.Namespace, *, url: str | None) -> DistillRun:
    """Return the options as a distillation has them that samples.

    Raises:
        ValueError: naming its option, if one does not fit.
    """
    from pte_vllm.train.options.runs import DistillRun

    values = {name: getattr(options, flag) for name, flag in _FLAGS.items() if name != "server.url"}
    values |= {
        "data.chat": not options.no_chat,
        "distill.data": "samples",
        "distill.max_sequences": options.questions * options.answers,
        "run.seed": options.seed,
    }
    if url is not None:
        values["server.url"] = url
    return DistillRun.from_options(values)


def _with_own_flags(message: str) -> str:
    """Write a message about the options of a distillation with the flags of this command."""
    for name, flag in _FLAGS.items():
        message = message.replace(f"--{name}", f"--{flag.replace('_', '-')}")
    return message


@contextmanager
def _server(options: argparse.Namespace, console: Console) -> Iterator[str]:
    """Yield the URL of the server that was named, or of one that lives as long as the block.

    Raises:
        LaunchError: if it does not start.
    """
    if options.url is not None:
        yield options.url
        return
    log = options.out.with_suffix(".server.log")
    server = Server(
        serve_args(options), log=log, env={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    )
    with server:
        with console.status(f"starting a server, log {log}"):
            server.wait_ready()
        yield server.url


def serve_args(options: argparse.Namespace) -> list[str]:
    """Return what follows `pte-vllm serve`."""
    room = options.max_prompt_tokens + options.max_tokens
    config = Path(options.model) / "config.json"
    if config.is_file():
        known = json.loads(config.read_text()).get("max_position_embeddings", room)
        if room > known:
            raise ValueError(
                f"--max-prompt-tokens and --max-tokens are {room} together; {options.model} knows "
                f"{known} positions only"
            )
    blocks = -(-room // BLOCK_SIZE)
    flags = ["--enforce-eager"] if on_cpu() else []  # compiling would take longer than it gains
    return [
        options.model,
        *("--pte-window", "0", "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(blocks * BLOCK_SIZE), "--max-num-seqs", str(MAX_SEQS)),
        *("--disable-uvicorn-access-log", *flags),
    ]
