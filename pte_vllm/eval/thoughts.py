"""`pte-vllm eval thoughts`: a model's own answers under full attention, sampled once for all arms.

Standard library only until the flags are read.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pte_vllm.launch import LaunchError
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
MAX_SEQS = 64
"""Answers that run at once on the server that the command starts."""


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
    from pte_vllm.eval.serving import DeadServer
    from pte_vllm.wire.transport import ServerError

    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Without this SIGTERM would end us at once and leave the server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _sample(options)
    except (DeadServer, LaunchError, ServerError) as error:
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

    console = Console(stderr=True, highlight=False)
    run = _run(options)  # a mistake shows before a server starts
    sample_on_server(
        run,
        options.out,
        console,
        url=options.url,
        log=options.out.with_suffix(".server.log"),
        concurrency=MAX_SEQS,
    )
    console.print(f"wrote {options.out}", soft_wrap=True)


def sample_on_server(
    run: DistillRun,
    path: Path,
    console: Console,
    *,
    url: str | None,
    log: Path,
    concurrency: int,
    block_size: int | None = None,
) -> None:
    """Sample the answers of a distillation, on a server that lives as long as that takes.

    Args:
        run: what is asked, with which model.
        path: the file to write, as `train.distill.samples.sample_answers` does.
        console: where progress is shown.
        url: a running server; None starts one.
        log: of the server that is started.
        concurrency: answers that run at once there.
        block_size: of its KV cache; None: what suits the device.

    Raises:
        DeadServer: if nothing answers at the URL.
        LaunchError: if the server does not start.
        ServerError: if it refuses or stays away.
        ValueError: naming the option, if a question is too long, or the model is too short for it.
    """
    from pte_vllm.eval.serving import OwnServer, ask, key_from, started
    from pte_vllm.train.distill.samples import sample_answers
    from pte_vllm.train.options.runs import ServerOptions
    from pte_vllm.train.run.start import load_tokenizer

    assert run.data is not None
    tokenizer = load_tokenizer(run.model.base)

    def sample(url: str) -> None:
        server = ServerOptions(url=url, api_key_env=run.server.api_key_env)
        sample_answers(run.model_copy(update={"server": server}), tokenizer, path, console)

    if url is not None:
        ask(url, api_key=key_from(run.server.api_key_env))
        sample(url)
        return
    room = run.data.max_prompt_tokens + run.sampling.max_tokens
    _check_room(run.model.base, room)
    own = OwnServer(
        model=run.model.base, max_model_len=room, concurrency=concurrency, block_size=block_size
    )
    with console.status(f"starting a server, log {log}") as status, started(own, log=log) as server:
        status.stop()
        sample(server.url)


def _check_room(model: str, room: int) -> None:
    config = Path(model) / "config.json"
    if config.is_file():
        known = json.loads(config.read_text()).get("max_position_embeddings", room)
        if room > known:
            raise ValueError(
                f"--max-prompt-tokens and --max-tokens are {room} together; {model} knows {known} "
                "positions only"
            )


def _run(options: argparse.Namespace) -> DistillRun:
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
    if options.url is not None:
        values["server.url"] = options.url
    return DistillRun.from_options(values)


def _with_own_flags(message: str) -> str:
    """Write a message about the options of a distillation with the flags of this command."""
    for name, flag in _FLAGS.items():
        message = message.replace(f"--{name}", f"--{flag.replace('_', '-')}")
    return message
