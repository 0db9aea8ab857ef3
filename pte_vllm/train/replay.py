"""Reference replay: log-probs of given tokens under a plan, in plain transformers.

Independent of vLLM, and the measure of everything else: the sequence is cut at the plan's
boundaries; after each segment the oldest blocks of the window are folded into the thought state
(`ops.reference`) and dropped from a `DynamicCache`. Supports models whose layers are
`model.model.layers[i].self_attn` with rotary embeddings in half layout: Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from pte_vllm.adapter import Adapter, layer_of
from pte_vllm.ops import reference
from pte_vllm.ops.reference import RULES, LayerEncoder, Sums
from pte_vllm.plan import FoldPlan

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One fold of one sequence."""

    at: int
    """Position of the first token computed after it."""
    blocks: tuple[int, int]
    """Logical blocks folded, half-open."""
    rho: Tensor  # [L] ‖ΔS‖ / ‖S‖ per layer that has a state


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What a replay found."""

    logprobs: Tensor  # [T - 1] fp32: of token t + 1 given the tokens up to t
    states: Tensor | None  # [L, G, r] after the last fold; None without an encoder
    folds: list[Fold]


class Replay:
    """A transformers model with an adapter attached by forward hooks; a context manager.

    Args:
        model: a causal LM in eval mode; its weights are not changed.
        adapter: None for the bare model, a plain LoRA (S = identity), or a PTE adapter.
    """

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        rope = getattr(model.config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"rope type {rope['rope_type']} depends on the length of the sequence")
        self.model = model
        self.adapter = adapter
        self.device = next(model.parameters()).device
        self.encoders: dict[int, LayerEncoder] = {}
        if adapter is not None:
            self.encoders = {
                i: e.map(lambda t: t.to(self.device)) for i, e in adapter.encoders.items()
            }
        self._states: dict[int, Tensor] = {}
        self._hooks = [
            model.get_submodule(module).register_forward_hook(self._hook(module))
            for module in (adapter.lora_a if adapter is not None else ())
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the adapter from the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, module: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        adapter = self.adapter
        assert adapter is not None
        a = adapter.lora_a[module].float().to(self.device)
        b = adapter.lora_b[module].float().to(self.device)
        layer = layer_of(module)

        def forward(linear: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            shrunk = F.linear(inputs[0].float(), a)
            if adapter.pte is not None:
                assert layer is not None
                shrunk = reference.modulate(shrunk, self._states[layer], adapter.pte.read)
            return output + (adapter.scale * F.linear(shrunk, b)).to(output.dtype)

        return forward

    def log_probs(
        self, token_ids: Sequence[int], plan: FoldPlan, *, rule: str | None = None
    ) -> ReplayResult:
        """Replay one sequence of T tokens.

        Args:
            token_ids: question and thoughts.
            plan: when to fold; `pin_tokens` may be less than the prompt.
            rule: overrides the adapter's.
        """
        ids = torch.tensor([list(token_ids)], device=self.device)
        memory = _Memory(self, rule)
        cache, folds, logprobs, folded = DynamicCache(), [], [], 0
        for start, end in plan.segments(ids.shape[1]):
            due = plan.folded_blocks(start)
            if due > folded:
                first = plan.pinned_blocks + folded
                rho = self._fold(cache, memory, plan, due - folded, first)
                folds.append(Fold(at=start, blocks=(first, plan.pinned_blocks + due), rho=rho))
                folded = due
            logits = self._segment(ids[:, start:end], start, cache)
            targets = ids[0, start + 1 : end + 1]
            scores = logits[0, : len(targets)].float().log_softmax(-1)
            logprobs.append(scores.gather(1, targets[:, None])[:, 0])
        states = torch.stack(list(self._states.values())) if self._states else None
        return ReplayResult(logprobs=torch.cat(logprobs), states=states, folds=folds)

    def _segment(self, ids: Tensor, start: int, cache: DynamicCache) -> Tensor:
        """Logits `[1, n, V]` of one segment; the cache holds what it may see before it."""
        n, past = ids.shape[1], cache.get_seq_length() if start else 0
        mask = torch.ones(n, past + n, dtype=torch.bool, device=self.device).tril(past)
        return self.model(
            input_ids=ids,
            position_ids=torch.arange(start, start + n, device=self.device)[None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits

    def _fold(
        self, cache: DynamicCache, memory: _Memory, plan: FoldPlan, num_blocks: int, first: int
    ) -> Tensor:
        """Fold the oldest `num_blocks` of the window and drop them; `first` is their logical block."""
        bs = plan.block_size
        pinned, m = plan.pinned_blocks * bs, num_blocks * bs
        rho = []
        for i, layer in enumerate(cache.layers):
            if i in self.encoders:
                k, v = (t[0, :, pinned : pinned + m].transpose(0, 1).float()  # [m, H, D]
                        for t in (layer.keys, layer.values))
                rho.append(memory.fold(i, self._as_encoded(k, first * bs), v.flatten(1)))
            layer.keys, layer.values = (
                torch.cat((t[:, :, :pinned], t[:, :, pinned + m :]), 2)
                for t in (layer.keys, layer.values)
            )
        return torch.stack(rho) if rho else torch.zeros(0)

    def _as_encoded(self, k: Tensor, first_position: int) -> Tensor:
        """Cached keys `[m, H, D]` as the encoder takes them, `[m, d_kv]`."""
        assert self.adapter is not None and self.adapter.pte is not None
        if self.adapter.pte.keys == "unrotated":
            positions = torch.arange(len(k), device=self.device)[None] + first_position
            cos, sin = self.model.model.rotary_emb(k, positions)
            half = cos.shape[-1] // 2  # transformers repeats the frequencies
            k = reference.unrotate(k, cos[0, :, :half].float(), sin[0, :, :half].float())
        return k.flatten(1)


class _Memory:
    """Sums of every layer of one sequence; keeps the replay's states up to date."""

    def __init__(self, replay: Replay, rule: str | None) -> None:
        self.encoders, self.states, self.sums = replay.encoders, replay._states, {}
        self.states.clear()
        if replay.adapter is None or replay.adapter.pte is None:
            return
        pte = replay.adapter.pte
        self.rule, self.how = RULES[rule or pte.rule], pte.normalize
        self.sums: dict[int, Sums] = {
            i: self.rule.start(e, self.how) for i, e in self.encoders.items()
        }
        for i, encoder in self.encoders.items():
            self.states[i] = self.rule.read(self.sums[i], encoder, self.how)

    def fold(self, layer: int, k_e: Tensor, v_e: Tensor) -> Tensor:
        """Fold `[m, d_kv]` of one layer; returns how far the state moved."""
        encoder, before = self.encoders[layer], self.states[layer]
        self.sums[layer] = self.rule.fold(self.sums[layer], encoder, k_e, v_e, self.how)
        self.states[layer] = self.rule.read(self.sums[layer], encoder, self.how)
        return reference.relative_update(before, self.states[layer] - before)
