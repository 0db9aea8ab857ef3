"""`GET /pte` is a page that draws what the routes under `/pte/v1` tell. It is one static file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()


@router.get("/pte", include_in_schema=False)
def page() -> HTMLResponse:
    """Send the page, which needs no key: it holds no data. Its script asks for the key."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """Return the file, and a policy that lets it run its own script and reach this server only."""
    html = files("pte_vllm.server").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {
        kind: f"'sha256-{_digest(re.search(f'<{kind}>(.*?)</{kind}>', html, re.DOTALL)[1])}'"
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
