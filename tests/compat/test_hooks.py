"""The ledger of hooks: what it says holds for the installed vLLM, and no hook is missing in it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pte_vllm
from pte_vllm.compat import hooks
from pte_vllm.compat.hooks import Drift, check_hooks, load_hooks
from pte_vllm.compat.upstream import SourceTree, source_sha256
from pte_vllm.compat.versions import MAIN, SUPPORTED
from pte_vllm.engine import attention
from pte_vllm.engine.lora.punica_view import PunicaView
from pte_vllm.patches import all_patches

TREE = SourceTree.installed()
LEDGER = {hook.symbol: hook for hook in load_hooks()}
OTHERS = [version for version in SUPPORTED if version != MAIN]
MOVED = {hook.at for version in OTHERS for hook in load_hooks(version)} - {None}
"""Where other supported versions have what is imported."""
OUTSIDE = ("pte_vllm.train", "pte_vllm.__main__")  # run no vLLM; running it is no import


def test_hooks_of_the_installed_vllm_have_not_changed() -> None:
    drifts = check_hooks(TREE)
    assert not drifts, "\n".join(map(str, drifts))


@pytest.mark.parametrize("version", OTHERS)
def test_other_supported_versions_have_a_hash_of_every_hook(version: str) -> None:
    """What is added to the ledger is to be read in all versions that it promises."""
    with hooks.ledger_of(version).open("rb") as file:
        found = tomllib.load(file)
    assert found["sha"].keys() == LEDGER.keys(), "run: make hooks ARGS='--vllm-source DIR'"
    assert found["moved"].keys() <= LEDGER.keys()


def test_every_module_that_relies_on_a_hook_exists() -> None:
    for hook in load_hooks():
        assert importlib.util.find_spec(f"pte_vllm.{hook.by}") is not None, hook


def test_what_is_overridden_is_overridden_there() -> None:
    """Who moves a hook to another module says so in the ledger, which drift sends people to."""
    strays = []
    for hook in load_hooks():
        if hook.why.startswith(("overridden", "extended", "base of our")):
            module = importlib.util.find_spec(f"pte_vllm.{hook.by}")
            assert module is not None and module.origin is not None
            if hook.symbol.rpartition(".")[2] not in Path(module.origin).read_text():
                strays.append(f"{hook.symbol} is not in pte_vllm.{hook.by}")
    assert not strays, "\n".join(strays)


def test_ledger_reads_the_files_that_python_imports() -> None:
    compared = 0
    for symbol in LEDGER:
        module, _, names = _live_split(symbol)
        found = module
        for name in names:
            found = inspect.getattr_static(found, name, None)
            found = getattr(found, "__func__", getattr(found, "fget", found))
        stands_in = getattr(found, "__module__", None) == "vllm.v1.worker.cpu.shm"  # for CUDA's
        if inspect.isfunction(found) and not stands_in and not hasattr(found, "__pte_patched__"):
            live = inspect.getsource(inspect.unwrap(found))
            assert source_sha256(live) == source_sha256(TREE.source(symbol)), symbol
            compared += 1
    assert compared > len(LEDGER) / 3


def _live_split(symbol: str) -> tuple[object, str, list[str]]:
    parts = symbol.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if (TREE.root / Path(*parts[:end])).with_suffix(".py").exists() or (
            TREE.root / Path(*parts[:end]) / "__init__.py"
        ).exists():
            return importlib.import_module(name), name, parts[end:]
    raise AssertionError(symbol)


# -- nothing is missing ---------------------------------------------------------------------------


@cache
def _modules() -> tuple[object, ...]:
    names = [
        found.name
        for found in pkgutil.walk_packages(pte_vllm.__path__, "pte_vllm.")
        if not found.name.startswith(OUTSIDE)
    ]
    for package in ("server", "patches"):  # folders of their own in a checkout
        path = importlib.import_module(f"pte_vllm.{package}").__path__
        names += [found.name for found in pkgutil.walk_packages(path, f"pte_vllm.{package}.")]
    return tuple(importlib.import_module(name) for name in sorted(set(names)))


@cache
def _classes() -> tuple[type, ...]:
    """Our classes over vLLM's, those included that are made when vLLM asks for them."""
    attention.PTECPUAttentionBackend.get_builder_cls()
    for name in attention._CUDA_BACKENDS:
        getattr(attention, name).get_builder_cls()
    found: set[type] = set()
    for module in _modules():
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found.update(_with_subclasses(value))
    over = [c for c in found if any(_theirs(base) for base in c.__mro__)]
    return tuple(sorted(over, key=lambda c: c.__qualname__))


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for sub in type.__subclasses__(cls):
        yield from _with_subclasses(sub)


