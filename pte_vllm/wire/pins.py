"""What each sequence of a request pins, as the fields of the request say it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pte_vllm.method.names import PINS, Pin
from pte_vllm.method.option_values import check_choice
from pte_vllm.method.spans import Spans
from pte_vllm.wire.expected import Group


def pins_of_each(
    pin: Pin | None,
    pin_tokens: int | Sequence[int] | None,
    pin_spans: Sequence[Spans] | None,
    count: int,
) -> list[dict[str, Any]]:
    """Return what each of `count` sequences pins, as fields of `Group`.

    Raises:
        ValueError: if there is not one value for each, or words and numbers say it at once.
    """
    if pin is not None:
        check_choice("pin", pin, PINS)
        if pin_tokens is not None or pin_spans is not None:
            raise ValueError(
                f"pin {pin} says what is pinned, and so do pin_tokens and pin_spans: leave one of "
                "them out"
            )
        return [{"pin": pin} for _ in range(count)]
    tokens: list[int | None] = (
        list(pin_tokens) if isinstance(pin_tokens, Sequence) else [pin_tokens] * count
    )
    spans: list[Spans] = [()] * count
    if pin_spans is not None:
        spans = [tuple((first, end) for first, end in of_one) for of_one in pin_spans]
    for name, values in (("pin_tokens", tokens), ("pin_spans", spans)):
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} sequences")
    return [{"pin_tokens": pin, "pin_spans": own} for pin, own in zip(tokens, spans, strict=True)]


def pins_of(groups: Iterable[Group]) -> dict[str, Any]:
    """Return the fields that say what sequences pin; servers of earlier versions know no lists."""
    groups = list(groups)
    if groups and groups[0].pin is not None:  # it is the same of all
        return {"pin": groups[0].pin}
    tokens = [group.pin_tokens for group in groups]
    found: dict[str, Any] = {"pin_tokens": tokens[0] if len(set(tokens)) == 1 else tokens}
    if any(group.pin_spans for group in groups):
        found["pin_spans"] = [group.pin_spans for group in groups]
    return found
