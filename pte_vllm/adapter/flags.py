"""Makes flags of the options of a new adapter. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pte_vllm.adapter.defaults import OPTIONS, NewAdapter


def add_flags(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add `--rank`, `--global-tokens` and so on: a flag for each option of `NewAdapter`.

    An option that is None unless given is absent from the parsed arguments unless given, so that
    help shows no default for it; `new_adapter` reads them.

    Args:
        parser: the parser that gets the flags.
        only: names of the options that get flags; None: all of them.
    """
    types = get_type_hints(NewAdapter)
    for name, option in OPTIONS.items():
        if only is not None and name not in only:
            continue
        kind = types[name]
        if NoneType in get_args(kind):
            kind = get_args(kind)[0]
        settings: dict[str, Any] = {"help": option.metadata["about"]}
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        else:
            settings["type"] = parse_names if get_origin(kind) is tuple else kind
            settings["metavar"] = option.metadata.get("metavar")
        default: Any = option.default
        if default is None:
            default = argparse.SUPPRESS
        elif isinstance(default, tuple):
            default = ",".join(default)
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **settings)


def new_adapter(arguments: argparse.Namespace) -> NewAdapter:
    """Return what the flags say; an option without a flag keeps its default.

    Raises:
        ValueError: naming the option, if one does not fit.
    """
    given = {name: value for name, value in vars(arguments).items() if name in OPTIONS}
    made = NewAdapter(**given)
    made.check()
    return made


def parse_names(text: str) -> tuple[str, ...]:
    """Turn `a, b` into `("a", "b")`.

    Raises:
        argparse.ArgumentTypeError: if the text holds no name.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("needs at least one name")
    return names
