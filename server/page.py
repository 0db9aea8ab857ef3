"""`GET /pte` is a page that draws what the routes under `/pte/v1` tell.

Its parts lie in `static/`; they are sent as one file.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

SCRIPTS = ("requests.js", "cards.js", "kept.js", "look.js")
"""In the order in which they run."""

router = APIRouter()


@router.get("/pte", include_in_schema=False)
def page() -> HTMLResponse:
    """Send the page, which needs no key: it holds no data. Its script asks for the key."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """Return the page, and a policy that lets it run its own script and reach this server only."""
    html = _part("page.html")
    parts = {"style": _part("style.css"), "script": "\n".join(map(_part, SCRIPTS))}
    for kind, text in parts.items():
        html = html.replace(f"<{kind}></{kind}>", f"<{kind}>{text}</{kind}>")
    allowed = {kind: f"'sha256-{_digest(text)}'" for kind, text in parts.items()}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _part(name: str) -> str:
    return files("pte_vllm.server").joinpath("static", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
