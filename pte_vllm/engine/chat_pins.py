"""What a chat pins: its first question and its newest one, found in the tokens of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pte_vllm.engine.earlier import EarlierRequest
from pte_vllm.method.chat import ChatMarks
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.requests import RequestOptions

_TEMPLATE: str | None = None
_MARKS: dict[tuple[int, str | None], tuple[Any, ChatMarks | None]] = {}  # with their tokenizer


def use_template(template: str | None) -> None:
    """Take this template (`--chat-template`) for that of the server, in place of the tokenizer's.

    Args:
        template: its text.
    """
    global _TEMPLATE
    _TEMPLATE = template


def marks_of_chat(tokenizer: Any) -> ChatMarks | None:
    """Return the marks of a tokenizer's chat template, found once; None where it has none."""
    key = id(tokenizer), _TEMPLATE
    if key not in _MARKS:
        _MARKS[key] = tokenizer, None if tokenizer is None else ChatMarks.of(tokenizer, _TEMPLATE)
    return _MARKS[key][1]


def with_pins(
    options: RequestOptions,
    engine: EngineConfig,
    *,
    tokenizer: Any,
    prompt: Sequence[int],
    earlier: EarlierRequest | None,
) -> RequestOptions:
    """Return options that say in numbers what `pte_pin` says, or what a chat pins by default.

    A prompt that is one question pins itself, as any other prompt; so does one of which a random
    part leaves.

    Args:
        options: Those of the request.
        engine: The engine's defaults; a number of pinned tokens goes before a chat's questions.
        tokenizer: The model's; None where there is none.
        prompt: The tokens of the prompt.
        earlier: The request that it continues, whose pins stay.

    Raises:
        ValueError: If `pte_pin` asks for questions, and none can be told.
    """
    if options.pin is not None and (options.pin_tokens is not None or options.pin_spans):
        raise ValueError(
            f"pte_pin {options.pin} says what is pinned, and so do pte_pin_tokens and "
            "pte_pin_spans: leave one of them out"
        )
    numbers = replace(options, pin=None)
    if options.pin == "prompt":
        if earlier is not None:
            raise ValueError(
                f"pte_pin is prompt, but {options.state_id} goes on with what it pinned: leave out "
                "pte_pin or pte_state_id"
            )
        return replace(numbers, pin_tokens=len(prompt))
    marks = marks_of_chat(tokenizer)
    questions = marks.questions(prompt) if marks is not None else ()
    if options.pin is None:
        drawn = "random" in (options.evict, earlier.evict if earlier is not None else None)
        if drawn or options.pin_spans and (earlier is not None or options.pin_tokens is not None):
            return numbers
        if earlier is None and (options.pin_tokens is not None or engine.pin_tokens is not None):
            return numbers
        if options.pin_spans:  # said without what comes before them
            return replace(numbers, pin_tokens=questions[0][1]) if questions else numbers
    if not questions:
        if options.pin is None:
            return numbers
        raise ValueError(
            f"pte_pin is {options.pin}, but no user message is found in this prompt by the model's "
            "chat template: send pte_pin_tokens and pte_pin_spans"
        )
    if options.pin is None and earlier is None and questions == ((questions[0][0], len(prompt)),):
        return numbers
    if earlier is not None:
        later = tuple(span for span in questions if span[0] >= earlier.num_prompt_tokens)
        return replace(numbers, pin_spans=(*earlier.pin_spans, *later) if later else ())
    return replace(numbers, pin_tokens=questions[0][1], pin_spans=questions[1:])
