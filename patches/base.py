"""What a patch is: one symbol of vLLM, checked against the source it was written for."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pte_vllm.compat.upstream import source_sha256

MARK = "__pte_patched__"


class PatchError(RuntimeError):
    """vLLM's source differs from what a patch relies on; the message names the symbol."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A wrapper around one function of vLLM. See `patches/README.md` for the ledger."""

    name: str
    target: str
    """The function, as `module.Class.function` or `module.function`."""
    upstream: str
    """The path of its file, at the version that `sha256` was taken from."""
    why: str
    remove_when: str
    sha256: str
    """The hash of the function's source without comments (`pte_vllm/compat/upstream.py`)."""
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def _owner(self) -> tuple[Any, str]:
        owner, _, attribute = self.target.rpartition(".")
        return pkgutil.resolve_name(owner), attribute

    def _live(self) -> Callable[..., Any]:
        owner, attribute = self._owner()
        return getattr(owner, attribute)

    def source_sha256(self) -> str:
        """Return the SHA-256 of the source that is installed, patched or not."""
        original = getattr(self._live(), MARK, self._live())
        return source_sha256(inspect.getsource(original))

    def check(self) -> None:
        """Raise PatchError if the upstream source changed or the symbol is gone."""
        try:
            found = self.source_sha256()
        except (ImportError, AttributeError, OSError) as error:
            raise PatchError(f"{self.name}: cannot read {self.target}: {error}") from error
        if found != self.sha256:
            raise PatchError(
                f"{self.name}: the source of {self.target} ({self.upstream}) has changed "
                f"(SHA-256 {found}, expected {self.sha256[:12]}…)"
            )

    def apply(self) -> None:
        """Install the wrapper; a second call does nothing."""
        if hasattr(self._live(), MARK):
            return
        owner, attribute = self._owner()
        original = getattr(owner, attribute)
        wrapper = self.wrap(original)
        setattr(wrapper, MARK, original)
        setattr(owner, attribute, wrapper)

    def verify(self) -> None:
        """Raise PatchError unless the live symbol is ours."""
        if not hasattr(self._live(), MARK):
            raise PatchError(f"{self.name}: {self.target} is not patched")


def apply_all(patches: list[Patch]) -> None:
    """Check every patch, then apply every patch, then verify."""
    for patch in patches:
        patch.check()
    for patch in patches:
        patch.apply()
    for patch in patches:
        patch.verify()
