"""Puts together what is measured batch by batch, whoever measures it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console

from pte_vllm.eval.fidelity_arms import FidelityArm
from pte_vllm.eval.fidelity_tokens import ArmTokens, Array, MeasuredTokens
from pte_vllm.train.distill.examples import Example
from pte_vllm.train.run.log import ProgressBar

OnDone = Callable[[str], None]
"""Hears the name of each part that is done: full attention, or an arm, on one batch."""


class Parts:
    """Collects what is measured of the arms; arms that do the same are measured once."""

    def __init__(self, arms: Sequence[FidelityArm]) -> None:
        self._arms = arms
        self.different = list({arm.does: arm for arm in reversed(arms)}.values())[::-1]
        """The arms without those that do the same as an earlier one."""
        self._sequence: list[Array] = []
        self._distance: list[Array] = []
        self._full: list[Array] = []
        self._own: dict[str, list[Array]] = {arm.name: [] for arm in arms}
        self._found: dict[tuple[Any, ...], list[dict[str, Array]]] = {
            arm.does: [] for arm in self.different
        }

    def place(self, chosen: Sequence[Example], rows: Array, tokens: Array, *, first: int) -> None:
        """Say where the tokens of a batch are: `rows` `[m]` of `chosen`, `tokens` `[m]` of each."""
        starts = np.array([example.plan.first_fold + 1 for example in chosen])
        self._sequence.append(rows + first)
        self._distance.append(tokens - starts[rows])
        for arm in self._arms:
            pins = [example.plan.pin_tokens for example in chosen]
            own = np.array([arm.plan(pin).first_fold + 1 for pin in pins])
            self._own[arm.name].append(tokens >= own[rows])

    def add_full(self, losses: Array) -> None:
        """Add −log p `[m]` of the batch's tokens under full attention."""
        self._full.append(losses)

    def add(self, arm: FidelityArm, **values: Array) -> None:
        """Add what an arm makes of them: `losses`, `kls` and `same_top`, each `[m]`."""
        self._found[arm.does].append(values)

    def together(self, *, kl_is_bound: bool) -> MeasuredTokens:
        """Return everything that was added."""
        arms = {}
        for arm in self._arms:
            found = self._found[arm.does]
            names = ("losses", "kls", "same_top")
            joined = {name: np.concatenate([part[name] for part in found]) for name in names}
            arms[arm.name] = ArmTokens(**joined, own=np.concatenate(self._own[arm.name]))
        return MeasuredTokens(
            sequence=np.concatenate(self._sequence),
            distance=np.concatenate(self._distance),
            losses_full=np.concatenate(self._full),
            kl_is_bound=kl_is_bound,
            arms=arms,
        )


@contextmanager
def shown_progress(
    console: Console, num_examples: int, arms: Sequence[FidelityArm], batch_sequences: int
) -> Iterator[OnDone]:
    """Show how much of a measurement is done; yields what hears of each part.

    Args:
        console: where it is shown.
        num_examples: how many answers are measured.
        arms: what is compared.
        batch_sequences: how many answers are read at once.
    """
    batches = -(-num_examples // batch_sequences)
    done = itertools.count(1)
    total = batches * (1 + len(Parts(arms).different))
    with ProgressBar(console, title="reading", done=0, total=total) as bar:
        yield lambda name: bar.show(next(done), name)
