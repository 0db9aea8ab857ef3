"""What a check found, and how it is shown: lines for a terminal or a bug report, or JSON.

Standard library and rich only. Nothing secret gets through: see `Redactor`.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

Status = Literal["ok", "warning", "broken"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "broken": "bold red"}
_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.I)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 6  # shorter values would be found in words that are none


@dataclass(frozen=True, kw_only=True)
class Check:
    """It holds one finding."""

    name: str
    value: str
    status: Status = "ok"
    fix: str | None = None
    """It says what to do; every warning and everything broken has one."""


Checks = Callable[[], Iterator[Check]]


def ok(name: str, value: object) -> Check:
    return Check(name=name, value=str(value))


def warning(name: str, value: object, fix: str) -> Check:
    """Return a finding that something is slower, missing or will be refused; the rest works."""
    return Check(name=name, value=str(value), status="warning", fix=fix)


def broken(name: str, value: object, fix: str) -> Check:
    """Return a finding that serving fails or gives wrong answers."""
    return Check(name=name, value=str(value), status="broken", fix=fix)


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    checks: Sequence[Checks]

    def run(self) -> list[Check]:
        """Return all findings; checks that fail themselves are findings, too."""
        found: list[Check] = []
        for checks in self.checks:
            name = checks.__name__.strip("_").replace("_", " ")
            try:
                found += checks()
            except Exception as error:  # a broken installation fails in any way
                if os.environ.get("PTE_TRACEBACK"):
                    traceback.print_exc()
                what = " ".join(f"{type(error).__name__}: {error}".split())
                found.append(broken(name, what, "PTE_TRACEBACK=1 shows where it comes from"))
        return found


class Redactor:
    """Takes out of texts what nobody else should read: keys in the environment, the home directory.

    Args:
        environ: whose values under names such as `*_KEY` and `*_TOKEN` are kept out.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._secrets = sorted(
            (
                value
                for name, value in environ.items()
                if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
            ),
            key=len,
            reverse=True,
        )
        home = environ.get("HOME", "").rstrip("/")
        self._home = re.compile(rf"{re.escape(home)}(?=/|$|\W)") if home else None

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = _USER_IN_URL.sub("***", text)
        return self._home.sub("~", text) if self._home else text


class Report:
    """Collects sections, and prints each as it comes unless it will all be JSON.

    Args:
        console: where to print.
        as_json: print at the end, as one JSON value.
        environ: of this process.
    """

    def __init__(self, console: Console, *, as_json: bool, environ: Mapping[str, str]) -> None:
        self._console, self._as_json = console, as_json
        self._redact = Redactor(environ)
        self._sections: list[tuple[str, list[Check]]] = []

    def add(self, section: Section) -> None:
        """Run a section's checks."""
        checks = [self._redacted(check) for check in section.run()]
        self._sections.append((section.title, checks))
        if not self._as_json:
            self._print(section.title, checks)

    def finish(self) -> int:
        """Print the summary, or the JSON; returns the exit status: 1 if something is broken."""
        counts = {
            status: sum(c.status == status for _, checks in self._sections for c in checks)
            for status in _STYLES
        }
        worst: Status = "broken" if counts["broken"] else "warning" if counts["warning"] else "ok"
        if self._as_json:
            sections = [
                {"title": title, "checks": [asdict(check) for check in checks]}
                for title, checks in self._sections
            ]
            text = json.dumps({"status": worst, "sections": sections}, indent=2)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            summary = f"{counts['broken']} broken, {counts['warning']} warnings, {counts['ok']} ok"
            self._console.print(Text(summary, style=_STYLES[worst]))
        return int(worst == "broken")

    def _redacted(self, check: Check) -> Check:
        return Check(
            name=check.name,
            value=self._redact(check.value),
            status=check.status,
            fix=None if check.fix is None else self._redact(check.fix),
        )

    def _print(self, title: str, checks: Sequence[Check]) -> None:
        self._console.print(Text(title, style="bold"))
        width = max((len(check.name) for check in checks), default=0)
        for check in checks:
            line = Text.assemble(
                ("  " + check.status.ljust(8), _STYLES[check.status]),
                f"{check.name.ljust(width)}  {check.value}",
            )
            self._console.print(line, soft_wrap=True)
            if check.fix is not None:
                self._console.print(Text(f"{'':10}{'':{width}}  -> {check.fix}"), soft_wrap=True)
        self._console.print()