def _theirs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "vllm"


def _uses(cls: type) -> tuple[set[str], set[str]]:
    """Of one class of ours: methods it defines, and what it takes from `self` and `super()`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # made by `type(...)`: no source, no methods
        return set(), set()
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    defined = {n.name for n in body.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    taken = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Attribute) and (
            (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
            or (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super")
        ):
            taken.add(node.attr)
    return defined, taken


def _definer(mro: tuple[type, ...], name: str) -> str | None:
    """The symbol of vLLM that a name stands for: a method, a field, or what a method sets."""
    symbols = (f"{base.__module__}.{base.__qualname__}.{name}" for base in mro if _theirs(base))
    return None if name.startswith("pte_") else next(filter(_exists, symbols), None)


@cache
def _exists(symbol: str) -> bool:
    try:
        TREE.source(symbol)
    except LookupError:
        return False
    return True


@pytest.mark.parametrize("cls", _classes(), ids=lambda cls: cls.__qualname__)
def test_what_a_class_takes_from_vllm_is_in_the_ledger(cls: type) -> None:
    missing = set()
    ours = [base for base in cls.__mro__ if base.__module__.startswith("pte_vllm")]
    for base in ours:
        defined, taken = _uses(base)
        for name in defined | taken:
            symbol = _definer(cls.__mro__, name)
            if symbol is not None and symbol not in LEDGER:
                missing.add(f"{symbol} ({base.__qualname__})")
    direct = next(base for base in cls.__mro__ if _theirs(base))
    if not any(
        symbol.startswith(f"{direct.__module__}.{direct.__qualname__}") for symbol in LEDGER
    ):
        missing.add(f"{direct.__module__}.{direct.__qualname__} (base of {cls.__qualname__})")
    assert not missing, f"add to pte_vllm/compat/hooks.toml: {', '.join(sorted(missing))}"


def test_classes_are_found() -> None:
    names = {cls.__qualname__ for cls in _classes()}
    assert {
        *("PTESpec", "PTEManager", "PTEScheduler", "PTEAsyncScheduler", "PTELoRAManager"),
        *("PTECPUModelRunner", "PTEGPUModelRunner", "PTECPUWorker", "PTEGPUWorker"),
        *("PTECPUAttentionBackend", "PTEFlashAttentionBackend", "PTETritonAttentionBackend"),
        *("PTECPUAttentionMetadataBuilder", "PTEFlashAttentionMetadataBuilder"),
        "PTEServingTokens",
    } <= names


def test_what_a_view_of_the_punica_wrapper_replaces_is_in_the_ledger() -> None:
    views = list(_with_subclasses(PunicaView))[1:]
    assert len(views) >= 3
    replaced = {name for view in views for name in _uses(view)[0] if name.startswith("add_")}
    for name in replaced:
        assert any(f".{name}" in s for s in LEDGER if "punica_wrapper" in s), name


def test_every_name_that_we_import_is_in_the_ledger() -> None:
    missing = set()
    for module in _modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
                continue
            if node.module.partition(".")[0] != "vllm":
                continue
            for alias in node.names:
                if not _is_covered(node.module, alias.name):
                    missing.add(f"{node.module}.{alias.name} ({module.__name__})")
    assert not missing, f"add to pte_vllm/compat/hooks.toml: {', '.join(sorted(missing))}"


def _is_covered(module: str, name: str) -> bool:
    """Whether the ledger has a symbol, what it stands for, or something in it."""
    if f"{module}.{name}" in MOVED:
        return True
    found = getattr(importlib.import_module(module), name, None)
    names = {f"{module}.{name}"}
    if inspect.ismodule(found):
        names.add(found.__name__)
    elif hasattr(found, "__qualname__"):
        names.add(f"{found.__module__}.{found.__qualname__}")
    return any(symbol == n or symbol.startswith(f"{n}.") for symbol in LEDGER for n in names)


def test_every_patch_is_in_the_ledger() -> None:
    assert {patch.target for patch in all_patches()} <= LEDGER.keys()


# -- drift is noticed -----------------------------------------------------------------------------

SYMBOL = "vllm.v1.core.sched.async_scheduler.AsyncScheduler.__init__"
PREEMPTIONS = ("self.num_preemptions = 0", "self.num_preemptions = 1")
SOME = [
    hook
    for hook in load_hooks()
    if hook.symbol.startswith(
        (SYMBOL[:30], "vllm.v1.request.", "vllm.lora.request.", "vllm.inputs.")
    )
]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of some of the modules that the ledger reads, to be changed."""
    tree = SourceTree.installed()
    assert not check_hooks(tree, SOME)
    for module in tree._modules.values():
        file = tmp_path.joinpath(*module.name.split("."))
        file = file / "__init__.py" if module.package else file.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(module.text)
    (tmp_path / "vllm/__init__.py").touch()
    return tmp_path


