"""Reference replay: log-probs of given tokens under a plan, in plain transformers.

Independent of vLLM, and the measure of everything else: the sequence is cut at the plan's
boundaries; at each of them the oldest blocks of the window are folded into the thought state
(`ops.reference`) and dropped from a `DynamicCache`. Supports models whose decoder layers are
`model.model.layers` with rotary embeddings in half layout: Llama, Mistral, Qwen2, Qwen3.

Shapes: T tokens, n of them in a chunk, V vocabulary, L layers with an encoder, H KV heads, D head
size, m evicted tokens; G, r and d_kv as in `ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from pte_vllm.adapter import Adapter, layer_of
from pte_vllm.config import PTEConfig, check_rule_fits
from pte_vllm.ops import reference
from pte_vllm.ops.reference import RULES, LayerEncoder, Sums
from pte_vllm.plan import FoldPlan


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One fold of one sequence."""

    at: int
    """Position of the first token computed after it."""
    blocks: tuple[int, int]
    """Logical blocks folded, half-open."""
    rho: Tensor  # [L] ‖ΔS‖ / ‖S‖ of each layer with an encoder


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What a replay found."""

    logprobs: Tensor  # [T - 1] fp32: of token t + 1 given the tokens up to t
    states: Tensor | None  # [L, G, r] after the last fold; None without an encoder
    folds: list[Fold]
    logits: Tensor | None = None  # [T, V] fp32, where asked for


class Replay:
    """A transformers model with an adapter attached by forward hooks; a context manager.

    Gradients flow if the caller leaves them on; a caller who needs none sets `torch.no_grad`.

    Args:
        model: a causal LM in eval mode; its weights are not changed.
        adapter: None for the bare model, a plain LoRA (S = identity), or a PTE adapter. The
            adapter is applied in fp32 whatever the model's dtype.

    Raises:
        ValueError: if the model cannot be replayed, or lacks a module of the adapter.
    """

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        _check_model(model)
        self.model = model
        self.adapter = adapter
        self.device: torch.device = next(model.parameters()).device
        self.encoders: dict[int, LayerEncoder] = {}
        self._memory: _Memory | None = None
        self._hooks: list[Any] = []
        if adapter is None:
            return
        self.encoders = {
            i: adapter.encoders[i].map(lambda t: t.to(self.device)) for i in adapter.layers
        }
        linears = {  # found before the first is hooked, so that an error leaves no hook behind
            name: _submodule(model, name)
            for name in adapter.lora_a
            if adapter.pte is None or layer_of(name) in self.encoders
        }
        for name, linear in linears.items():
            self._hooks.append(linear.register_forward_hook(self._hook(adapter, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the adapter from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, adapter: Adapter, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """y + scale · B (modulate(A x, S)) for the linear `name`."""
        a = adapter.lora_a[name].float().to(self.device)
        b = adapter.lora_b[name].float().to(self.device)
        layer = layer_of(name)

        def forward(linear: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            shrunk = F.linear(inputs[0].float(), a)  # [1, n, G]
            if adapter.pte is not None:
                assert self._memory is not None and layer is not None, "call log_probs"
                shrunk = reference.modulate(shrunk, self._memory.states[layer], adapter.pte.read)
            return (output + adapter.scale * F.linear(shrunk, b)).to(output.dtype)

        return forward

    def log_probs(
        self,
        token_ids: Sequence[int],
        plan: FoldPlan,
        *,
        rule: str | None = None,
        chunk_tokens: int | None = None,
        keep_logits: bool = False,
    ) -> ReplayResult:
        """Replay one sequence of T tokens.

        Args:
            token_ids: question and thoughts.
            plan: when to fold; `pin_tokens` may be less than the question.
            rule: overrides the adapter's; without an encoder it has no effect.
            chunk_tokens: most tokens of one forward; None: whole segments. Bounds the memory that
                logits take, above all where the plan is unbounded. Does not change the result.
            keep_logits: also return the logits.

        Raises:
            ValueError: on an empty sequence, an unknown rule or one that does not fit the adapter.
        """
        if not token_ids:
            raise ValueError("token_ids is empty")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
        ids = torch.tensor(list(token_ids), device=self.device)
        pte = self.adapter.pte if self.adapter is not None else None
        self._memory = memory = _Memory(self.encoders, pte, rule) if pte is not None else None
        cache, folded = DynamicCache(), 0
        folds: list[Fold] = []
        logprobs: list[Tensor] = []
        kept: list[Tensor] = []
        for start, end in plan.segments(len(ids)):
            due = plan.folded_blocks(start)
            if due > folded:
                rho = self._fold(cache, plan, folded, due)
                blocks = (plan.pinned_blocks + folded, plan.pinned_blocks + due)
                folds.append(Fold(at=start, blocks=blocks, rho=rho))
                folded = due
            for first, last in _chunks(start, end, chunk_tokens):
                logits = self._forward(ids[first:last], first, cache)
                targets = ids[first + 1 : last + 1]  # one short at the end of the sequence
                scores = logits[: len(targets)].log_softmax(-1)
                logprobs.append(scores.gather(1, targets[:, None])[:, 0])
                if keep_logits:
                    kept.append(logits)
        return ReplayResult(
            logprobs=torch.cat(logprobs),
            states=memory.stacked() if memory is not None else None,
            folds=folds,
            logits=torch.cat(kept) if keep_logits else None,
        )

    def _forward(self, ids: Tensor, start: int, cache: DynamicCache) -> Tensor:
        """Logits `[n, V]` of the tokens from `start`; they see all of the cache, then each other.

        Positions are true ones. The causal mask is left to transformers, which derives it from the
        cache's length, so that every attention implementation gets the form it expects.
        """
        positions = torch.arange(start, start + len(ids), device=self.device)
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _fold(self, cache: DynamicCache, plan: FoldPlan, folded: int, due: int) -> Tensor:
        """Fold blocks `[folded, due)` of the thoughts, the oldest, and drop them; rho `[L]`."""
        bs = plan.block_size
        begin, m = plan.pinned_blocks * bs, (due - folded) * bs
        first_position = (plan.pinned_blocks + folded) * bs
        layers: list[Any] = cache.layers
        rho = []
        for i, layer in enumerate(layers):
            if self._memory is not None and i in self.encoders:
                k, v = (
                    t[0, :, begin : begin + m].transpose(0, 1) for t in (layer.keys, layer.values)
                )
                k_e, v_e = self._as_encoded(k, first_position), v.float().flatten(1)
                rho.append(self._memory.fold(i, k_e, v_e))
            layer.keys, layer.values = (
                torch.cat((t[:, :, :begin], t[:, :, begin + m :]), 2)
                for t in (layer.keys, layer.values)
            )
        return torch.stack(rho) if rho else torch.zeros(0, device=self.device)

    def _as_encoded(self, k: Tensor, first_position: int) -> Tensor:
        """Cached keys `[m, H, D]` as the encoder takes them: `[m, d_kv]`, fp32."""
        assert self.adapter is not None and self.adapter.pte is not None
        if self.adapter.pte.keys == "rotated":
            return k.float().flatten(1)
        positions = torch.arange(len(k), device=self.device)[None] + first_position
        cos, sin = self.model.model.rotary_emb(k, positions)  # rounded to k's dtype, as applied
        half = cos.shape[-1] // 2  # transformers repeats the frequencies
        plain = reference.unrotate(k.float(), cos[0, :, :half].float(), sin[0, :, :half].float())
        return plain.flatten(1)


class _Memory:
    """The sums and thought states of one sequence, from S_0 on."""

    def __init__(self, encoders: dict[int, LayerEncoder], pte: PTEConfig, rule: str | None) -> None:
        name = rule or pte.rule
        if name not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
        check_rule_fits(name, pte.rank, pte.global_tokens)
        self.encoders, self.rule, self.how = encoders, RULES[name], pte.normalize
        self.sums: dict[int, Sums] = {}
        self.states: dict[int, Tensor] = {}  # by layer, [G, r]
        for i, encoder in encoders.items():
            self.sums[i] = self.rule.start(encoder, self.how)
            self.states[i] = self.rule.read(self.sums[i], encoder, self.how)

    def fold(self, layer: int, k_e: Tensor, v_e: Tensor) -> Tensor:
        """Fold `K_e, V_e: [m, d_kv]` of one layer; how far its state moved, relatively."""
        encoder, before = self.encoders[layer], self.states[layer]
        self.sums[layer] = self.rule.fold(self.sums[layer], encoder, k_e, v_e, self.how)
        self.states[layer] = self.rule.read(self.sums[layer], encoder, self.how)
        return reference.relative_update(before, self.states[layer] - before)

    def stacked(self) -> Tensor:
        """`[L, G, r]`, layers ascending."""
        return torch.stack([self.states[i] for i in sorted(self.states)])


def _check_model(model: Any) -> None:
    rope_type = model.model.rotary_emb.rope_type
    if not isinstance(rope_type, str) or "dynamic" in rope_type or rope_type == "longrope":
        raise ValueError(f"rope type {rope_type!r}: frequencies that vary cannot be undone")
    layer_types = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    if set(layer_types) != {"full_attention"} if layer_types else window is not None:
        raise ValueError("replay supports models with plain full attention only")


def _submodule(model: Any, name: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no module {name}, which the adapter changes") from error
    return module


def _chunks(start: int, end: int, size: int | None) -> Iterator[tuple[int, int]]:
    step = end - start if size is None else size
    for first in range(start, end, step):
        yield first, min(first + step, end)
