"""Where the questions of a conversation lie in its tokens, told by the model's chat template.

A template puts the same tokens before each user message and after it. They are found once, by
rendering a short conversation; after that the token ids of a prompt say where its questions are, on
whatever route it came. A question reaches from the header of the user message to the end of the
header of its answer, so that the first turn's whole prompt is one question.

What a tool returns is a thought, also where a template writes it as if a user had. Templates whose
headers have no special token are not told apart from text, and are taken for having none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from pte_vllm.method.spans import Span, Spans

_QUESTION, _ANSWER, _RESULT = "QQQQQQ", "AAAAAA", "RRRRRR"
"""Contents that are found again in what a template makes of them."""


@dataclass(frozen=True)
class ChatMarks:
    """The tokens by which a template marks user messages."""

    header: tuple[int, ...]
    """They come before each."""
    answer_header: tuple[int, ...]
    """They come after each, when it is to be answered: its end, and the header of the answer."""
    result: tuple[int, ...] | None
    """They follow the header where it is no user's message, but what a tool returned; None: no
    tool's results are written so."""

    @classmethod
    def of(cls, tokenizer: Any, template: str | None = None) -> ChatMarks | None:
        """Find the marks of a tokenizer of transformers; None where there are none to find.

        Args:
            tokenizer: what has `apply_chat_template`, `encode` and `all_special_ids`.
            template: a template in place of the tokenizer's own.
        """
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": _QUESTION},
        ]
        text = _render(tokenizer, turns, template)
        if text is None:
            return None
        _, asked, answered = text.partition(_QUESTION)
        to_answer, _, rest = answered.partition(_ANSWER)
        to_question, found, after = rest.partition(_QUESTION)
        if not asked or not found:
            return None
        special = _special_ids(tokenizer)
        header = _header(_ids(tokenizer, to_question), _ids(tokenizer, to_answer), special)
        if not header:
            return None
        return cls(
            header=_trimmed(tokenizer, header),
            answer_header=tuple(_ids(tokenizer, after)),
            result=_result(tokenizer, template, header),
        )

    def questions(self, token_ids: Sequence[int]) -> Spans:
        """Return the tokens of each question, as ranges `[start, end)` in order."""
        headers = _places(token_ids, self.header)
        starts = [start for start in headers if self._is_user(token_ids, start)]
        spans: list[Span] = []
        for start, end in pairwise([*starts, len(token_ids)]):
            body = start + len(self.header)
            # The message ends with the first of the tokens that come after each.
            stop = next((i for i in range(body, end) if token_ids[i] == self.answer_header[0]), end)
            begin, stop = start, stop + _alike(token_ids[stop:end], self.answer_header)
            if spans and spans[-1][1] == start:  # two messages in a row are one question
                begin, _ = spans.pop()
            spans.append((begin, stop))
        return tuple(spans)

    def _is_user(self, token_ids: Sequence[int], start: int) -> bool:
        if self.result is None:
            return True
        after = start + len(self.header)
        return tuple(token_ids[after : after + len(self.result)]) != self.result


def _render(tokenizer: Any, turns: list[dict[str, Any]], template: str | None) -> str | None:
    """Return what the template makes of messages, the next answer's header included."""
    try:
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # noqa: BLE001  a template may raise anything, also for roles it does not know
        return None
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that no text is made of, also those that are not called special."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    return {*tokenizer.all_special_ids, *added.values()}


def _alike(some: Sequence[int], others: Sequence[int]) -> int:
    """Return with how many equal tokens two sequences begin."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _header(header: list[int], ending: list[int], special: set[int]) -> list[int]:
    """Cut what ends the message before off a user message's header.

    Between a question and its answer stand the same tokens as between an answer and the next
    question, up to the role. The last special token of these begins the header; where there is
    none, the last special token of all does. Without special tokens nothing is left.
    """
    alike = _alike(header, ending)
    places = [i for i, token in enumerate(header) if token in special]
    if not places or not ending or ending[0] not in special:
        return []
    before_role = [i for i in places if i < alike]
    return header[before_role[-1] if before_role else places[-1] :]


def _trimmed(tokenizer: Any, header: Sequence[int]) -> tuple[int, ...]:
    """Leave out white space at the end, which may be one token with what follows."""
    end = len(header)
    while end > 1 and not tokenizer.decode(list(header[end - 1 : end])).strip():
        end -= 1
    return tuple(header[:end])


def _result(tokenizer: Any, template: str | None, header: Sequence[int]) -> tuple[int, ...] | None:
    """Return what follows a user message's header where a tool's result is written as one."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": _RESULT},
    ]
    text = _render(tokenizer, turns, template)
    if text is None or _RESULT not in text:
        return None
    ids = _ids(tokenizer, text.partition(_QUESTION)[2].partition(_RESULT)[0])
    trimmed = _trimmed(tokenizer, header)
    places = list(_places(ids, trimmed))
    if not places:
        return None
    rest = ids[places[-1] + len(trimmed) :]
    return _trimmed(tokenizer, rest) if rest else None


def _places(token_ids: Sequence[int], pattern: Sequence[int]) -> Iterator[int]:
    """Yield where a pattern begins in a sequence."""
    first, count = pattern[0], len(pattern)
    ids = list(token_ids)
    at = -1
    while True:
        try:
            at = ids.index(first, at + 1)
        except ValueError:
            return
        if tuple(ids[at : at + count]) == tuple(pattern):
            yield at
