"""One request is answered by records, over as many attempts as the server needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pte_vllm.wire.expected import ErrorLine, Expected, Group
from pte_vllm.wire.rollout import Rollout
from pte_vllm.wire.transport import ServerError, Transport, Unavailable, error_of


@dataclass(kw_only=True)
class Request:
    """A request that may take several attempts; each asks for what is still missing."""

    path: str
    """The route, such as `/pte/v1/rollouts`."""
    expected: Expected
    """What was asked for and has not come."""
    body: Callable[[dict[str, Group]], dict[str, Any]]
    """Makes the JSON body that asks for these groups."""
    _lines: Iterator[str] | None = None
    """The answer that is being read."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def records(self, http: Transport, default_plan: Mapping[str, Any]) -> Iterator[Rollout]:
        """Yield each record once, as it comes.

        Args:
            http: the server, and the patience with it.
            default_plan: the server's plan, as its `info` has it.

        Raises:
            RolloutMismatch: if a record is malformed or not what was asked for.
            ServerError: if the server refuses or stays away.
        """
        try:
            while self.expected.missing():
                # The clock of the retries starts anew with every record: only silence ends them.
                yield http.retrying(lambda: self._next(http, default_plan))
        finally:
            self._close()

    def _next(self, http: Transport, default_plan: Mapping[str, Any]) -> Rollout:
        """Return the next record, of the answer that is being read or of a new one."""
        try:
            if self._lines is None:
                body = self.body(self.expected.missing())
                self._lines = http.lines(self.path, body, self._stack)
            line = next(self._lines, None)
            if line is None:
                raise Unavailable(f"POST {self.path} ended before all samples had come")
            return self.expected.accept(line, default_plan)
        except ErrorLine as error:
            self._close()
            raise error_of(f"POST {self.path}", error.details) from None
        except ServerError:
            self._close()  # the next attempt asks for what is missing then
            raise

    def _close(self) -> None:
        self._stack.close()
        self._lines = None
