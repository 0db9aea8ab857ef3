"""The doctor's report: what sets the exit status, what is shown, and that no key is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from rich.console import Console

from pte_vllm.doctor.checks import Check, Redactor, Report, Section, broken, ok, warning

KEY = "sk-doctor-0123456789"


def _report(*checks: Check, as_json: bool = False, **environ: str) -> tuple[int, str]:
    out = io.StringIO()
    report = Report(Console(file=out, width=40), as_json=as_json, environ=environ)
    report.add(Section(title="Some", checks=[lambda: iter(checks)]))
    return report.finish(), out.getvalue()


def test_only_what_is_broken_sets_the_exit_status() -> None:
    assert _report(ok("a", 1))[0] == 0
    assert _report(ok("a", 1), warning("b", "slow", "do"))[0] == 0
    status, text = _report(warning("b", "slow", "hurry up"), broken("c", "gone", "get it back"))
    assert status == 1
    assert "-> hurry up" in text and "1 broken, 1 warnings, 0 ok" in text


def test_json_report() -> None:
    long = "x" * 200  # must not be wrapped
    status, text = _report(broken("c", long, "mend"), as_json=True)
    assert status == 1
    assert json.loads(text) == {
        "status": "broken",
        "sections": [
            {
                "title": "Some",
                "checks": [{"name": "c", "value": long, "status": "broken", "fix": "mend"}],
            }
        ],
    }


def test_a_check_that_fails_is_a_finding() -> None:
    def kernel_order() -> Iterator[Check]:
        yield ok("first", "there")
        raise OSError(f"illegal instruction of {KEY}")

    section = Section(title="Some", checks=[kernel_order, lambda: iter([ok("next", "there")])])
    checks = section.run()
    assert [check.status for check in checks] == ["ok", "broken", "ok"]
    assert checks[1].name == "kernel order" and "illegal instruction" in checks[1].value


def test_nothing_secret_is_shown() -> None:
    environ = {
        "HOME": "/home/ada",
        "HF_TOKEN": KEY,
        "AWS_SECRET_ACCESS": "hidden-away",
        "TOKENIZERS_PARALLELISM": "parallel",
        "OPENAI_API_KEY": "none",
    }
    redact = Redactor(environ)
    assert redact(f"error at {KEY}: hidden-away") == "error at ***: ***"
    assert redact("/home/ada/x and /home/adam, parallel none") == (
        "~/x and /home/adam, parallel none"
    )
    assert redact("from https://ada:secret@host/simple") == "from https://***@host/simple"
    for as_json in (False, True):
        check = broken("a", f"in /home/ada/{KEY}", f"unset {KEY}")
        assert KEY not in _report(check, as_json=as_json, **environ)[1]
