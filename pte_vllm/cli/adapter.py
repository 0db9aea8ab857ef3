"""`pte-vllm adapter`: flags of its commands. Standard library only until one of them runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields

from pte_vllm.adapter.defaults import parse_layers
from pte_vllm.adapter.flags import add_flags, new_adapter
from pte_vllm.adapter.hashes import CONFIG_FILE, PROBES_FILE
from pte_vllm.adapter.probe_options import (
    DEVICES,
    DTYPES,
    STORES,
    ProbeOptions,
    read_prompts,
    read_thoughts,
)
from pte_vllm.cli.adapter_hub import add_fetch, add_pull, add_push_hub
from pte_vllm.models.location import check_model


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm adapter COMMAND ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pte-vllm adapter")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_inspect(commands)
    _add_calibrate(commands)
    _add_cast(commands)
    add_fetch(commands)
    add_push_hub(commands)
    add_pull(commands)
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "init",
        help="make an untrained adapter for a model",
        description="Make an untrained adapter, calibrated on sample text. With --b zero it adds "
        "nothing until it is trained: the model answers as the base model does under its window.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory of the base model")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    add_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="Seed of all that starts random")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the adapter that OUT holds already"
    )
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    adapter = new_adapter(options)  # a mistake shows before anything is loaded
    config = adapter.pte()
    check_model(options.model)
    if os.path.exists(os.path.join(options.out, CONFIG_FILE)) and not options.overwrite:
        raise ValueError(
            f"OUT: {options.out} holds an adapter already: name another directory, or give "
            "--overwrite to lose it"
        )
    if adapter.text is not None and not os.path.isfile(adapter.text):
        raise FileNotFoundError(f"--text: {adapter.text} does not exist")
    from pte_vllm.adapter.make import make_adapter

    make_adapter(
        options.model,
        options.out,
        config,
        layers=parse_layers(adapter.layers),
        target_modules=adapter.target_modules,
        b=adapter.b,
        alpha=adapter.alpha,
        seed=options.seed,
        text_file=adapter.text,
    )
    return 0


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="validate an adapter and show what it holds",
        description="Validate an adapter and show what it holds; exit status 2 if it is broken.",
    )
    parser.add_argument("path", metavar="DIR")
    parser.add_argument("--model", metavar="MODEL", help="also check that it fits this base model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    if options.model is not None:
        check_model(options.model, flag="--model")
    from pte_vllm.adapter.inspect import inspect

    inspect(options.path, model=options.model, as_json=options.json)
    return 0


def _add_cast(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "cast",
        help="halve an adapter: its numbers in 16 bits",
        description="Write an adapter with its LoRA and its probes in 16 bits. A server in bfloat16"
        " rounds the LoRA in the same way when it loads it. The encoder stays as it is.",
    )
    parser.add_argument("path", metavar="DIR", help="the adapter's directory")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(%(default)s)"
    )
    parser.set_defaults(command=_cast)


def _cast(options: argparse.Namespace) -> int:
    from pte_vllm.adapter.cast import cast_adapter

    cast_adapter(options.path, options.out, options.dtype)
    return 0


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="sample a model's probes, by which kept tokens are scored",
        description="Let a model think about some prompts, and write probes to the file OUT: "
        "queries of these thoughts, by which a server scores the tokens that it keeps. One file "
        "serves the base model and all its adapters, but for those that bring probes of their own: "
        f"as ADAPTER/{PROBES_FILE}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ProbeOptions()
    parser.add_argument(
        "--thoughts",
        metavar="FILE",
        help="further thoughts to train on, of `pte-vllm eval thoughts` or rollouts of a server: "
        "what it is really asked",
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory of the base model")
    parser.add_argument("out", metavar="OUT", help="file to write, a .safetensors")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='what to think about: a .jsonl with a field "prompt", or text with a prompt in each '
        "line; None: prompts of the package's own",
    )
    for flag, name, about in (
        ("--num-thoughts", "num_thoughts", "thoughts to sample, each to a prompt"),
        ("--max-tokens", "max_tokens", "most tokens of a thought"),
        ("--probes", "num_probes", "probes for each KV head of each layer"),
        (
            "--train-steps",
            "train_steps",
            "steps by which the probes learn what later tokens of the same thoughts attend to, "
            "such as 400; 128 trained ones are enough; 0: they stay as sampled",
        ),
        ("--batch-size", "batch_size", "thoughts sampled at once; fewer take less memory"),
        ("--seed", "seed", "seed of all that is drawn"),
    ):
        parser.add_argument(
            flag, dest=name, metavar="N", type=int, default=getattr(default, name), help=about
        )
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="of the sampling"
    )
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="auto: a GPU")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default.dtype,
        help="auto: the model's own, but float32 on a CPU without bf16 instructions",
    )
    parser.add_argument(
        "--store",
        choices=STORES,
        default=default.store,
        help="what the probes are rounded to; 16 bits halve the file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file OUT")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    names = (field.name for field in fields(ProbeOptions))
    wanted = ProbeOptions(**{name: getattr(options, name) for name in names})
    check_model(options.model)
    if os.path.isdir(options.out):
        name = os.path.join(options.out, PROBES_FILE)
        raise ValueError(
            f"OUT: {options.out} is a directory; name a file in it, such as {name} for an "
            "adapter's own probes"
        )
    if os.path.exists(options.out) and not options.overwrite:
        raise ValueError(
            f"OUT: {options.out} exists already: name another file, or give --overwrite to lose it"
        )
    if options.prompts is not None:
        read_prompts(options.prompts)  # a mistake shows before anything is loaded
    if options.thoughts is not None:
        if not wanted.train_steps:
            raise ValueError("--thoughts are trained on: they need --train-steps above 0")
        read_thoughts(options.thoughts)
    # Threads that spin while they wait stand still beside any other load. OpenMP reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pte_vllm.adapter.make_probes import make_probes

    make_probes(
        options.model,
        options.out,
        wanted,
        prompts_file=options.prompts,
        thoughts_file=options.thoughts,
    )
    return 0
