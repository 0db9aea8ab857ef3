"""What the API server asks of a worker, through vLLM's `collective_rpc`, by name of the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pte_vllm.engine.failures import with_failures
from pte_vllm.engine.kept_records import to_record
from pte_vllm.engine.sequences import IDENTITY_SLOT
from pte_vllm.engine.thoughts import Thoughts
from pte_vllm.method.kept_record import KeptRecord

if TYPE_CHECKING:
    from pte_vllm.engine.runner_base import PTERunnerMixin


class QueriesMixin:
    """A mixin over vLLM's workers; the answers come from the worker's PTE model runner."""

    model_runner: PTERunnerMixin

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_failures(super().execute_model(*args, **kwargs))  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_failures(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _with_failures(self, output: Any) -> Any:
        """Tell the scheduler what failed in the step of this output."""
        if output is None:
            return None
        manager = getattr(self.model_runner, "lora_manager", None)
        adapters = manager.take_failed() if manager is not None else {}
        return with_failures(output, adapters, self.model_runner.pte_take_check())

    def pte_requests(self) -> dict[str, Any]:
        """Return running and recently finished requests, and the pool as of the last step."""
        pool, report = self.model_runner.pte_pool, self.model_runner.pte_report
        return {
            "block_size": self.model_runner.pte_block_size,
            "usable_blocks": report.usable_blocks,
            "free_blocks": report.free_blocks,
            "adapters_in_use": list(report.adapters),
            "running": pool.reports(),
            "finished": [t.report() for t in list(pool.finished)[-pool.SHOWN_FINISHED :]],
        }

    def pte_counters(self) -> dict[str, Any]:
        """Return counts since the start and slots in use, for `/metrics`."""
        pool = self.model_runner.pte_pool
        slots = pool.states.shape[1] - 1  # slot 0 belongs to nobody
        in_use = slots - len(pool.free_slots)
        return {**pool.counters.snapshot(), "slots": slots, "slots_in_use": in_use}

    def pte_thoughts(self, name: str) -> dict[str, Any] | None:
        """Return a summary of the request that a client calls `name`; None if it is unknown."""
        thoughts = self._settled(name)
        return None if thoughts is None else thoughts.summary(name)

    def pte_thoughts_file(self, name: str) -> tuple[bool, bytes | None]:
        """Return whether the request is known, and its state as safetensors if it has one."""
        thoughts = self._settled(name)
        return thoughts is not None, None if thoughts is None else thoughts.safetensors()

    def pte_thoughts_forget(self, name: str) -> str | None:
        """Forget a finished request; return `forgotten`, `running`, or None if it is unknown."""
        pool = self.model_runner.pte_pool
        thoughts = pool.thoughts(name, with_state=False)
        if thoughts is None:
            return None
        if not thoughts.finished:
            return "running"
        pool.store.forget(thoughts.request_id)
        return "forgotten"

    def pte_fold_events(self, name: str, since: int) -> dict[str, Any] | None:
        """Return a request's folds after the first `since`; the engine's id, for the next call."""
        thoughts = self._settled(name, with_state=False)
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

    def pte_rho(self, names: list[str]) -> list[list[float] | None]:
        """Return ρ of each fold of each request, running or finished lately; None if unknown.

        The device is waited for once, whatever their number.
        """
        self.model_runner._sync_device()
        return [self.model_runner.pte_pool.rho(name) for name in names]

    def pte_kept(self, names: list[str]) -> list[KeptRecord | None]:
        """Return what each request kept, of those that asked for it and have ended; each once.

        The device is waited for once, whatever their number.
        """
        self.model_runner._sync_device()
        return self._of_all_heads([self.model_runner.pte_pool.take_kept(name) for name in names])

    def _of_all_heads(self, records: list[KeptRecord | None]) -> list[KeptRecord | None]:
        """Gather the records of the KV heads that lie here, and of those on other ranks."""
        runner = self.model_runner
        return runner.pte_ranks.gather_records(records, len(runner.pte_kept.caches))

    def pte_kept_folds(self, name: str, folds: int | None) -> dict[str, Any] | None:
        """Return what the first folds of a request kept; None if the request is unknown.

        Unlike `pte_kept` it tells this of every request that keeps tokens, and again and again.
        """
        thoughts = self._settled(name, with_state=False)
        if thoughts is None:
            return None
        (record,) = self._of_all_heads([to_record(thoughts.survivals[:folds])])
        return {**thoughts.kept_folds(), "record": record}

    def _settled(self, name: str, *, with_state: bool = True) -> Thoughts | None:
        thoughts = self.model_runner.pte_pool.thoughts(name, with_state=with_state)
        if thoughts is not None:
            self.model_runner._sync_device()  # its copies to the host have arrived
        return thoughts

    def pte_check_integrity(self) -> dict[str, int]:
        """Check the worker's books, and return counts of what is in use.

        Raises:
            AssertionError: If slots, sequences and requests disagree.
        """
        runner = self.model_runner
        pool, report = runner.pte_pool, runner.pte_report
        pool.check_integrity()
        strangers = set(pool.sequences) - runner.pte_known_requests()
        assert not strangers, f"sequences without a request: {sorted(strangers)[:5]}"
        assert not report.errors, report.errors
        used = [s for s in pool.sequences.values() if s.slot != IDENTITY_SLOT]
        return {
            "sequences": len(pool.sequences),
            "slots_in_use": len(used),
            "snapshots": len(runner.pte_snapshots),
            "free_blocks": report.free_blocks,
            "usable_blocks": report.usable_blocks,
        }
