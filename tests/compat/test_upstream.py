"""How the source of a symbol is found in a tree of vLLM, and what of it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pte_vllm.compat.upstream import SourceTree, normalise, source_sha256

SOURCE = '''
from .other import thing as renamed
from vllm.other import Base

if True:
    try:
        NUMBER: int = 3  # three
    except ImportError:
        NUMBER = 4


class Box(Base):
    """Holds one thing."""

    size: int = 1

    @property
    def twice(self) -> int:
        """Twice."""
        # of it
        return 2 * self.size

    if NUMBER:

        def fill(self, what):
            self.what, self.full = what, True
            self.what: str = str(what)
'''


@pytest.fixture
def small(tmp_path: Path) -> SourceTree:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("from vllm.box import Box\n")
    (tmp_path / "vllm/box.py").write_text(SOURCE)
    (tmp_path / "vllm/other.py").write_text("thing = 1\nfrom vllm.loop import around\n")
    (tmp_path / "vllm/loop.py").write_text("from vllm.other import around\n")
    return SourceTree.of(tmp_path / "vllm")


@pytest.mark.parametrize(
    ("symbol", "lines"),
    [
        ("Box", ["class Box(Base):", "    size: int = 1", "    if NUMBER:"]),
        ("box.Box.twice", ["@property", "def twice(self) -> int:", "    return 2 * self.size"]),
        ("Box.what", ["self.what, self.full = what, True", "self.what: str = str(what)"]),
        ("Box.size", ["size: int = 1"]),
        ("box.NUMBER", ["NUMBER: int = 3", "NUMBER = 4"]),
        ("box.renamed", ["thing = 1"]),
    ],
)
def test_sources_of_symbols(small: SourceTree, symbol: str, lines: list[str]) -> None:
    assert normalise(small.source(f"vllm.{symbol}")).splitlines() == lines


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("box.gone", "vllm.box has no gone"),
        ("Box.gone", "vllm.box.Box has no gone of its own"),
        ("box.NUMBER.real", "no class"),
        ("away.Box", "vllm has no away"),
        ("other.around", "circle"),
    ],
)
def test_what_is_not_there_is_named(small: SourceTree, symbol: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        small.source(f"vllm.{symbol}")


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="holds no vllm/__init__.py"):
        SourceTree.of(tmp_path)


def test_what_counts_as_a_change() -> None:
    source = 'def f(a):\n    """Doc."""\n    # why\n    return f"{a} # {1}"\n'
    same = '  def f(a):  # other\n\n      """Other."""\n      return f"{a} # {1}"\n'
    assert source_sha256(source) == source_sha256(same)
    for other in (source.replace("1", "2"), source.replace("(a)", "(a, b=0)"), "@x\n" + source):
        assert source_sha256(source) != source_sha256(other)
