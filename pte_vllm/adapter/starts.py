"""Starts of a new layer: W_Q, W_K, W_V, q_g, h_g, their biases, and A.

A random start rarely learns to ask the state for what it holds. The `aligned` starts let A ask in
the very directions in which keys are stored, so that the state answers like linear attention before
any training.

Letters in shapes: G global tokens, r rank, H query heads, D head size, d_kv = KV heads × D,
d hidden size, N sequences, m tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pte_vllm.adapter.calibration import LayerSample
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.reference import LayerEncoder

_MIXED_DIRECTIONS = 16
"""How many leading directions of a head squared features are mixtures of."""
_SPARE_STD = 0.1
"""Spread of rows beyond a head's directions, against that of a random start. With squared features
W_K and A have no such rows: all of theirs are mixtures."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How one layer was initialised."""

    layer: int
    query_head: int | None = None
    """The head whose queries A asks; None where the start needs no sample text."""
    kv_head: int | None = None
    far_attention: float | None = None
    """The attention which that head pays beyond the window on recalled text."""
    gain: float = 1.0
    rho: tuple[float, ...] = ()
    """The ‖S'‖ / ‖S‖ that was reached on each sample sequence."""


@dataclass(frozen=True, kw_only=True)
class LayerStart:
    """What one layer starts from."""

    encoder: LayerEncoder
    """The encoder, with a gain of 1."""
    ask: Tensor | None  # [G, d]: A of linears that read the residual stream; None: random
    report: LayerReport


def _uncalibrated(sample: LayerSample, encoder: LayerEncoder, ask: Tensor | None) -> LayerStart:
    return LayerStart(encoder=encoder, ask=ask, report=LayerReport(layer=sample.layer))


def _encoder(
    sample: LayerSample, config: PTEConfig, generator: torch.Generator, *, identity: bool
) -> LayerEncoder:
    """Make an encoder with random W_K, W_V and h_g and no biases.

    q_g W_Qᵀ is the identity, or random.
    """
    d_kv = sample.k.shape[1] * sample.k.shape[3]
    g, r = config.global_tokens, config.rank

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if identity:
        # Of product I while both fit into d_kv; the rest starts small rather than dead.
        spare = _SPARE_STD / math.sqrt(d_kv)
        w_q, query = torch.eye(r, d_kv), torch.eye(g, d_kv)
        w_q[d_kv:] = spare * noise(max(0, r - d_kv), d_kv)
        query[d_kv:] = spare * noise(max(0, g - d_kv), d_kv)
    else:
        w_q, query = noise(r, d_kv) / math.sqrt(d_kv), noise(g, d_kv)
    return LayerEncoder(
        query=query,
        global_=noise(g, d_kv),
        w_q=w_q,
        w_k=noise(r, d_kv) / math.sqrt(d_kv),
        w_v=noise(r, d_kv) / math.sqrt(d_kv),
        gain=torch.ones(()),
        b_k=torch.zeros(r),
        b_v=torch.zeros(r),
        log_ridge=torch.zeros(()),
        features=config.features,
    )


def _random(sample: LayerSample, config: PTEConfig, generator: torch.Generator) -> LayerStart:
    """Start A as LoRA does, and the encoder at random."""
    return _uncalibrated(sample, _encoder(sample, config, generator, identity=False), None)


