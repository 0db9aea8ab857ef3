"""Thought states as the API shows them, and those of finished requests, kept for a while.

Shapes: L layers with a state, `state: [L, G, r]` as tokens read it, in fp32 or bf16.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pte_vllm.engine.request_ids import find_id
from pte_vllm.method.blocks import HeldBlocks
from pte_vllm.method.plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """A request's thought state at some moment; its tensors may still be on their way to the host.

    Whoever reads `state`, `rho` or `survivals` waits for the device first.
    """

    request_id: str
    finished: bool
    plan: FoldPlan
    adapter: str | None
    rule: str | None
    """The update rule; None where the request has no thought state."""
    num_tokens: int
    folded_blocks: int
    held_blocks: int
    peak_blocks: int
    state_bytes: int = 0
    """The memory that its state took while it ran, with what its rule keeps between folds."""
    layers: tuple[int, ...] = ()
    """Indices of the decoder layers that have a state."""
    features: str | None = None
    read: str | None = None
    """How A x meets `state`, with `features`, both the adapter's; None without a state."""
    state: Tensor | None = None
    ended_s: float | None = None
    """When it finished, in Unix time."""
    rho: Tensor | None = None  # [folds] mean over layers of ‖ΔS‖ / ‖S‖
    survivals: tuple[Tensor | None, ...] = ()
    """Of the folds of a request that keeps tokens, as `FoldingSequence` has them: on the host."""

    @property
    def folds(self) -> int:
        """The number of folds so far."""
        return self.folded_blocks // self.plan.evict_blocks

    @property
    def num_bytes(self) -> int:
        """The memory that `state` and `survivals` take here, in bytes."""
        tensors = (self.state, *self.survivals)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def kept(self) -> Thoughts:
        """Return a copy on the host, in memory of its own, without waiting for the device."""
        state, rho = (None if t is None else to_host(t) for t in (self.state, self.rho))
        return replace(self, finished=True, ended_s=time.time(), state=state, rho=rho)

    def without_state(self) -> Thoughts:
        """Return the same without the state and what was kept, to be remembered longer."""
        return replace(self, state=None, survivals=())

    def rho_list(self) -> list[float]:
        """Return ρ of each fold as plain numbers; empty without a thought state."""
        return [] if self.rho is None else self.rho.tolist()

    def report(self) -> dict[str, Any]:
        """Return a line of `GET /pte/v1/requests`; this reads no tensor."""
        return {
            "request_id": self.request_id,
            "adapter": self.adapter,
            "rule": self.rule,
            "num_tokens": self.num_tokens,
            "pinned_blocks": self.plan.pinned_blocks,
            "window_blocks": self.plan.window_blocks,
            "folds": self.folds,
            "folded_tokens": self.folded_blocks * self.plan.block_size,
            "held_blocks": self.held_blocks,
            "peak_blocks": self.peak_blocks,
            "state_bytes": self.state_bytes,
            **({"ended_s": self.ended_s} if self.ended_s is not None else {}),
            **({"keep_tokens": self.plan.keep_tokens} if self.plan.keep_tokens else {}),
            **({"pin_spans": self.plan.pin_spans} if self.plan.pin_spans else {}),
        }

    def summary(self, name: str) -> dict[str, Any]:
        """Return the JSON of `GET /pte/v1/thoughts/{name}`."""
        norms = [] if self.state is None else self.state.float().flatten(-2).norm(dim=-1).tolist()
        return {
            "id": name,
            "status": "finished" if self.finished else "running",
            "adapter": self.adapter,
            "rule": self.rule,
            "num_tokens": self.num_tokens,
            "pin_tokens": self.plan.pin_tokens,
            "window_tokens": self.plan.window_tokens,
            **({"pin_spans": self.plan.pin_spans} if self.plan.pin_spans else {}),
            **self._choices(),
            "folds": self.folds,
            "folded_tokens": self.folded_blocks * self.plan.block_size,
            "held_blocks": self.held_blocks,
            "layers": [
                {"layer": layer, "norm": norm}
                for layer, norm in zip(self.layers, norms, strict=True)
            ],
            "rho": self.rho_list(),
        }

    def _choices(self) -> dict[str, Any]:
        """Return how blocks are drawn and tokens kept; nothing where the oldest leave for good."""
        plan, said = self.plan, dict[str, Any]()
        if plan.evict != "oldest":
            said |= {"evict": plan.evict, "evict_seed": plan.evict_seed}
        if plan.keep_tokens:
            said |= {"keep_tokens": plan.keep_tokens, "keep_score": plan.keep_score}
        return said

    def safetensors(self) -> bytes | None:
        """Return `state` as a file whose metadata says how to read it; None without a state.

        It is in fp32 there, whatever it is in here.
        """
        if self.state is None:
            return None
        metadata = {
            "layers": json.dumps(self.layers),
            "adapter": self.adapter or "",
            "rule": self.rule or "",
            "features": self.features or "",
            "read": self.read or "",
            "num_tokens": str(self.num_tokens),
            "folds": str(self.folds),
        }
        return save({"state": self.state.cpu().float().contiguous()}, metadata)

    def kept_folds(self) -> dict[str, Any]:
        """Return what `GET /pte/v1/thoughts/{name}/kept` says beside the record of the folds."""
        return {
            "request_id": self.request_id,
            "status": "finished" if self.finished else "running",
            "num_tokens": self.num_tokens,
            "folds": len(self.survivals),
            "plan": asdict(self.plan),
        }

    def events(self, since: int) -> list[dict[str, Any]]:
        """Return the folds after the first `since`; their `rho` is null without a thought state."""
        plan, rho = self.plan, self.rho_list()
        if since >= self.folds:
            return []
        held = HeldBlocks(plan, since)
        events = []
        for i in range(since, self.folds):
            spans = [list(span) for span in held.fold_to(i + 1)]
            events.append(
                {
                    "fold": i + 1,
                    "at": plan.fold_at(i),
                    **({"blocks": spans[0]} if len(spans) == 1 else {"spans": spans}),
                    "rho": rho[i] if i < len(rho) else None,
                    "num_tokens": self.num_tokens,
                }
            )
        return events


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; the copy is complete once the device has been waited for."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    # Into pinned memory, so that the copy waits for nothing.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class ThoughtStore:
    """Thoughts of finished requests, the oldest leaving when there are too many.

    Args:
        max_count: The most requests to keep.
        max_bytes: The most memory for their states and for what they kept.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self.max_count, self.max_bytes = max_count, max_bytes
        self._kept: OrderedDict[str, Thoughts] = OrderedDict()
        self._num_bytes = 0

    def add(self, thoughts: Thoughts) -> None:
        """Keep the thoughts of a request that has finished, in place of any of the same id."""
        self.forget(thoughts.request_id)
        self._kept[thoughts.request_id] = thoughts
        self._num_bytes += thoughts.num_bytes
        while len(self._kept) > self.max_count or self._num_bytes > self.max_bytes:
            self.forget(next(iter(self._kept)))

    def find(self, name: str) -> Thoughts | None:
        """Return the thoughts of the newest finished request that is called `name`, or None."""
        request_id = find_id(name, self._kept)
        return None if request_id is None else self._kept[request_id]

    def forget(self, request_id: str) -> None:
        """Drop the thoughts of a request; does nothing if they are not kept."""
        thoughts = self._kept.pop(request_id, None)
        if thoughts is not None:
            self._num_bytes -= thoughts.num_bytes
