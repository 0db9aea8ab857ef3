"""Links of the documentation lead somewhere, and a name in front of one is in the file it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "pte_vllm" / "adapter" / "shipped"
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "patches" / "README.md"),
        *(ROOT / "docs").rglob("*.md"),
        *SHIPPED.rglob("*.md"),
    ]
)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_MODULE = re.compile(r"`(pte_vllm(?:\.\w+)+)")


def _links(page: Path) -> list[tuple[str, str]]:
    text = _CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [(link["text"], link["target"]) for link in _LINK.finditer(text)]


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for text, target in _links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: [{text}]({target})"
        if anchor and found.suffix == ".md":
            assert anchor in _anchors(found), f"{page.name}: [{text}]({target})"


def _names(source: Path) -> set[str]:
    """Names that a Python file defines: functions, classes, `Class.method`, constants."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)

    collect(ast.parse(source.read_text(encoding="utf-8")).body, "")
    return names


def test_a_stranger_finds_what_the_architecture_names() -> None:
    """Each answer of `Where is ...?` is a name that its file defines."""
    page = ROOT / "docs" / "architecture.md"
    answers = 0
    for text, target in _links(page):
        path = (page.parent / target.partition("#")[0]).resolve()
        if path.suffix != ".py" or not re.fullmatch(r"`[A-Za-z_.]+`", text):
            continue
        assert text.strip("`") in _names(path), f"{target} does not define {text}"
        answers += 1
    assert answers >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_a_page_names_are_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it also names what has moved
        pytest.skip("names modules of earlier versions")
    for name in _MODULE.findall(page.read_text(encoding="utf-8")):
        assert _is_there(name), f"{page.name}: there is no {name}"


def _is_there(name: str) -> bool:
    """Whether a folder, a module, or something that a module defines has this dotted name."""
    first, *rest = name.split(".")[1:]
    found = ROOT / first if first in ("server", "patches") else ROOT / "pte_vllm" / first
    while not found.with_suffix(".py").exists():
        if not found.is_dir():
            return False
        if not rest:
            return True
        found = found / rest.pop(0)
    return not rest or rest[0] in _names(found.with_suffix(".py"))
