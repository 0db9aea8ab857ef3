"""The KV cache of a replay: what is held between segments, and what a fold takes out.

A layer's `update` is a pure function of what was committed and the new tokens, so that gradient
checkpointing may run a decoder layer twice; `commit` makes the new tokens part of the past.

Shapes: B sequences, H KV heads, D head size, t tokens held, m evicted tokens, L layers asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pte_vllm.method.spans import Spans, without


class WindowLayer(DynamicLayer):
    """One decoder layer's keys (after RoPE) and values, `[B, H, t, D]` (upstream: DynamicLayer)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.past: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return past and new tokens together; an earlier call that was not committed is undone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.past is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat((self.past[0], key_states), -2)
            self.values = torch.cat((self.past[1], value_states), -2)
        return self.keys, self.values


class WindowCache(Cache):
    """The KV cache of all layers; a replay makes its own."""

    layers: list[Any]  # of WindowLayer; the parent's declaration allows any kind

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=WindowLayer)

    @property
    def num_tokens(self) -> int:
        """How many committed tokens each layer holds, t."""
        past = self.layers[0].past if self.layers else None
        return past[0].shape[-2] if past is not None else 0

    def commit(self, *, detach: bool) -> None:
        """Keep the tokens of the forward that just ran; `detach` cuts their gradient."""
        for layer in self.layers:
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            layer.past = (keys.detach(), values.detach()) if detach else (keys, values)
            layer.keys, layer.values = layer.past

    def tokens(self, spans: Spans, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copy keys and values of some committed tokens.

        Args:
            spans: which of them, as half-open ranges in order; m in all.
            layers: whose, at least one.

        Returns:
            Their keys and values, each `[L, B, m, H, D]`.
        """
        found = []
        for i in layers:
            past = self.layers[i].past
            assert past is not None
            found.append([_joined(_parts(t, spans)).transpose(1, 2) for t in past])
        keys, values = zip(*found, strict=True)
        return torch.stack(keys), torch.stack(values)

    def drop(self, spans: Spans) -> None:
        """Drop committed tokens, half-open ranges in order, from every layer."""
        stay = without(((0, self.num_tokens),), spans)
        for layer in self.layers:
            assert layer.past is not None
            # Copied in any case: a view would keep what is dropped in memory.
            k, v = (torch.cat([t[:, :, :0], *_parts(t, stay)], 2) for t in layer.past)
            layer.past = layer.keys, layer.values = k, v

    def select(self, candidates: Tensor, places: Tensor, order: Tensor) -> None:
        """Put some of the committed tokens, which differ by head, in the places of others.

        Args:
            candidates: the places of those that heads choose from, `[C]`.
            places: which of these each KV head of each layer keeps, `[layers, B, H, K]`, ascending.
            order: what the cache holds then, `[t]`: a place is that of a token as it was, and
                `num_tokens + k` the k-th of the K that are kept.
        """
        for layer, chosen in zip(self.layers, places, strict=True):
            assert layer.past is not None
            k, v = (
                torch.cat((t, gathered(t[:, :, candidates], chosen)), 2)[:, :, order]
                for t in layer.past
            )
            layer.past = layer.keys, layer.values = k, v

    def shifted(self, rows: Sequence[int], left: Sequence[int], columns: int) -> WindowCache:
        """Copy the first tokens of some sequences into a cache of their own, each moved right.

        Args:
            rows: which sequences are taken, in the order of the copy.
            left: how many columns of the copy come before the first token of each.
            columns: how many columns the copy has; those before a sequence hold zeros.
        """
        copy = WindowCache()
        for i, layer in enumerate(self.layers):
            assert layer.past is not None
            moved = []
            for past in layer.past:
                own = past.new_zeros(len(rows), past.shape[1], columns, past.shape[3])
                for b, (row, shift) in enumerate(zip(rows, left, strict=True)):
                    tokens = past[row, :, : columns - shift]
                    own[b, :, shift : shift + tokens.shape[1]] = tokens
                moved.append(own)
            copy.update(*moved, i)
        copy.commit(detach=True)
        return copy


def gathered(tokens: Tensor, places: Tensor) -> Tensor:
    """Pick tokens `[B, H, C, D]` by places `[B, H, K]`, which differ by head: `[B, H, K, D]`."""
    return tokens.gather(2, places[..., None].expand(-1, -1, -1, tokens.shape[-1]))


def _parts(tensor: Tensor, spans: Spans) -> list[Tensor]:
    """Return the tokens of each span of `[B, H, t, D]`."""
    return [tensor[:, :, first:end] for first, end in spans]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
