"""The method spelled out, sharing nothing with what it checks.

For every fold one forward over the whole sequence so far: no cache, a mask that hides what was
evicted, and for each token the thought state it was computed under, on which its keys and values
depend.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import LayerEncoder

Evicted = tuple[Tensor, Tensor]
"""Keys and values of one fold, each [m, d_kv]."""


def walk(num_tokens: int, plan: FoldPlan) -> tuple[Tensor, list[tuple[int, list[int]]]]:
    """Token by token: what each one sees `[T, T]`, and at which position each fold takes which."""
    size = plan.block_size
    evict_blocks = max(1, round(plan.evict_ratio * plan.window_tokens / size))
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    gone: set[int] = set()
    folds: list[tuple[int, list[int]]] = []
    for position in range(num_tokens):
        questions = [(0, plan.pin_tokens), *[s for s in plan.pin_spans if s[0] <= position][-1:]]
        pinned = {
            token
            for first, end in questions
            for token in range(first // size * size, math.ceil(end / size) * size)
        }
        room = 0 if position in pinned else size
        while plan.window_tokens and position % size == 0:
            window = [t for t in range(position) if t not in pinned and t not in gone]
            if len(window) + room <= plan.window_tokens:
                break
            blocks = [window[i : i + size] for i in range(0, len(window), size)]
            chosen = range(evict_blocks)
            if plan.evict == "random":
                chosen = _draw(plan.evict_seed, len(folds), len(blocks) - 1, evict_blocks)
            taken = [token for i in chosen for token in blocks[i]]
            folds.append((position, taken))
            gone.update(taken)
        visible[position] = torch.tensor([t not in gone for t in range(num_tokens)])
    return visible.tril(), folds


def _draw(seed: int, fold: int, candidates: int, count: int) -> list[int]:
    """Which of the older blocks leave: those with the smallest of the numbers that a hash gives."""
    digest = hashlib.shake_256(b"pte_evict/%d/%d" % (seed, fold)).digest(8 * candidates)
    numbers = [digest[8 * i : 8 * i + 8] for i in range(candidates)]
    return sorted(numbers.index(number) for number in sorted(numbers)[:count])


def state(encoder: LayerEncoder, pte: PTEConfig, rule: str, folds: list[Evicted]) -> Tensor:
    """S from everything evicted so far, by the formulas, in double precision."""
    e = encoder.map(lambda t: t.double())

    def project(k: Tensor, v: Tensor) -> Evicted:
        k = k.double() @ e.w_k.T + e.b_k
        return _features(k, pte), v.double() @ e.w_v.T + e.b_v

    def contribution(k: Tensor, v: Tensor) -> Tensor:
        total = torch.zeros(pte.global_tokens, pte.rank, dtype=torch.float64)
        queries = e.query @ e.w_q.T
        for k_j, v_j in zip(*project(k, v), strict=True):
            total += (queries @ k_j)[:, None] * v_j[None]
        return e.gain / len(k) * total

    def normalize(s: Tensor) -> Tensor:
        if pte.normalize == "row":
            return s / s.pow(2).sum(-1, keepdim=True).sqrt()
        return s * math.sqrt(pte.rank) / s.pow(2).sum().sqrt()

    if rule == "ridge":
        if not folds:
            return torch.zeros(pte.rank, pte.rank)
        k, v = project(*(torch.cat(side) for side in zip(*folds, strict=True)))
        c = k.T @ k / len(k)
        damp = e.log_ridge.exp() * c.diagonal().mean() * torch.eye(pte.rank, dtype=torch.float64)
        return (torch.linalg.inv(c + damp) @ (k.T @ v / len(k))).float()
    if rule == "delta":
        s, keys = torch.zeros(pte.rank, pte.rank, dtype=torch.float64), []
        for k, v in (project(*fold) for fold in folds):
            keys += list(k)
            mu = e.log_ridge.exp() * sum(k_j.dot(k_j) for k_j in keys) / len(keys)
            gain = torch.linalg.inv(k @ k.T + mu * torch.eye(len(k), dtype=torch.float64))
            s = s + k.T @ gain @ (v - k @ s)  # what S gets wrong on this fold's keys
        return s.float()
    s = normalize(contribution(e.global_, e.global_))
    for k, v in folds if rule != "none" else []:
        s = s + contribution(k, v)
        s = normalize(s) if rule == "paper" else s
    return normalize(s).float()


def _features(x: Tensor, pte: PTEConfig) -> Tensor:
    return x * x if pte.features == "squared" else x


@torch.no_grad()
def log_probs(
    model: Any, adapter: Adapter, ids: list[int], plan: FoldPlan, rule: str
) -> tuple[Tensor, Tensor]:
    """Log-probs `[T - 1]` and final states `[L, G, r]`; the model must use eager attention,
    or one that has its own mask."""
    pte = adapter.pte
    assert pte is not None and model.config._attn_implementation != "sdpa"
    visible, folds = walk(len(ids), plan)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    per_token = {i: torch.zeros(len(ids), pte.global_tokens, pte.rank) for i in adapter.layers}
    evicted: dict[int, list[Evicted]] = {i: [] for i in adapter.layers}
    seen: dict[tuple[int, str], Tensor] = {}
    hooks = _hooks(model, adapter, per_token, seen)
    logits = []
    edges = [0, *(at for at, _ in folds), len(ids)]
    for n, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        for i in adapter.layers:
            if n:
                _, taken = folds[n - 1]
                k, v = (seen[i, side][taken] for side in "kv")
                if pte.keys == "rotated":
                    k = rotate(model, k, taken)
                evicted[i].append((k, v))
            per_token[i][start:] = state(adapter.encoders[i], pte, rule, evicted[i])
        out = model(
            input_ids=torch.tensor([ids[:end]]),
            attention_mask=mask[None, None, :end, :end],
            position_ids=torch.arange(end)[None],
            use_cache=False,
        )
        logits.append(out.logits[0, start:])
    for hook in hooks:
        hook.remove()
    scores = torch.cat(logits).log_softmax(-1)
    targets = torch.tensor(ids[1:])
    final = torch.stack([per_token[i][-1] for i in adapter.layers])
    return scores[:-1].gather(1, targets[:, None])[:, 0], final


def _hooks(
    model: Any,
    adapter: Adapter,
    per_token: dict[int, Tensor],
    seen: dict[tuple[int, str], Tensor],
) -> list[Any]:
    pte = adapter.pte
    assert pte is not None
    form = "tg,tgr->tr" if pte.read == "key" else "tr,tgr->tg"

    def delta(name: str, layer: int) -> Any:
        a, b = adapter.lora_a[name], adapter.lora_b[name]

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0][0]
            asked = _features(x @ a.T, pte)
            middle = torch.einsum(form, asked, per_token[layer][: len(x)])
            return output + adapter.scale * (middle @ b.T)

        return hook

    def capture(layer: int, side: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            seen[layer, side] = output[0].reshape(output.shape[1], -1)

        return hook

    hooks = []
    for i in adapter.layers:
        for name in adapter.lora_a:
            if f".layers.{i}." in name:
                hooks.append(model.get_submodule(name).register_forward_hook(delta(name, i)))
        attention = model.model.layers[i].self_attn
        keys = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        hooks.append(keys.register_forward_hook(capture(i, "k")))
        hooks.append(attention.v_proj.register_forward_hook(capture(i, "v")))
    return hooks


def rotate(model: Any, k: Tensor, positions: list[int]) -> Tensor:
    """RoPE by complex numbers: `[m, d_kv]` at these positions."""
    rotary = model.model.rotary_emb
    half = len(rotary.inv_freq)
    heads = k.unflatten(1, (-1, 2 * half)).double()
    angles = torch.tensor(positions)[:, None] * rotary.inv_freq.double()
    turn = torch.polar(torch.full_like(angles, rotary.attention_scaling), angles)[:, None]
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1).flatten(1).float()
