"""The thought states of a batch while it is replayed: the chain of folds.

Shapes: L layers with an encoder, B sequences, H KV heads, D head size; G, r, m and d_kv as in
`method.reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pte_vllm.method import reference
from pte_vllm.method.held import rounded
from pte_vllm.method.options import PTEConfig, check_rule_fits
from pte_vllm.method.reference import UPDATE_RULES, LayerEncoder, Sums

Encoded = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns cached keys and values `[L, B, m, H, D]` into `K_e, V_e: [L, B, m, d_kv]`, fp32."""


class ThoughtStates:
    """States of all layers and sequences from S_0 on, and the sums from which a rule reads them.

    Args:
        encoder: every tensor `[L, ...]`; gradients flow into it if the caller leaves them on.
        config: the adapter's method.
        rule: the rule to fold by; None: the adapter's.
        batch_size: how many sequences are replayed, B.
        dtype: the model's; in bfloat16 tokens read the states in it, as on a server.

    Raises:
        ValueError: on an unknown rule, or one that does not fit the adapter.
    """

    def __init__(
        self,
        encoder: LayerEncoder,
        config: PTEConfig,
        rule: str | None,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        name = rule or config.rule
        if name not in UPDATE_RULES:
            raise ValueError(f"rule must be one of {', '.join(UPDATE_RULES)}, got {name!r}")
        check_rule_fits(name, config.rank, config.global_tokens)
        self._encoder = encoder.map(lambda t: t[:, None])  # [L, 1, ...], over sequences
        self._rule, self._how, self._dtype = UPDATE_RULES[name], config.normalize, dtype
        self._sums: Sums = self._rule.start(self._encoder, self._how)
        start = self._read(self._sums)
        self.states: Tensor = start.expand(-1, batch_size, -1, -1)
        """The states after the last fold as tokens read them, `[L, B, G, r]` fp32."""

    def fold(self, k: Tensor, v: Tensor, encoded: Encoded) -> Tensor:
        """Fold what left the cache into all states.

        Until the backward pass k and v stay as they are, in the cache's dtype: `encoded` is called
        a second time then, and must say the same.

        Returns:
            How far each state moved, ‖ΔS‖ / ‖S‖, `[L, B]`.
        """
        before = self.states.detach()
        self._sums, states = checkpoint(
            self._folded,
            self._sums,
            k,
            v,
            encoded,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        self.states = states.expand_as(before)  # the rule `none` knows no sequences
        return reference.relative_update(before, self.states.detach() - before)

    def _folded(self, sums: Sums, k: Tensor, v: Tensor, encoded: Encoded) -> tuple[Sums, Tensor]:
        """Compute the sums after a fold, and the states as read from them."""
        sums = self._rule.fold(sums, self._encoder, *encoded(k, v), self._how)
        return sums, self._read(sums)

    def _read(self, sums: Sums) -> Tensor:
        return rounded(self._rule.read(sums, self._encoder, self._how), self._dtype)


class FoldChain:
    """Collects the gradients of the states that segments used, and sends them through the folds.

    A segment runs on a copy of the state cut from its history, so that its activations can go as
    soon as it has back-propagated. Of the folds' own graph stays until `backward` what a fold needs
    to run again: evicted keys and values in the cache's dtype, and `[r, r]` sums.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._leaves: list[Tensor] = []

    def cut(self, states: Tensor) -> Tensor:
        """Return the states cut from their history, as a leaf for one segment."""
        if not states.requires_grad:
            return states
        if self._states and self._states[-1] is states:  # no fold in between
            return self._leaves[-1]
        leaf = states.detach().requires_grad_()
        self._states.append(states)
        self._leaves.append(leaf)
        return leaf

    def backward(self) -> None:
        """Send everything collected through the folds into the encoder, once."""
        used = [
            (state, leaf.grad)
            for state, leaf in zip(self._states, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        if used:
            states, gradients = zip(*used, strict=True)
            torch.autograd.backward(states, gradients)
