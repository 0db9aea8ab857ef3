"""What the API server asks of the model runner, through `collective_rpc` and the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pte_vllm.engine.state import IDENTITY_SLOT
from pte_vllm.engine.thoughts import Thoughts

if TYPE_CHECKING:
    from pte_vllm.engine.messages import PoolReport
    from pte_vllm.engine.state import Snapshot, StatePool


class QueriesMixin:
    """Over the PTE runner, whose attributes it reads."""

    pte_pool: StatePool
    pte_report: PoolReport
    pte_snapshots: dict[bytes, Snapshot]
    pte_block_size: int

    def pte_requests(self) -> dict[str, Any]:
        """Running and recently finished requests, and the pool as of the last step."""
        pool = self.pte_pool
        return {
            "block_size": self.pte_block_size,
            "usable_blocks": self.pte_report.usable_blocks,
            "free_blocks": self.pte_report.free_blocks,
            "adapters_in_use": list(self.pte_report.adapters),
            "running": [s.thoughts(i, with_rho=False).report() for i, s in pool.sequences.items()],
            "finished": [t.report() for t in list(pool.finished)[-pool.SHOWN_FINISHED :]],
        }

    def pte_counters(self) -> dict[str, Any]:
        """Counts since the start and slots in use, for `/metrics`."""
        slots = self.pte_pool.states.shape[1] - 1  # slot 0 belongs to nobody
        in_use = slots - len(self.pte_pool.free_slots)
        return {**self.pte_pool.counters.snapshot(), "slots": slots, "slots_in_use": in_use}

    def pte_thoughts(self, name: str) -> dict[str, Any] | None:
        """Summary of the request that a client calls `name`, running or finished; else None."""
        thoughts = self._settled(name)
        return None if thoughts is None else thoughts.summary(name)

    def pte_thoughts_file(self, name: str) -> tuple[bool, bytes | None]:
        """Whether the request is known, and its state as safetensors if it has one."""
        thoughts = self._settled(name)
        return thoughts is not None, None if thoughts is None else thoughts.safetensors()

    def pte_thoughts_forget(self, name: str) -> str | None:
        """Forget a finished request: `running`, `forgotten`, or None where it is unknown."""
        thoughts = self.pte_pool.thoughts(name)
        if thoughts is None:
            return None
        if not thoughts.finished:
            return "running"
        self.pte_pool.kept.forget(thoughts.request_id)
        return "forgotten"

    def pte_fold_events(self, name: str, since: int) -> dict[str, Any] | None:
        """Folds of a request after the first `since`; the engine's id, for the next call."""
        thoughts = self._settled(name)
        if thoughts is None:
            return None
        return {
            "request_id": thoughts.request_id,
            "finished": thoughts.finished,
            "num_tokens": thoughts.num_tokens,
            "folds": thoughts.folds,
            "folded_tokens": thoughts.folded_blocks * thoughts.plan.block_size,
            "events": thoughts.events(since),
        }

    def pte_rho(self, name: str) -> list[float] | None:
        """rho of each fold of a request, running or finished lately; None if it is unknown."""
        self._sync_device()
        return self.pte_pool.rho(name)

    def _settled(self, name: str) -> Thoughts | None:
        thoughts = self.pte_pool.thoughts(name)
        if thoughts is not None:
            self._sync_device()  # its copies to the host have arrived
        return thoughts

    def pte_check_integrity(self) -> dict[str, int]:
        """Counts of what is in use.

        Raises:
            AssertionError: if slots, sequences and requests disagree.
        """
        self.pte_pool.check_integrity()
        strangers = set(self.pte_pool.sequences) - self._known_requests()
        assert not strangers, f"sequences without a request: {sorted(strangers)[:5]}"
        assert not self.pte_report.errors, self.pte_report.errors
        used = [s for s in self.pte_pool.sequences.values() if s.slot != IDENTITY_SLOT]
        return {
            "sequences": len(self.pte_pool.sequences),
            "slots_in_use": len(used),
            "snapshots": len(self.pte_snapshots),
            "free_blocks": self.pte_report.free_blocks,
            "usable_blocks": self.pte_report.usable_blocks,
        }
