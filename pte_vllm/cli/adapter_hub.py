"""`pte-vllm adapter fetch`, `push-hub`, `pull`: flags, and what is told at the end.

Standard library only until one runs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pte_vllm.adapter import shipping
from pte_vllm.adapter.hashes import content_hash, file_hashes
from pte_vllm.adapter.serve_line import needed_rank, serve_line
from pte_vllm.models.location import check_model

if TYPE_CHECKING:
    from pte_vllm.adapter.hub import Moved

Commands = argparse._SubParsersAction  # of ArgumentParser


def add_fetch(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `pte-vllm adapter fetch`."""
    parser = commands.add_parser(
        "fetch",
        help="copy out a trained adapter that ships with this package",
        description="Copy out a trained adapter that ships with this package, and say how to serve "
        "it. No network is needed. Does nothing if OUT holds the same adapter.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="which one; --list names them")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="directory to write; ./NAME if left out"
    )
    parser.add_argument("--list", action="store_true", help="print a table of what ships, and end")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="directory of your base model: tell whether it is the one that the adapter was "
        "trained with, and refuse one that it does not fit",
    )
    parser.set_defaults(command=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    if options.list:
        _list()
        return 0
    if options.name is None:
        raise ValueError("NAME is missing; `pte-vllm adapter fetch --list` shows what ships")
    _end_in_order()
    name, out = options.name, options.out or options.name
    about = shipping.find(name)
    if options.model is not None:
        check_model(options.model, flag="--model")
        warning = shipping.check_base(name, options.model)
        if warning:
            _warn(warning)
        else:
            print(f"{options.model} is the base model that {name} was trained with")
    written = shipping.fetch(name, out)
    print(f"wrote {out}: {about.about}" if written else f"{out} holds it already")
    print(f"adapter sha256 {content_hash(file_hashes(out))}")
    print(f"base model {about.base_model.hub}, {about.plan.words()}")
    if options.model is None and about.base_model.fetch_line:
        print(f"\nto get the base model:\n\n    {about.base_model.fetch_line}")
    _print_serve_line(options.model or about.base_model.fetched, out, name, about)
    return 0


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    there = shipping.shipped()
    if not there:
        print("this version ships no adapters")
        return
    table = Table("name", "base model", "plan", "what for")
    for column in table.columns:
        column.overflow = "fold"
    for name, about in there.items():
        base = about.base_model
        table.add_row(name, base.catalog or base.hub, about.plan.words(), about.about)
    Console(highlight=False).print(table)


def add_push_hub(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `pte-vllm adapter push-hub`."""
    parser = commands.add_parser(
        "push-hub",
        help="upload an adapter to the Hugging Face hub",
        description="Check an adapter and upload it to the Hugging Face hub, or another one. Only "
        "the adapter's files travel, and README.md; without one a card is written for the hub. The "
        "repository is made if it is not there. Exit status 2 if the adapter is broken.",
    )
    parser.add_argument("path", metavar="DIR", help="the adapter's directory")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the hub")
    parser.add_argument(
        "--private", action="store_true", help="of a new repository: closed to others"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; main if left out")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    _add_access(parser)
    parser.set_defaults(command=_push)


def add_pull(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `pte-vllm adapter pull`."""
    parser = commands.add_parser(
        "pull",
        help="download an adapter from the Hugging Face hub",
        description="Download an adapter from the Hugging Face hub, or another one, check it, and "
        "say how to serve it. Only the adapter's files come, and README.md. A plain PEFT LoRA is "
        "an adapter too. Does nothing if OUT holds the same adapter.",
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the hub")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; main if left out")
    _add_access(parser)
    parser.set_defaults(command=_pull)


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable that holds the token; HF_TOKEN, or what `hf auth login` has "
        "kept, if left out",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="the hub; HF_ENDPOINT or https://huggingface.co if left out. The token goes there",
    )


def _push(options: argparse.Namespace) -> int:
    from pte_vllm.adapter.card import hub_base
    from pte_vllm.adapter.hub import push
    from pte_vllm.adapter.hub_errors import Target

    target = Target.of(
        options.repo_id,
        endpoint=options.endpoint,
        revision=options.revision,
        token_env=options.token_env,
    )
    moved = push(options.path, target, private=options.private, message=options.message)
    where = f"{target.endpoint}/{target.repo_id}"
    _tell(moved, f"pushed {options.path} to {where}", f"{where} has the same files already")
    if moved.deleted:
        print(f"deleted there, as {options.path} has none: {', '.join(moved.deleted)}")
    if moved.card_made:
        print(f"wrote a card there, as {options.path} has no {shipping.CARD_FILE}")
    if hub_base(moved.summary) is None:
        base = moved.summary["base_model"] or "none"
        _warn(
            f"adapter_config.json names no base model that others can find ({base}): put its name "
            "on the hub into base_model_name_or_path, and push again"
        )
    revision = f" --revision {target.revision}" if target.revision else ""
    print(f"\nto get it:\n\n    pte-vllm adapter pull {target.repo_id} OUT{revision}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from pte_vllm.adapter.card import hub_base
    from pte_vllm.adapter.hub import pull
    from pte_vllm.adapter.hub_errors import Target

    _end_in_order()
    target = Target.of(
        options.repo_id,
        endpoint=options.endpoint,
        revision=options.revision,
        token_env=options.token_env,
    )
    moved = pull(target, options.out)
    _tell(moved, f"wrote {options.out}", f"{options.out} holds it already")
    about = shipping.read_about(options.out)
    base = hub_base(moved.summary, about)
    if base is None:
        named = moved.summary["base_model"] or "none"
        print(f"base model: {named!r}, which is no name on a hub; put your own for MODEL below")
    if about is not None and about.base_model.fetch_line:
        base = about.base_model.fetched
        print(f"\nto get the base model:\n\n    {about.base_model.fetch_line}")
    _print_serve_line(base or "MODEL", options.out, target.repo_id.rpartition("/")[2], about)
    return 0


def _tell(moved: Moved, changed: str, unchanged: str) -> None:
    found: dict[str, Any] = moved.summary
    print(f"{changed if moved.changed else unchanged}, commit {moved.commit}")
    rule = f", rule {found['rule']}" if "rule" in found else ""
    probes = ", with probes of its own" if found["probes"] is not None else ""
    print(f"{found['kind']}, rank {found['rank']}{rule}{probes}")
    print(f"adapter sha256 {found['content_sha256']}")


def _print_serve_line(model: str, out: str, name: str, about: shipping.About | None) -> None:
    line = serve_line(
        model,
        None if about is None else about.plan,
        rank=needed_rank(Path(out)),
        name=name,
        path=out,
    )
    indented = line.replace("\n", "\n    ")
    print(f"\nto serve it:\n\n    {indented}")
    if about is None:
        print("\nIts files do not say for which window it was trained: these are the defaults.")


def _warn(text: str) -> None:
    print(f"pte-vllm: warning: {text}", file=sys.stderr)


def _end_in_order() -> None:
    """Let a stop end this process as an exit does, so that nothing half-made stays."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
