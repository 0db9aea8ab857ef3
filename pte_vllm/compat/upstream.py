"""Source of vLLM's symbols, read from files: nothing is imported, so any tree of vLLM will do.

A symbol is `module.name` or `module.Class.member`, as our code names it; imports on the way are
followed to the definition. A class stands for its bases, decorators and fields: methods are symbols
of their own. A member that is no method or field is what the class's methods assign to `self`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "vllm"
_MAX_IMPORTS = 8  # followed for one symbol; more would be a cycle
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def normalise(source: str) -> str:
    """The lines of a definition that do something: no comments, docstrings or blank lines."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            height = (value.end_lineno or value.lineno) - value.lineno + 1
            lines[value.lineno - 1 : value.end_lineno] = [""] * height
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_sha256(source: str) -> str:
    """SHA-256, in hex, of a definition as `normalise` leaves it."""
    return hashlib.sha256(normalise(source).encode()).hexdigest()


@dataclass(frozen=True)
class SourceTree:
    """A folder that holds vLLM's package: an installation, or what was unpacked from a wheel."""

    root: Path
    _modules: dict[str, _Module] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def installed(cls) -> SourceTree:
        """The vLLM that `import vllm` would find.

        Raises:
            LookupError: if there is none.
        """
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise LookupError("vLLM is not installed")
        return cls(Path(spec.submodule_search_locations[0]).parent)

    @classmethod
    def of(cls, path: str | Path) -> SourceTree:
        """The tree at a path: of the package itself, or of the folder that holds it.

        Raises:
            LookupError: if there is no vLLM.
        """
        for root in (Path(path), Path(path).parent):
            if (root / PACKAGE / "__init__.py").is_file() and Path(path) in (root, root / PACKAGE):
                return cls(root)
        raise LookupError(f"{path} holds no {PACKAGE}/__init__.py")

    def source(self, symbol: str) -> str:
        """The source of a symbol.

        Raises:
            LookupError: naming what is not there.
        """
        for _ in range(_MAX_IMPORTS):
            module, names = self._split(symbol)
            found = module.find(names)
            if isinstance(found, str):
                return found
            symbol = ".".join([found.target, *names[1:]])
        raise LookupError(f"{symbol} is imported in a circle")

    def version(self) -> str | None:
        """As the file that the build writes says; None where it is absent."""
        try:
            text = self.source(f"{PACKAGE}._version.__version__")
        except LookupError:
            return None
        return str(ast.literal_eval(text.rpartition("=")[2].strip()))

    def _split(self, symbol: str) -> tuple[_Module, list[str]]:
        parts = symbol.split(".")
        for end in range(len(parts) - 1, 0, -1):
            module = self._module(".".join(parts[:end]))
            if module is not None:
                return module, parts[end:]
        raise LookupError(f"there is no module for {symbol}")

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            for path, package in ((base.with_suffix(".py"), False), (base / "__init__.py", True)):
                if path.is_file():
                    self._modules[name] = _Module(name, package, path.read_text(encoding="utf-8"))
        return self._modules.get(name)


@dataclass(frozen=True)
class _Import:
    target: str
    """The symbol that a name was imported from."""


@dataclass(frozen=True)
class _Module:
    name: str
    package: bool
    text: str

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def _statements(self) -> list[ast.stmt]:
        return list(_flat(ast.parse(self.text).body))

    def find(self, names: list[str]) -> str | _Import:
        """Source of a name, or of a member of a class; or where the name is imported from."""
        owner = [s for s in self._statements if names[0] in _names(s)]
        if not owner:
            raise LookupError(f"{self.name} has no {names[0]}")
        if isinstance(owner[-1], ast.ImportFrom):
            return _Import(self._imported(owner[-1], names[0]))
        definitions = [s for s in owner if not isinstance(s, ast.ImportFrom)]
        if len(names) == 1:
            return "\n".join(self._text(s) for s in definitions)
        cls = definitions[-1]
        if len(names) > 2 or not isinstance(cls, ast.ClassDef):
            raise LookupError(f"{self.name}.{names[0]} is no class, so it has no {names[1]}")
        return self._member(cls, names[1])

    def _member(self, cls: ast.ClassDef, name: str) -> str:
        body = list(_flat(cls.body))
        found = [s for s in body if name in _names(s)]
        if not found:
            methods = [s for s in body if isinstance(s, _Function)]
            inner = (s for method in methods for s in ast.walk(method) if isinstance(s, ast.stmt))
            found = [s for s in inner if _assigns(s, name)]
        if not found:
            raise LookupError(f"{self.name}.{cls.name} has no {name} of its own")
        return "\n".join(self._text(s) for s in found)

    def _text(self, node: ast.stmt) -> str:
        """Lines of a statement, decorators included; of a class without its methods."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        lines = list(self._lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.ClassDef):
            for method in (s for s in _flat(node.body) if isinstance(s, _Function)):
                start = min([method.lineno, *(d.lineno for d in method.decorator_list)])
                height = (method.end_lineno or start) - start + 1
                # A string, so that the block stays one, and `normalise` drops it.
                hidden = [" " * method.col_offset + '""', *[""] * (height - 1)]
                lines[start - first : start - first + height] = hidden
        return textwrap.dedent("\n".join(lines))

    def _imported(self, statement: ast.ImportFrom, name: str) -> str:
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        base = self.name.split(".") if self.package else self.name.split(".")[:-1]
        above = base[: len(base) - statement.level + 1] if statement.level else []
        return ".".join([*above, *([statement.module] if statement.module else []), original])


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, and of the branches in it."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _flat([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            handlers = [s for handler in statement.handlers for s in handler.body]
            yield from _flat([*statement.body, *handlers, *statement.orelse])


def _names(statement: ast.stmt) -> list[str]:
    """Names that a statement binds."""
    if isinstance(statement, ast.ClassDef | _Function):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    return [t.id for t in _targets(statement) if isinstance(t, ast.Name)]


def _assigns(node: ast.AST, name: str) -> bool:
    """Whether a statement sets `self.name`."""
    return any(
        isinstance(target, ast.Attribute)
        and target.attr == name
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
        for target in _targets(node)
    )


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    given = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        given = [node.target]
    for target in given:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]
