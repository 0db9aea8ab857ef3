"""Room for whole windows: a request starts only when those that run keep room for theirs.

vLLM admits a request when its prompt fits. Under a plan with a window, what a sequence will hold is
known when it arrives, so one that starts too early can be seen before it takes the last blocks of
another. That other would be preempted, and all its tokens and folds computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pte_vllm.method.plan import FoldPlan


class WindowReserve:
    """How many more blocks the requests that hold some will take.

    Args:
        held: The blocks of each request, as vLLM's manager keeps them; a request that was preempted
            or has ended is not among them.
        num_held: What counts those of one request without its gap.
    """

    def __init__(
        self, held: Mapping[str, Sequence[object]], num_held: Callable[[str], int]
    ) -> None:
        self._held, self._num_held = held, num_held
        self._peaks: dict[str, int] = {}
        self._growth: int | None = None  # of those that ran before this step's first admission
        self._last: str | None = None  # what was admitted last in this step, if anything was

    def enter(self, request_id: str, plan: FoldPlan, num_tokens: int) -> None:
        """Note the peak of a request that will have at most `num_tokens`.

        One without a window is left to vLLM: its length is not known, only bounded.
        """
        if plan.bounded:
            self._peaks[request_id] = plan.peak_blocks(num_tokens)

    def forget(self, request_id: str) -> None:
        """Drop a request that has ended."""
        self._peaks.pop(request_id, None)

    def begin_step(self) -> None:
        """Count anew when the next request asks: what runs has changed."""
        self._growth = self._last = None

    def peak(self, request_id: str) -> int | None:
        """Return the most blocks that the request will hold; None without a window."""
        return self._peaks.get(request_id)

    def growth(self, request_id: str) -> int:
        """Return how many more blocks the others will take.

        Within a step those that run are counted once; what was admitted since is added.
        """
        if self._growth is None:
            self._growth = sum(self._still(other) for other in self._held if other != request_id)
        elif self._last is not None and self._last != request_id and self._last in self._held:
            self._growth += self._still(self._last)
        self._last = request_id
        return self._growth

    def _still(self, request_id: str) -> int:
        peak = self._peaks.get(request_id)
        return 0 if peak is None else max(0, peak - self._num_held(request_id))
