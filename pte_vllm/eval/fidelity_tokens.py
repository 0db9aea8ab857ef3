"""What was measured of each token, and its means with their errors.

Tokens of one answer are alike, so an error is that of a mean over answers: the spread of the mean
when answers are drawn again, with replacement, from those that were measured (a bootstrap by
sequence). Differences and shares are taken within each draw, so that what all arms find hard in an
answer cancels.

Shapes: M tokens of S sequences; R draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class ArmTokens:
    """What one arm makes of the tokens, in nats."""

    losses: Array  # [M] −log p of the token
    kls: Array  # [M] KL(full ‖ arm), or a lower bound of it
    same_top: Array  # [M] bool: its most probable token is full attention's
    own: Array  # [M] bool: the token is predicted after the arm's own first fold


@dataclass(kw_only=True)
class MeasuredTokens:
    """The same tokens for all arms."""

    sequence: Array  # [M] int: which answer, from 0
    distance: Array  # [M] int: tokens since the first fold of the smallest window, from 0
    losses_full: Array  # [M] −log p under full attention
    kl_is_bound: bool = False
    """Whether `kls` are lower bounds, as a server's are."""
    arms: dict[str, ArmTokens] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; NaN where there is nothing to take it of."""

    value: float
    error: float

    def as_json(self) -> list[float | None]:
        """Return both as JSON knows them."""
        return [x if math.isfinite(x) else None for x in (self.value, self.error)]


class Answers:
    """Takes means over tokens, with errors by answer; the draws are the same for all of them.

    Args:
        sequence: `[M]` which answer each token is of, from 0.
    """

    def __init__(self, sequence: Array, *, seed: int = 0) -> None:
        self._sequence = sequence
        self._size = int(sequence.max()) + 1
        generator = np.random.default_rng(seed)
        # [1 + R, S] how often each answer is drawn; the first row is what was measured.
        drawn = generator.multinomial(self._size, np.full(self._size, 1 / self._size), size=DRAWS)
        self._weights = np.vstack([np.ones(self._size), drawn])

    def sums(self, values: Array) -> Array:
        """Return sums over the tokens of each answer, `[S]`, of values `[M]`."""
        found: Array = np.bincount(self._sequence, weights=values, minlength=self._size)
        return found

    def mean(self, values: Array, among: Array | None = None) -> Estimate:
        """Return the mean of values `[M]`, over all tokens or those that `among` marks."""
        marked = np.ones(len(values)) if among is None else among.astype(float)
        return self._ratio(values * marked, marked)

    def share(self, part: Array, whole: Array) -> Estimate:
        """Return the sum of `part` as a share of that of `whole`, each `[M]`."""
        return self._ratio(part, whole)

    def by_answer(self, values: Array) -> list[float]:
        """Return the mean of each answer, `[S]`."""
        means: list[float] = (self.sums(values) / self.sums(np.ones(len(values)))).tolist()
        return means

    def _ratio(self, above: Array, below: Array) -> Estimate:
        tops, bottoms = (self._weights @ self.sums(x) for x in (above, below))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = tops / bottoms
        value, drawn = float(found[0]), found[1:][np.isfinite(found[1:])]
        error = float(drawn.std()) if self._size > 1 and len(drawn) > 1 else math.nan
        return Estimate(value if math.isfinite(value) else math.nan, error)
