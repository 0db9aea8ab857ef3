"""Values of options as people send them: numbers and words of bodies, headers and flags.

Standard library only, as `options.py`.
"""

from __future__ import annotations

import re
from typing import Any

from pte_vllm.method.spans import Spans

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._:@-]{1,128}")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the option, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def as_int(option: str, value: object) -> int:
    """Return an integer option; HTTP clients also send 128.0 and "128".

    Raises:
        ValueError: If it is anything else; the message names the option.
    """
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{option} must be an integer, got {value!r}")
    return value


def as_spans(value: Any) -> Spans:
    """Read `[[400, 450], [900, 960]]`, or the same without inner brackets, or "400-450,900-960".

    vLLM's `vllm_xargs` take lists of numbers only, and headers words.

    Raises:
        ValueError: If it is nothing of these.
    """
    form = (
        "pte_pin_spans must be pairs of numbers: [400, 450, 900, 960] in vllm_xargs, "
        "400-450,900-960 in a header"
    )
    if isinstance(value, str):
        value = [part.split("-") for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{form}, got {value!r:.99}")
    if value and not any(isinstance(one, list | tuple) for one in value):
        if len(value) % 2:
            raise ValueError(f"{form}, got {len(value)} numbers")
        value = list(zip(value[::2], value[1::2], strict=True))
    if any(not isinstance(one, list | tuple) or len(one) != 2 for one in value):
        raise ValueError(f"{form}, got {value!r:.99}")
    first_and_end = [[as_int("pte_pin_spans", number) for number in one] for one in value]
    return tuple((first, end) for first, end in first_and_end)


def as_name(option: str, value: object) -> str:
    """Return a name of 1 to 128 of `A-Z a-z 0-9 . _ : @ -`, not only dots, for a URL.

    Raises:
        ValueError: If it is anything else; the message names the option.
    """
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"{option} must be a name of 1 to 128 of A-Z a-z 0-9 . _ : @ -, and not only dots, "
            f"got {value!r:.160}"
        )
    return value


def as_bool(name: str, value: Any) -> bool:
    """Read true or false, also as vLLM's `vllm_xargs` (1 and 0) and headers (words) carry them.

    Raises:
        ValueError: If it is neither; the message names the option.
    """
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool | int | str) and str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"{name} must be true or false, got {value!r:.99}")
