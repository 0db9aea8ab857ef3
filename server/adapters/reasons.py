"""Why the engine did not load an adapter, without what vLLM wraps around the worker's words."""

from __future__ import annotations

import re

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

_WRAPPED = re.compile(
    r"Call to \w+ method failed: Worker failed with error ['\"](?P<reason>.+)['\"], please check "
    r"the stack trace above for the root cause",
    re.DOTALL,
)


def reason_of(answer: ErrorResponse) -> str:
    """Return what the worker said, or the whole message if it did not come from a worker."""
    found = _WRAPPED.fullmatch(answer.error.message)
    return found["reason"] if found else answer.error.message
