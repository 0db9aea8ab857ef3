"""The answer that a text commits to, in the forms that data sets and models write.

Solutions in data sets are read with the same functions as the completions of a model, so both are
understood alike. What a model writes may be long or malformed: every search here is bounded.
"""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 1000
"""Longer final answers are wrong: no answer is that long, and parsing would take for ever."""
_MAX_BOXES = 16
_ANSWER_LINE = re.compile(r"\banswer\b[* ]{0,4}(?:is\b[* ]{0,4})?:([^\n]+)", re.IGNORECASE)
"""The repeats are bounded: two open-ended ones in a row would take n² on a run of spaces."""


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` or `\fbox{...}` holds; None without one."""
    end = len(text)
    for _ in range(_MAX_BOXES):  # unbalanced boxes without end must not cost n²
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        rest = text[start : start + MAX_ANSWER_CHARS + 20].split("ox", 1)[1].removeprefix("ed")
        rest = rest.lstrip()
        if rest.startswith("{"):
            inside = _balanced(rest)
            if inside is not None:
                return inside.strip()
        elif rest:  # \boxed 5
            return re.split(r"[\s$.]", rest, maxsplit=1)[0] or None
        end = start
    return None


def _balanced(text: str) -> str | None:
    """Return what the braces hold that `text` starts with; None if they do not close."""
    depth, escaped = 0, False
    for place, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[1:place]
    return None


def last_tagged(text: str) -> str | None:
    """Return what the last `<answer>...</answer>` holds; None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def final_answer(text: str) -> str | None:
    r"""Return the answer that a completion commits to; None if it commits to none.

    Looked for are `\boxed{x}`, `#### x`, `Answer: x` and `<answer>x</answer>`; the one that stands
    last counts, so that naming many answers does not help. A bare number at the end is no answer.
    """
    found: list[tuple[int, str]] = []  # place, answer
    boxed = last_boxed(text)
    if boxed is not None:
        found.append((max(text.rfind("\\boxed"), text.rfind("\\fbox")), boxed))
    tagged = last_tagged(text)
    if tagged is not None:
        found.append((text.rfind("</answer>"), tagged))
    mark = text.rfind("####")
    if mark >= 0:
        found.append((mark, text[mark + 4 :].lstrip().partition("\n")[0]))
    for match in _ANSWER_LINE.finditer(text):
        found.append((match.start(1), match.group(1)))
    if not found:
        return None
    answer = max(found)[1]
    answer = last_boxed(answer) or last_tagged(answer) or answer
    answer = answer.strip(" \t\r\n*").removesuffix(".").strip()
    for mark_ in ("$$", "$"):
        if len(answer) > 2 * len(mark_) and answer.startswith(mark_) and answer.endswith(mark_):
            answer = answer[len(mark_) : -len(mark_)].strip()
    return answer or None
