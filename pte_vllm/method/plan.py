"""FoldPlan: when a sequence folds which blocks, as a pure function of position.

The scheduler, the cache manager, the attention metadata, the folding code and the replay all ask
this one class, so they can never disagree; `blocks.py` adds up its folds. Token positions count
from 0 over the whole sequence; every interval is half-open.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pte_vllm.method.names import EVICTS, KEEP_SCORES, Evict, KeepScore
from pte_vllm.method.spans import UNBOUNDED, Spans, blocks_of
from pte_vllm.method.turns import TurnFolds, blocks_around, turn_folds


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """How one sequence evicts: what is pinned, how large its window is, how much a fold frees.

    With `evict` `oldest` the token at position `pos` attends to `[0, pinned_blocks * bs)` and to
    `[(pinned_blocks + folded_blocks(pos)) * bs, pos]`; the thought state holds what lies between.
    With `random` as many blocks leave at the same positions, but which ones is drawn. With
    `keep_tokens` some of what has left stays after all, per KV head (`method.keep`), in blocks
    between the pinned ones and the window. With `pin_spans` the sequence is a conversation, whose
    newest question is pinned beside the first (`turns.py`). What follows from the fields alone is
    computed once: every step asks for it, of every sequence.

    Raises:
        ValueError: If a value is out of range; the message names the option.
    """

    pin_tokens: int
    """Tokens at the start that are never evicted: the question."""
    window_tokens: int
    """KV room for thoughts, in tokens, a multiple of `block_size`; 0 keeps everything."""
    evict_ratio: float = 0.25
    """Part of the window that one fold frees, in (0, 1)."""
    block_size: int
    """Tokens in one block of the KV cache."""
    evict: Evict = "oldest"
    """Which blocks of a full window leave: the oldest, or some that are drawn at random."""
    evict_seed: int = 0
    """What the draws depend on beside the number of the fold, in [0, 2**63); where the blocks that
    leave or the tokens that stay are drawn."""
    keep_tokens: int = 0
    """How many evicted tokens each KV head keeps, a multiple of `block_size`; 0 keeps none."""
    keep_score: KeepScore = "expected"
    """By which score of `method.keep` they are chosen."""
    pin_spans: Spans = ()
    """Tokens of later questions, each pinned from its start until the next one begins."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")
        if self.pin_tokens < 0:
            raise ValueError(f"pin_tokens must not be negative, got {self.pin_tokens}")
        if self.window_tokens % self.block_size or self.window_tokens < 0:
            raise ValueError(
                f"window of {self.window_tokens} tokens is not a multiple of the KV cache's block "
                f"size, {self.block_size}"
            )
        if self.bounded and self.window_blocks < 2:
            raise ValueError(
                f"window of {self.window_tokens} tokens is less than two blocks of "
                f"{self.block_size} tokens"
            )
        if not 0.0 < self.evict_ratio < 1.0:
            raise ValueError(f"evict ratio must lie in (0, 1), got {self.evict_ratio}")
        if self.evict not in EVICTS:
            raise ValueError(f"evict must be one of {', '.join(EVICTS)}, got {self.evict!r}")
        if self.evict != "oldest" and not self.bounded:
            raise ValueError(f"evict {self.evict} needs a window, and full attention has none")
        if self.evict_seed and "random" not in (self.evict, self.keep_score):
            raise ValueError(
                f"evict seed {self.evict_seed} needs evict random or keep score random"
            )
        if not 0 <= self.evict_seed < 2**63:
            raise ValueError(f"evict seed must lie in [0, 2**63), got {self.evict_seed}")
        self._check_keep()
        if self.pin_spans:
            self._check_pin_spans()

    def _check_pin_spans(self) -> None:
        if not self.bounded:
            raise ValueError("pin spans need a window: full attention evicts nothing")
        if self.evict != "oldest":
            raise ValueError(f"pin spans need evict oldest, got {self.evict}")
        before = self.pin_tokens
        for first, end in self.pin_spans:
            if not before <= first < end:
                raise ValueError(
                    f"pin spans must be ranges [start, end) in order, past the {self.pin_tokens} "
                    f"tokens that are pinned anyway; [{first}, {end}) is empty or begins too early"
                )
            before = end

    def _check_keep(self) -> None:
        if self.keep_score not in KEEP_SCORES:
            raise ValueError(
                f"keep score must be one of {', '.join(KEEP_SCORES)}, got {self.keep_score!r}"
            )
        if not self.keep_tokens:
            return
        if self.keep_tokens % self.block_size or self.keep_tokens < 0:
            raise ValueError(
                f"keep of {self.keep_tokens} tokens is not a multiple of the KV cache's block "
                f"size, {self.block_size}"
            )
        if not self.bounded:
            raise ValueError("keep needs a window: full attention evicts nothing")
        if self.evict != "oldest":
            raise ValueError(f"keep needs evict oldest, got {self.evict}")

    @cached_property
    def bounded(self) -> bool:
        """Whether the sequence ever folds."""
        return self.window_tokens > 0

    @cached_property
    def pinned_blocks(self) -> int:
        """The number of blocks that are never evicted; the last one may hold a few thoughts."""
        return -(-self.pin_tokens // self.block_size)

    @cached_property
    def window_blocks(self) -> int:
        """The number of blocks of the window."""
        return self.window_tokens // self.block_size

    @cached_property
    def evict_blocks(self) -> int:
        """The number of blocks that one fold frees."""
        return max(1, round(self.evict_ratio * self.window_blocks))

    @cached_property
    def keep_blocks(self) -> int:
        """The number of blocks that hold what is kept, once there is enough of it."""
        return self.keep_tokens // self.block_size

    @cached_property
    def first_fold(self) -> int:
        """The position of the first token that is computed after a fold."""
        if not self.bounded:
            return UNBOUNDED
        if self.turns is not None:
            return self.turns.position(0, self.stride)
        return (self.pinned_blocks + self.window_blocks) * self.block_size

    @cached_property
    def turns(self) -> TurnFolds | None:
        """The folds of a plan with later questions; None of one without."""
        if not self.pin_spans:
            return None
        return turn_folds(
            self.pin_spans,
            pinned_blocks=self.pinned_blocks,
            window_blocks=self.window_blocks,
            evict_blocks=self.evict_blocks,
            block_size=self.block_size,
        )

    @cached_property
    def most_pinned_blocks(self) -> int:
        """The most blocks that are pinned at once: the first ones and those of one question."""
        spans = (blocks_around(span, self.block_size) for span in self.pin_spans)
        return self.pinned_blocks + max((end - first for first, end in spans), default=0)

    @cached_property
    def stride(self) -> int:
        """The number of tokens between two folds, which is also what one fold encodes."""
        return self.evict_blocks * self.block_size

    def folds(self, pos: int) -> int:
        """Return the number of folds before the token at `pos` is computed."""
        if pos < self.first_fold:
            return 0
        if self.turns is not None:
            return self.turns.count(pos, self.stride)
        return 1 + (pos - self.first_fold) // self.stride

    def folded_blocks(self, pos: int) -> int:
        """Return the number of blocks folded before the token at `pos` is computed."""
        return self.evict_blocks * self.folds(pos)

    def kept_blocks(self, folds: int) -> int:
        """Return the number of blocks that hold kept tokens after that many folds."""
        return min(self.keep_blocks, folds * self.evict_blocks)

    def fold_at(self, fold: int) -> int:
        """Return the position of the first token after a fold, counted from 0."""
        if self.turns is not None:
            return self.turns.position(fold, self.stride)
        return self.first_fold + fold * self.stride

    def oldest(self, fold: int) -> Spans:
        """Return which blocks leave at a fold of a plan that evicts the oldest."""
        if self.turns is not None:
            return self.turns.leaving(fold, self.evict_blocks)
        first = self.pinned_blocks + fold * self.evict_blocks
        return ((first, first + self.evict_blocks),)

    @cached_property
    def kept_places(self) -> tuple[int, ...]:
        """The blocks in whose places kept tokens lie: the first `keep_blocks` that leave."""
        if self.turns is None:
            return tuple(range(self.pinned_blocks, self.pinned_blocks + self.keep_blocks))
        folds = -(-self.keep_blocks // self.evict_blocks)
        gone = [block for fold in range(folds) for block in blocks_of(self.oldest(fold))]
        return tuple(gone[: self.keep_blocks])

    def selects(self, fold: int) -> bool:
        """Return whether a fold, counted from 0, has more candidates than it may keep.

        Those before it keep all that leaves the window, block by block as it is.
        """
        return 0 < self.keep_blocks < (fold + 1) * self.evict_blocks

    def next_boundary(self, pos: int) -> int:
        """Return the first boundary after `pos`, past which no chunk from `pos` may go."""
        if pos < self.first_fold:
            return self.first_fold
        if self.turns is not None:
            return self.fold_at(self.folds(pos))
        return self.first_fold + ((pos - self.first_fold) // self.stride + 1) * self.stride

    def is_boundary(self, pos: int) -> bool:
        """Return whether a fold comes right before the token at `pos`."""
        if pos >= self.first_fold and self.turns is not None:
            return self.fold_at(self.folds(pos) - 1) == pos
        return pos >= self.first_fold and (pos - self.first_fold) % self.stride == 0

    def held_blocks(self, pos: int) -> int:
        """Return how many blocks the token at `pos` needs in the cache, its own included."""
        folds = self.folds(pos)
        left_out = self.evict_blocks * folds - self.kept_blocks(folds)
        return pos // self.block_size + 1 - left_out

    def peak_blocks(self, num_tokens: int) -> int:
        """Return the most blocks a sequence of `num_tokens` holds, one to spare to run ahead."""
        blocks = -(-num_tokens // self.block_size)
        if not self.bounded:
            return blocks
        return min(blocks, self.most_pinned_blocks + self.keep_blocks + self.window_blocks + 1)

    def leaving(self, fold: int) -> tuple[int, ...]:
        """Return which blocks of the full window leave at a fold, ascending.

        Blocks are counted within the window, which is full: 0 is the oldest thought that is still
        held, `window_blocks - 1` the newest block. Folds count from 0. A draw takes any blocks but
        the newest, which holds the token just computed; where a fold empties the window it leaves
        too. A draw depends on `evict_seed`, `fold` and the two sizes, and on nothing that was drawn
        before: so it is the same in every process, and in every run.
        """
        if self.evict == "oldest":
            return tuple(range(self.evict_blocks))
        candidates = max(self.window_blocks - 1, self.evict_blocks)
        digest = hashlib.shake_256(f"pte_evict/{self.evict_seed}/{fold}".encode())
        numbers = struct.unpack(f">{candidates}Q", digest.digest(8 * candidates))
        by_number = sorted(range(candidates), key=numbers.__getitem__)
        return tuple(sorted(by_number[: self.evict_blocks]))

    def segments(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Split `[0, num_tokens)` at the boundaries into half-open intervals, in order."""
        start = 0
        while start < num_tokens:
            end = min(self.next_boundary(start), num_tokens)
            yield start, end
            start = end
