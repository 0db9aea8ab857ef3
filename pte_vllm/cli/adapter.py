"""`pte-vllm adapter init` and `inspect`: their flags. Standard library only until one runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from pte_vllm.adapter.defaults import parse_layers
from pte_vllm.adapter.flags import add_flags, new_adapter
from pte_vllm.adapter.hashes import CONFIG_FILE
from pte_vllm.models.location import check_model


def main(arguments: Sequence[str]) -> int:
    """Run `pte-vllm adapter COMMAND ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="pte-vllm adapter")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_inspect(commands)
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
