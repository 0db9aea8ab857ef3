"""Adapters that ship with this package: what there is, and how one is copied out.

Each is a directory below `shipped/`: the files of an adapter, a card `README.md`, and
`shipped.json`, which says what a program has to know:

    {"about": "one line", "base_model": {"hub": "owner/name", "sha256": what `model_hash` says,
     "catalog": its name in `models.catalog` or null, "source": "hub" or "packages"},
     "plan": {"window_tokens": 256, "keep_tokens": 64, "block_size": 32, "evict_ratio": 0.25}}

Standard library only, until a fetched adapter is held against a model.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pte_vllm.adapter.hashes import CONFIG_FILE, FILES
from pte_vllm.adapter.placing import check_free, copy_files, made_aside, put_in_place
from pte_vllm.adapter.serve_line import ServePlan
from pte_vllm.models.catalog import MODELS
from pte_vllm.models.location import local_directory, model_hash

SHIPPED = Path(__file__).parent / "shipped"
ABOUT_FILE = "shipped.json"
CARD_FILE = "README.md"
TRAVELLING = (*FILES, ABOUT_FILE, CARD_FILE)
"""All that leaves or enters a directory when an adapter is copied, pushed or pulled."""
MAX_BYTES = 8_000_000
"""The most that the directory of one adapter may weigh: every installation carries it."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that an adapter was trained for."""

    hub: str
    """Its authors' repository on the hub."""
    sha256: str
    """What `models.location.model_hash` says of the directory that it was trained with."""
    catalog: str | None = None
    """Its name for `pte-vllm model fetch`; None: that command does not know it."""
    source: str | None = None
    """The `--source` of that command that gave the directory; None: any."""

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.hub):
            raise ValueError(f'base_model: hub must be "owner/name", got {self.hub!r}')
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"base_model: sha256 must be 64 hex digits, got {self.sha256!r}")
        if self.catalog is not None and self.catalog not in MODELS:
            names = ", ".join(MODELS)
            raise ValueError(f"base_model: catalog must be one of {names}, got {self.catalog!r}")
        if self.source not in (None, "hub", "packages"):
            raise ValueError(f'base_model: source must be "hub" or "packages", got {self.source!r}')

    @property
    def fetched(self) -> str:
        """Where `fetch_line` puts it; for a model that is not in the catalog, its name."""
        return self.hub if self.catalog is None else f"models/{self.catalog}"

    @property
    def fetch_line(self) -> str | None:
        """The command that gets the model; None where a server downloads it by its name."""
        if self.catalog is None:
            return None
        source = f" --source {self.source}" if self.source else ""
        return f"pte-vllm model fetch {self.catalog} {self.fetched}{source}"


@dataclass(frozen=True, kw_only=True)
class About:
    """What `shipped.json` says."""

    about: str
    """What the adapter is good for, in one line."""
    base_model: BaseModel
    plan: ServePlan


def read_about(directory: str | Path) -> About | None:
    """Read an adapter's `shipped.json`; None where it has none.

    Raises:
        ValueError: naming the file and the field, if it is broken.
    """
    file = Path(directory) / ABOUT_FILE
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        _expect_fields(values, {"about", "base_model", "plan"})
        _expect_fields(values["base_model"], {"hub", "sha256"}, {"catalog", "source"})
        about = values["about"]
        if not isinstance(about, str) or not about.strip() or "\n" in about:
            raise ValueError(f"about must be one line of text, got {about!r}")
        if not all(isinstance(values["base_model"][name], str) for name in ("hub", "sha256")):
            raise ValueError("base_model: hub and sha256 must be text")
        return About(
            about=about,
            base_model=BaseModel(**values["base_model"]),
            plan=ServePlan.from_dict(values["plan"]),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _expect_fields(
    values: Any, needed: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"an object with {', '.join(sorted(needed))} is expected, got {values!r}")
    if missing := sorted(needed - set(values)):
        raise ValueError(f"the field {missing[0]} is missing")
    if unknown := sorted(set(values) - needed - optional):
        raise ValueError(f"there is an unknown field {unknown[0]}")


def shipped(root: Path | None = None) -> dict[str, About]:
    """Return what ships, by name.

    Args:
        root: the directory that holds them; None: this package's own.

    Raises:
        ValueError: if one of them says nothing of itself.
    """
    found = {}
    for config in sorted((root or SHIPPED).glob(f"*/{CONFIG_FILE}")):
        about = read_about(config.parent)
        if about is None:
            raise ValueError(f"{config.parent} has no {ABOUT_FILE}")
        found[config.parent.name] = about
    return found


def find(name: str, root: Path | None = None) -> About:
    """Return what is said of one that ships.

    Raises:
        ValueError: if there is none of that name; the message names those that there are.
    """
    there = shipped(root)
    if name in there:
        return there[name]
    if not there:
        raise ValueError(f"NAME: no adapter {name}: this version ships none")
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"NAME: no adapter {name} ships; {hint}There is {', '.join(there)}")


def fetch(name: str, out: str | Path, *, root: Path | None = None) -> bool:
    """Copy a shipped adapter to `out`, which appears whole or not at all.

    Args:
        name: the adapter's name.
        out: the directory to write. One that holds the same adapter stays as it is.
        root: the directory that holds what ships; None: this package's own.

    Returns:
        Whether anything was written; False: the same was there.

    Raises:
        ValueError: on an unknown name, or a directory that holds anything else.
    """
    find(name, root)
    out = Path(out).resolve()
    check_free(out)
    with made_aside(out) as made:
        copy_files((root or SHIPPED) / name, made, TRAVELLING)
        return put_in_place(made, out)


def check_base(name: str, model: str, *, root: Path | None = None) -> str | None:
    """Hold a shipped adapter against a base model on this machine.

    Args:
        name: the adapter's name.
        model: the directory of the model, or its name on the hub if it was downloaded.
        root: the directory that holds what ships; None: this package's own.

    Returns:
        None where it is the very model that the adapter was trained for, else a warning.

    Raises:
        ValueError, OSError: if there is no such model, or its sizes do not fit.
    """
    wanted = find(name, root).base_model
    directory = local_directory(model, flag="--model")
    found = model_hash(directory)
    from transformers import AutoConfig

    from pte_vllm.adapter.files import AdapterError
    from pte_vllm.adapter.format import Adapter, ModelShape

    shape = ModelShape.from_hf(AutoConfig.from_pretrained(directory))
    try:
        Adapter.load((root or SHIPPED) / name, shape)
    except AdapterError as error:
        raise ValueError(
            f"--model: {name} does not fit {model}; it is for {wanted.hub}: {error}"
        ) from error
    if found == wanted.sha256:
        return None
    return (
        f"--model: {model} is not the copy of {wanted.hub} that {name} was trained with: its hash "
        f"is {found[:12]}..., not {wanted.sha256[:12]}... The sizes fit. If it is the same model "
        "from another source, or converted by other versions of libraries, the adapter may answer "
        f"a little worse than its card says; to get that copy: {wanted.fetch_line or wanted.hub}"
    )