def _aligned_mean(sample: LayerSample, config: PTEConfig, generator: torch.Generator) -> LayerStart:
    """Start with A = W_K Q̃, where Q̃ `[d_kv, d]` is the mean of q_proj over each group of heads."""
    encoder = _encoder(sample, config, generator, identity=True)
    heads, kv_heads = sample.q.shape[1], sample.k.shape[1]
    weight = _query_weight(sample)  # [H, D, d]
    mean = weight.view(kv_heads, heads // kv_heads, *weight.shape[1:]).mean(1).flatten(0, 1)
    return _uncalibrated(sample, encoder, _fit_rows(encoder.w_k @ mean, config, generator))


def _aligned_key(sample: LayerSample, config: PTEConfig, generator: torch.Generator) -> LayerStart:
    """Start with A = W_K · (weight of k_proj)."""
    encoder = _encoder(sample, config, generator, identity=True)
    weight = sample.attention.k_proj.weight.detach().float().cpu()
    return _uncalibrated(sample, encoder, _fit_rows(encoder.w_k @ weight, config, generator))


def _aligned(sample: LayerSample, config: PTEConfig, generator: torch.Generator) -> LayerStart:
    """Give the rank to the KV head that is asked most about what lies beyond the window.

    W_K and A are the two sides of that head's query-key form: its leading directions, with keys
    whitened and centred. W_V takes the leading directions of its values.
    """
    far = sample.far_attention()
    head = int(far.argmax())
    kv_heads, size = sample.k.shape[1], sample.k.shape[3]
    kv = head // (sample.q.shape[1] // kv_heads)
    k_all, v_all = evicted_kv(sample, config.keys)  # [N, m, d_kv]
    k_all, v_all = k_all.flatten(0, 1), v_all.flatten(0, 1)
    own = slice(kv * size, (kv + 1) * size)
    q = sample.q[:, head].flatten(0, 1).cpu()
    fit_k, fit_q = query_key_form(q, k_all[:, own], config.rank)
    if config.features == "squared":
        fit_k, fit_q = _mixtures(fit_k, fit_q, k_all[:, own], config.rank, generator)
    fit_v = torch.linalg.eigh(_covariance(v_all[:, own]))[1].flip(-1)[:, : config.rank].mT

    encoder = _encoder(sample, config, generator, identity=True)
    w_k, w_v = (_SPARE_STD * w for w in (encoder.w_k, encoder.w_v))
    for w, fit in ((w_k, fit_k), (w_v, fit_v)):
        w[: len(fit)] = 0.0
        w[: len(fit), own] = fit
    k_mean, v_mean = k_all.mean(0), v_all.mean(0)
    encoder = replace(
        encoder,
        w_k=w_k,
        w_v=w_v,
        b_k=-(w_k @ k_mean),
        b_v=-(w_v @ v_mean),
        global_=k_mean + k_all.std(0) * encoder.global_,  # looks like keys: centred by the biases
    )
    ask = fit_q @ _query_weight(sample)[head]
    report = LayerReport(
        layer=sample.layer, query_head=head, kv_head=kv, far_attention=float(far[head])
    )
    return LayerStart(encoder=encoder, ask=_fit_rows(ask, config, generator), report=report)


STARTS: dict[str, Callable[[LayerSample, PTEConfig, torch.Generator], LayerStart]] = {
    "aligned": _aligned,
    "aligned_mean": _aligned_mean,
    "aligned_key": _aligned_key,
    "random": _random,
}


def query_key_form(q: Tensor, k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split the form qᵀk by leading directions into `(W_K, W_A)`, each `[min(rank, D), D]`.

    With rank D, `(W_A q)·(W_K k) = q·k` exactly. Keys are whitened first, so that directions rank
    by how much they move the score; both sides then have the same spread.

    Args:
        q: queries `[.., D]` before RoPE.
        k: keys `[.., D]` before RoPE.
        rank: how many directions are kept.
    """
    size = k.shape[-1]
    covariance = _covariance(k)
    level = covariance.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(covariance + 1e-3 * level * torch.eye(size))
    root, inverse = (vectors * f @ vectors.mT for f in (values.sqrt(), values.rsqrt()))
    strength, form = torch.linalg.eigh(root @ _covariance(q) @ root)
    strength, form = strength.flip(-1)[:rank], form.flip(-1)[:, :rank]
    scale = strength.clamp(min=1e-6 * float(level)).pow(0.25)[:, None]
    return (inverse @ form).mT * scale, (root @ form).mT / scale


def _mixtures(
    fit_k: Tensor, fit_q: Tensor, k: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix both sides of the form at random for squared features: `[rank, D]` each.

    The mixture w is the same on both sides: Σ_w (w·q)² (w·k)² is a sketch of the form's square.
    Directions are mixed at the spread that their keys `k: [.., D]` have, lest the first one be all
    there is.
    """
    top_k, top_q = fit_k[:_MIXED_DIRECTIONS], fit_q[:_MIXED_DIRECTIONS]
    spread = ((k - k.mean(0)) @ top_k.mT).square().mean(0).sqrt().clamp(min=1e-6)[:, None]
    mix = torch.randn(rank, len(top_k), generator=generator) / math.sqrt(len(top_k))
    return mix @ (top_k / spread), mix @ (top_q / spread)


def evicted_kv(sample: LayerSample, keys: str) -> tuple[Tensor, Tensor]:
    """Return keys as encoded, and values, after the pinned tokens: `[N, m, d_kv]`, on the CPU."""
    k = sample.rotate(sample.k) if keys == "rotated" else sample.k
    start = sample.spans.evicted_from(k.shape[2])
    k, v = (t[:, :, start:].transpose(1, 2).flatten(2).cpu() for t in (k, sample.v))
    return k, v


def _covariance(x: Tensor) -> Tensor:
    return torch.cov(x.flatten(0, -2).mT)


def _query_weight(sample: LayerSample) -> Tensor:
    """Return q_proj by head, scaled by q_norm where there is one: `[H, D, d]`, on the CPU."""
    heads, size = sample.q_scale.shape
    weight = sample.attention.q_proj.weight.detach().float().cpu().view(heads, size, -1)
    scaled: Tensor = weight * sample.q_scale.cpu()[..., None]
    return scaled


def _fit_rows(ask: Tensor, config: PTEConfig, generator: torch.Generator) -> Tensor:
    """Give `ask` G rows: cut it, or add LoRA's own rows at the end."""
    a = lora_a_rows(config.global_tokens, ask.shape[1], generator)
    rows = min(len(ask), len(a))
    a[:rows] = ask[:rows]
    return a


def lora_a_rows(rows: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Start rows of A as PEFT does: uniform in ± 1/√d_in."""
    return (2 * torch.rand(rows, d_in, generator=generator) - 1) / math.sqrt(d_in)