def _edit(tree: Path, symbol: str, old: str, new: str) -> None:
    module = SourceTree.of(tree)._split(symbol)[0]
    file = tree.joinpath(*module.name.split(".")).with_suffix(".py")
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_a_change_names_the_symbol_and_who_relies_on_it(changed: Path) -> None:
    assert check_hooks(SourceTree.of(changed), SOME) == []
    _edit(changed, SYMBOL, "def __init__(", "def __new_init__(")
    _edit(changed, "vllm.lora.request.LoRARequest", "lora_int_id: int", "lora_int_id: str")
    _edit(changed, "vllm.v1.request.Request", *PREEMPTIONS)
    drifts = check_hooks(SourceTree.of(changed), SOME)
    assert {d.hook.symbol: d.missing is not None for d in drifts} == {
        SYMBOL: True,
        "vllm.lora.request.LoRARequest": False,
        "vllm.v1.request.Request.num_preemptions": False,
    }
    gone = next(str(d) for d in drifts if d.missing)
    assert SYMBOL in gone and "pte_vllm.engine.scheduler relies on it" in gone


def test_comments_and_docstrings_are_no_change(changed: Path) -> None:
    old = "    def __init__(self"
    _edit(changed, SYMBOL, old, f"    # Begin.\n\n{old}")
    _edit(changed, "vllm.lora.request.LoRARequest", "lora_int_id: int", "lora_int_id: int  # id")
    _edit(changed, "vllm.lora.request.LoRARequest", '"""', '"""Of all requests: ')
    assert check_hooks(SourceTree.of(changed), SOME) == []


def test_refresh_writes_what_changed_and_nothing_else(changed: Path, tmp_path: Path) -> None:
    ledger, sections = tmp_path / "hooks.toml", hooks.LEDGER.read_text().split("\n\n")
    ledger.write_text(
        "\n\n".join(s for s in sections if s.startswith('["vllm.v1.request"]')) + "\n"
    )
    before = ledger.read_text()
    _edit(changed, "vllm.v1.request.Request", *PREEMPTIONS)
    symbol = "vllm.v1.request.Request.num_preemptions"
    assert hooks.refresh(SourceTree.of(changed), ledger) == [symbol]
    after = ledger.read_text()
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    (pair,) = [(b, a) for b, a in lines if b != a]
    assert all('"Request.num_preemptions" = { sha = "' in line for line in pair)
    _edit(changed, "vllm.v1.request.Request", "class Request:", "class Inquiry:")
    with pytest.raises(LookupError, match="no Request"):
        hooks.refresh(SourceTree.of(changed), ledger)
    assert ledger.read_text() == after


def test_diff_shows_what_changed(changed: Path) -> None:
    symbol = "vllm.v1.request.Request.num_preemptions"
    _edit(changed, "vllm.v1.request.Request", *PREEMPTIONS)
    lines = hooks.diff(symbol, TREE, SourceTree.of(changed)).splitlines()
    assert "-self.num_preemptions = 0" in lines and "+self.num_preemptions = 1" in lines


def test_drift_reads_well() -> None:
    text = str(Drift(hook=LEDGER[SYMBOL]))
    assert text == f"{SYMBOL} has changed; pte_vllm.engine.scheduler relies on it: extended"
