"""Flags of `pte-vllm serve`; whatever is not ours goes to vLLM.

Imports the standard library only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import difflib

from pte_vllm.method.names import KEEP_SCORES
from pte_vllm.method.options import EngineConfig
from pte_vllm.server.options import ServiceConfig

_EPILOG = """\
Every other flag is handed to `vllm serve` as it stands. To see those:
    pte-vllm serve MODEL --help=all          all of vLLM's flags
    pte-vllm serve MODEL --help=lora         one group, or one flag such as --help=max-model-len
example:
    pte-vllm serve MODEL --pte-window 1024 --enable-lora --max-lora-rank 32 \\
        --lora-modules math=ADAPTER_DIR
exit status:
    0 after SIGTERM or Ctrl-C: requests that run end with what they have and finish_reason abort,
    or have --shutdown-timeout seconds to finish; 1 if the engine failed; 2 for a mistake in flags
    or files; 143 or 130 after SIGTERM or Ctrl-C while the server starts
"""


def _parser() -> argparse.ArgumentParser:
    # Without argparse's own --help, which would refuse vLLM's --help=all, and without
    # abbreviations, which would take flags that are vLLM's.
    parser = argparse.ArgumentParser(
        prog="pte-vllm serve",
        usage="pte-vllm serve MODEL [--pte-window N] [--pte-evict-ratio F] "
        "[--pte-max-prompt-tokens N] [--pte-pin-tokens N | --pte-require-pin-tokens] "
        "[--no-pte-reserve-windows] "
        "[--pte-spool DIR] [--pte-keep-versions N] [--pte-keep-loaded N] "
        "[--pte-keep-thoughts N] [--pte-keep-thoughts-mib N] "
        "[--pte-admin-key KEY | --pte-admin-key-file FILE] [--pte-max-body-bytes N] "
        "[--pte-max-rollouts N] "
        "[any vllm serve flag ...]",
        description="vLLM's OpenAI-compatible server, with a KV cache of fixed size per sequence.",
        epilog=_EPILOG,
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
        "--pte-keep",
        type=int,
        default=EngineConfig.keep_tokens,
        metavar="N",
        help="evicted tokens that each KV head keeps beside its window, a multiple of the block "
        "size; 0 keeps none (default: %(default)s)",
    )
    parser.add_argument(
        "--pte-keep-score",
        choices=KEEP_SCORES,
        default=EngineConfig.keep_score,
        help="how they are chosen: by the attention that probes of the model's own queries pay "
        "them, or at random, as a control (default: %(default)s)",
    )
    parser.add_argument(
        "--pte-probes",
        metavar="FILE",
        help="probes for the score `expected`, from pte-vllm adapter calibrate (default: the "
        "package's; where it has none, they are sampled once, which takes minutes on a CPU)",
    )
    parser.add_argument(
        "--pte-max-prompt-tokens",
        type=int,
        default=EngineConfig.max_prompt_tokens,
        metavar="N",
        help="most tokens a request may pin; a smaller bound lets more sequences run at once "
        "(default: only vLLM's --max-model-len bounds them)",
    )
    pins = parser.add_mutually_exclusive_group()
    pins.add_argument(
        "--pte-pin-tokens",
        type=int,
        default=EngineConfig.pin_tokens,
        metavar="N",
        help="tokens at the start of a sequence that are never folded, prompt or not, where a "
        "request does not say; for clients that send question and answer as one prompt (default: "
        "the whole prompt)",
    )
    pins.add_argument(
        "--pte-require-pin-tokens",
        action="store_true",
        help="answer HTTP 400 to a request that folds and does not say pte_pin_tokens",
    )
    parser.add_argument(
        "--pte-reserve-windows",
        action=argparse.BooleanOptionalAction,
        default=EngineConfig.reserve_windows,
        help="start a request only when its whole window fits beside those of the requests that "
        "run, so that none is preempted and computed again (the default); --no-pte-reserve-windows "
        "starts it when its prompt fits, which suits answers much shorter than the window",
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
    parser.add_argument(
        "--pte-keep-loaded",
        type=int,
        default=ServiceConfig.keep_loaded,
        metavar="N",
        help="newest of the adapters NAME-v1, NAME-v2, ... loaded from directories that stay; 0 "
        "keeps all, and those in use stay too (default: %(default)s)",
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
    return parser


def main(args: list[str]) -> int:
    """Run `pte-vllm serve ...`; returns the exit status."""
    parser = _parser()
    if "-h" in args or "--help" in args:
        parser.print_help()
        return 0
    options, rest = parse(args)
    if not rest or rest[0].startswith("-"):
        # vLLM's flags may take values, so a model after them cannot be told from a value.
        parser.error("MODEL is missing: it comes before vLLM's flags")
    config, service = configs(options)
    from pte_vllm.serve import serve

    return serve(rest[0], config, rest[1:], service)


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our flags, and what is left: MODEL first, if it is named, then vLLM's.

    Raises:
        ValueError: for a flag that begins as ours do, and is none.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith(("--pte-", "--no-pte-")):
            ours = [name for action in parser._actions for name in action.option_strings]
            near = difflib.get_close_matches(flag, ours, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no flag {flag}{hint} (pte-vllm serve --help lists ours)")
    return options, rest


def configs(options: argparse.Namespace) -> tuple[EngineConfig, ServiceConfig]:
    """Return what our flags say.

    Raises:
        ValueError: naming the flag.
    """
    engine = EngineConfig(
        window_tokens=options.pte_window,
        evict_ratio=options.pte_evict_ratio,
        max_prompt_tokens=options.pte_max_prompt_tokens,
        pin_tokens=options.pte_pin_tokens,
        require_pin_tokens=options.pte_require_pin_tokens,
        keep_thoughts=options.pte_keep_thoughts,
        keep_thoughts_mib=options.pte_keep_thoughts_mib,
        reserve_windows=options.pte_reserve_windows,
        keep_tokens=options.pte_keep,
        keep_score=options.pte_keep_score,
        probes=options.pte_probes,
    )
    admin_key = options.pte_admin_key
    if options.pte_admin_key_file is not None:
        admin_key = _read_key("--pte-admin-key-file", options.pte_admin_key_file)
    service = ServiceConfig(
        spool=options.pte_spool,
        keep_versions=options.pte_keep_versions,
        keep_loaded=options.pte_keep_loaded,
        admin_key=admin_key,
        max_body_bytes=options.pte_max_body_bytes,
        max_rollouts=options.pte_max_rollouts,
    )
    return engine, service


def _read_key(flag: str, path: str) -> str:
    """Return the key in a file, blanks around it aside."""
    try:
        with open(path, encoding="utf-8") as file:
            key = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error
    if not key:
        raise ValueError(f"{flag} {path} is empty")
    return key
