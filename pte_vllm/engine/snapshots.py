"""Where a request can take up an earlier one: which thought states the worker keeps, and why.

After a fold the thought state is a function of the tokens folded so far, the plan, the adapter and
the rule, and so is every later block of the KV cache. vLLM's hash of a block covers the tokens up
to its end, the adapter's name and path and a salt (rules that a request chose have one each);
hashed once more with the plan, and the adapter's number, which is another after a reload, it names
such a block, or the state after folding it, and equals no plain hash.

Blocks of kept tokens are named by the state that they go with and by the run that chose them: two
runs of the same tokens may differ in what they kept, as near ties are decided by rounding.

The scheduler owns the index and gives the orders; the worker stores what it is told. Blocks of a
sequence are named when it ends, so running sequences pay nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from pte_vllm.engine.messages import SnapshotOrders
from pte_vllm.method.blocks import HeldBlocks

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.request import Request

    from pte_vllm.engine.cache import PTEManager
    from pte_vllm.method.plan import FoldPlan


def derived_hash(request: Request, plan: FoldPlan, block: int, probes: bytes = b"") -> BlockHash:
    """Name a block at or after `first_fold`, or the state once that block is folded.

    Args:
        request: A request whose tokens reach that far.
        plan: How it folds.
        block: The number of the block in the sequence.
        probes: What names the engine's probes.
    """
    lora = request.lora_request
    numbers = struct.pack(
        "<4q",
        plan.pinned_blocks,
        plan.window_blocks,
        plan.evict_blocks,
        lora.lora_int_id if lora is not None else 0,
    )
    if plan.evict != "oldest":
        numbers += struct.pack("<6sq", plan.evict.encode(), plan.evict_seed)
    if plan.keep_blocks:
        score = plan.keep_score.encode()
        numbers += struct.pack("<q8sq", plan.keep_blocks, score, plan.evict_seed) + probes
    end = (block + 1) * plan.block_size
    for first, last in plan.pin_spans:
        if first < end:  # what begins later changes nothing here
            numbers += struct.pack("<2q", first, min(last, end))
    name = hashlib.sha256(b"pte" + numbers + request.block_hashes[block]).digest()
    return cast("BlockHash", name)


class SnapshotIndex:
    """Thought states of ended sequences that the worker has, the longest unused leaving first.

    Args:
        manager: The manager of the blocks; without prefix caching nothing is ever kept.
        capacity: The most states to keep.
        probes: What names the engine's probes, where it has some.
    """

    def __init__(self, manager: PTEManager, capacity: int, probes: bytes = b"") -> None:
        self._manager = manager
        self._probes = probes
        self._capacity = capacity if manager.enable_caching else 0
        self._states: OrderedDict[bytes, int] = OrderedDict()  # and the run that it is of
        self._runs = 0
        self._ended: dict[str, bytes] = {}
        self._forget: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._states)

    def end(self, request: Request) -> None:
        """Keep the state of a sequence that ends, and name its blocks, before they are freed."""
        plan = self._manager.plans[request.request_id]
        # The worker has folded for the last chunk it was given, also one still under way.
        folded = plan.folded_blocks(max(0, request.num_computed_tokens - 1))
        if not self._capacity or not folded:
            return
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        selected = _selected(plan, folded)
        self._name_blocks(request, plan, min(processed, request.num_tokens), selected=selected)
        key = self._state_key(request, plan, folded)
        run = self._name_kept(request, plan, key) if selected else 0
        if run is None:  # it kept what it took up, whose state is here already, or gone for good
            if key in self._states:
                self._states.move_to_end(key)
            return
        self._states[key] = run
        self._states.move_to_end(key)
        self._ended[request.request_id] = key
        self._forget.discard(key)
        while len(self._states) > self._capacity:
            self._forget.add(self._states.popitem(last=False)[0])

    def find(
        self, request: Request, plan: FoldPlan, prefix: list[KVCacheBlock]
    ) -> tuple[list[KVCacheBlock], int] | None:
        """Find where a request can take up an earlier one past its first fold.

        Args:
            request: A request that has not run yet.
            plan: How the request folds.
            prefix: The blocks of its plain prefix hit.

        Returns:
            Its blocks, null in the gap, and the tokens they stand for; None if there is no state
            or a block of its window is gone.
        """
        longest = request.num_tokens - 1  # one token must be computed
        if not self._states or longest < plan.first_fold or len(prefix) < plan.pinned_blocks:
            return None
        for folded in range(plan.folded_blocks(longest), 0, -plan.evict_blocks):
            key = self._state_key(request, plan, folded)
            if key not in self._states:
                continue
            # The state serves tokens [start, end); a hit that ended at `end` would owe a fold.
            start = self._boundary(plan, folded)
            before_next = plan.next_boundary(start * plan.block_size) // plan.block_size - 1
            end = min(longest // plan.block_size, before_next)
            kept: dict[int, KVCacheBlock] = {}
            if _selected(plan, folded):
                found = self._find_kept(plan, key)
                if found is None:
                    continue
                kept = dict(zip(plan.kept_places, found, strict=True))
            blocks = prefix[: plan.pinned_blocks]
            for first, last in HeldBlocks(plan, folded // plan.evict_blocks).spans:
                first = max(first, min(len(blocks), last))
                gap = [self._manager.block_pool.null_block] * (first - len(blocks))
                window = self._cached(request, plan, range(first, min(last, end)), kept)
                blocks = [*blocks, *gap, *window]
                if len(blocks) < min(last, end):
                    break
            if len(blocks) >= start:
                return blocks, len(blocks) * plan.block_size
        return None

    def orders(self, new: Iterable[tuple[Request, int]]) -> SnapshotOrders:
        """Return what the worker has to do in this step, and begin the next step's list.

        Args:
            new: The requests that are scheduled for the first time, and their computed tokens.
        """
        restore = {}
        for request, num_computed in new:
            plan = self._manager.plans[request.request_id]
            folded = plan.folded_blocks(num_computed)
            if folded:
                key = self._state_key(request, plan, folded)
                restore[request.request_id] = key
                if key in self._states:
                    self._states.move_to_end(key)
        orders = SnapshotOrders(keep=self._ended, restore=restore, forget=tuple(self._forget))
        self._ended, self._forget = {}, set()
        return orders

    def clear(self) -> None:
        """Forget everything: the blocks of the pool have lost their names."""
        self._forget.update(self._states)
        self._states.clear()

    def _boundary(self, plan: FoldPlan, folded: int) -> int:
        """Return the first block after the fold that made it `folded` blocks."""
        return plan.fold_at(folded // plan.evict_blocks - 1) // plan.block_size

    def _state_key(self, request: Request, plan: FoldPlan, folded: int) -> bytes:
        # What is drawn may lie anywhere before the boundary, and so may what later questions leave.
        in_order = plan.evict == "oldest" and not plan.pin_spans
        end = plan.pinned_blocks + folded if in_order else self._boundary(plan, folded)
        return derived_hash(request, plan, end - 1, self._probes)

    def _name_blocks(
        self, request: Request, plan: FoldPlan, num_tokens: int, *, selected: bool
    ) -> None:
        """Name the blocks past `first_fold` of a sequence that ends, those that it still holds."""
        first = max(
            plan.first_fold // plan.block_size,
            self._manager.num_cached_block.get(request.request_id, 0),
        )
        last = num_tokens // plan.block_size
        pool = self._manager.block_pool
        if first >= last or pool.enable_kv_cache_events:
            return  # events would tell others of blocks under names they do not know
        blocks = list(self._manager.req_to_blocks[request.request_id])
        if selected:  # what lies there are kept tokens, which have names of their own
            for place in plan.kept_places:
                blocks[place] = pool.null_block
        names = [
            b"" if blocks[i].is_null else derived_hash(request, plan, i, self._probes)
            for i in range(first, last)
        ]
        pool.cache_full_blocks(
            request=cast("Request", SimpleNamespace(block_hashes=[*[b""] * first, *names])),
            blocks=blocks,
            num_cached_blocks=first,
            num_full_blocks=last,
            block_size=plan.block_size,
            kv_cache_group_id=self._manager.kv_cache_group_id,
        )

    def _name_kept(self, request: Request, plan: FoldPlan, key: bytes) -> int | None:
        """Name the blocks of kept tokens of a sequence that ends, as they go with a state.

        Returns:
            The run that names them; None where they keep the names of an earlier run's, which the
            sequence took up and has not written into.
        """
        own = [self._manager.req_to_blocks[request.request_id][i] for i in plan.kept_places]
        pool = self._manager.block_pool
        if pool.enable_kv_cache_events or any(block.block_hash is not None for block in own):
            return None
        self._runs += 1
        names = [_kept_name(key, self._runs, i) for i in range(len(own))]
        pool.cache_full_blocks(
            request=cast("Request", SimpleNamespace(block_hashes=names)),
            blocks=own,
            num_cached_blocks=0,
            num_full_blocks=len(own),
            block_size=plan.block_size,
            kv_cache_group_id=self._manager.kv_cache_group_id,
        )
        return self._runs

    def _find_kept(self, plan: FoldPlan, key: bytes) -> list[KVCacheBlock] | None:
        """Return the blocks of kept tokens that go with a state, all of one run; None without."""
        found: list[KVCacheBlock] = []
        for i in range(plan.keep_blocks):
            name = _kept_name(key, self._states[key], i)
            hit = self._manager.block_pool.get_cached_block(name, [self._manager.kv_cache_group_id])
            if hit is None:
                return None
            found += hit
        return found

    def _cached(
        self, request: Request, plan: FoldPlan, places: range, kept: dict[int, KVCacheBlock]
    ) -> list[KVCacheBlock]:
        """Return the blocks of these places, up to the first that is gone; `kept` has some."""
        found: list[KVCacheBlock] = []
        for i in places:
            if i in kept:
                found.append(kept[i])
                continue
            past = i * plan.block_size >= plan.first_fold
            name = derived_hash(request, plan, i, self._probes) if past else request.block_hashes[i]
            hit = self._manager.block_pool.get_cached_block(name, [self._manager.kv_cache_group_id])
            if hit is None:
                break
            found += hit
        return found


def _selected(plan: FoldPlan, folded: int) -> bool:
    """Return whether the last of the folds behind these blocks chose what is kept."""
    return folded > 0 and plan.selects(folded // plan.evict_blocks - 1)


def _kept_name(key: bytes, run: int, place: int) -> BlockHash:
    numbers = struct.pack("<2q", run, place)
    return cast("BlockHash", hashlib.sha256(b"kept" + key + numbers).digest())
