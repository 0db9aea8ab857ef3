"""What the folds of a sequence kept, as records and requests carry it; standard library only.

A record has an entry for each fold in order: the marks of the candidates (`keep_marks`), or None
for a fold that kept all of them. In JSON marks are base64. An empty string reads as null: vLLM's
`vllm_xargs` take lists of strings and numbers, without nulls.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

KeptRecord = tuple[bytes | None, ...]


def record_from_json(value: Any) -> KeptRecord:
    """Read a record from JSON values.

    Raises:
        ValueError: If it is no list of base64 strings, empty strings and nulls.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"what folds kept must be a list, got {type(value).__name__}")
    entries: list[bytes | None] = []
    for fold, entry in enumerate(value):
        if entry is None or entry == "":
            entries.append(None)
            continue
        try:
            entries.append(base64.b64decode(entry, validate=True))
        except (TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"what fold {fold} kept must be base64 or null: {error}") from error
    return tuple(entries)


def record_to_json(record: Iterable[bytes | None] | None) -> list[str | None] | None:
    """Return the JSON values that `record_from_json` reads; None stays None."""
    if record is None:
        return None
    return [None if marks is None else base64.b64encode(marks).decode() for marks in record]
