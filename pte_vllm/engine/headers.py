"""Options of a request that its HTTP headers carry: `X-PTE-Pin-Tokens: 45` is `pte_pin_tokens`.

Some clients let their users set headers, and not the body. A middleware of the server sets what
came with a request, and the check of requests reads it; both run in the API server's process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

PREFIX = "x-pte-"
NO_PLAN = ("pte_record", "pte_return_kept")
"""Options that say nothing of how a sequence folds, so that a continuation may have its own."""

SENT: ContextVar[Mapping[str, str] | None] = ContextVar("pte_options_in_headers", default=None)
"""The options that came with the request that this task serves, by their names in `vllm_xargs`."""


def options_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the options that headers carry, under the names that they have in a body."""
    found = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower()
        if name.startswith(PREFIX):
            option = name.removeprefix("x-").replace("-", "_")
            found[option] = raw_value.decode("latin-1").strip()
    return found


def with_headers(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Add the options of the headers to those of the body, which go first.

    A request that names an earlier one has that one's plan: only the body may contradict it.
    """
    sent = SENT.get()
    given = dict(extra_args or {})
    if sent and given.get("pte_state_id") is not None:
        sent = {name: value for name, value in sent.items() if name in NO_PLAN}
    if not sent:
        return None if extra_args is None else given
    return {**sent, **{name: value for name, value in given.items() if value is not None}}
