"""What finished requests kept at their folds, until whoever asked for it takes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from pte_vllm.engine.request_ids import find_id
from pte_vllm.method.kept_record import KeptRecord

MAX_BYTES = 2**28
"""The most memory for what nobody has taken yet; the oldest leave."""


class KeptRecords:
    """Marks of finished requests that asked for them, each to be taken once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._marks: OrderedDict[str, tuple[Tensor | None, ...]] = OrderedDict()
        self._num_bytes = 0

    def add(self, request_id: str, marks: Sequence[Tensor | None]) -> None:
        """Keep the marks of each fold of a request, as `keep_marks.packed` has them, or None.

        They may still be on their way to the host.
        """
        self._drop(request_id)
        self._marks[request_id] = tuple(marks)
        self._num_bytes += _size(marks)
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._marks)))

    def take(self, name: str) -> KeptRecord | None:
        """Return the record of the newest request that a client calls `name`, and forget it.

        The device must have been waited for. None if it is unknown, taken, or has left.
        """
        request_id = find_id(name, self._marks)
        if request_id is None:
            return None
        marks = self._marks[request_id]
        self._drop(request_id)
        return to_record(marks)

    def _drop(self, request_id: str) -> None:
        marks = self._marks.pop(request_id, None)
        if marks is not None:
            self._num_bytes -= _size(marks)


def to_record(marks: Sequence[Tensor | None]) -> KeptRecord:
    """Return packed marks as records carry them; the device must have been waited for."""
    return tuple(None if of_fold is None else of_fold.numpy().tobytes() for of_fold in marks)


def _size(marks: Sequence[Tensor | None]) -> int:
    return sum(of_fold.nbytes for of_fold in marks if of_fold is not None)
