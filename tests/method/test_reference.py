"""Every equation against loops that follow the paper's symbols one number at a time (fp64)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pte_vllm.method import reference, rope
from pte_vllm.method.names import FEATURES
from pte_vllm.method.reference import UPDATE_RULES, LayerEncoder

D_KV = 7


def _encoder(g: int = 5, r: int = 5, n_h: int = 3, *, seed: int = 0) -> LayerEncoder:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LayerEncoder(
        query=noise(g, D_KV),
        global_=noise(n_h, D_KV),
        w_q=noise(r, D_KV),
        w_k=noise(r, D_KV),
        w_v=noise(r, D_KV),
        gain=torch.tensor(0.7, dtype=torch.float64),
        b_k=noise(r),
        b_v=noise(r),
        log_ridge=torch.tensor(-0.4, dtype=torch.float64),
    )


def _evicted(m: int, *, seed: int = 1, dim: int = D_KV) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, m, dim, generator=generator, dtype=torch.float64)
    return k, v


def _project(weight: Tensor, bias: Tensor, x: Tensor) -> np.ndarray:
    out = np.zeros((x.shape[0], weight.shape[0]))
    for t in range(x.shape[0]):
        for j in range(weight.shape[0]):
            out[t, j] = sum(float(x[t, d] * weight[j, d]) for d in range(x.shape[1])) + bias[j]
    return out


def _contribution(e: LayerEncoder, k_e: Tensor, v_e: Tensor) -> np.ndarray:
    k, v = _project(e.w_k, e.b_k, k_e), _project(e.w_v, e.b_v, v_e)
    g, r, m = e.query.shape[0], e.w_k.shape[0], k_e.shape[0]
    s = np.zeros((g, r))
    for row in range(g):
        asks = [sum(float(e.query[row, d] * e.w_q[j, d]) for d in range(D_KV)) for j in range(r)]
        for t in range(m):
            match = sum(asks[j] * k[t, j] for j in range(r))
            for c in range(r):
                s[row, c] += float(e.gain) / m * match * v[t, c]
    return s


def _normalize(s: np.ndarray, how: str) -> np.ndarray:
    if how == "row":
        return s / np.sqrt((s**2).sum(1, keepdims=True))
    return s / math.sqrt((s**2).sum()) * math.sqrt(s.shape[1])


def _close(found: Tensor, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    wanted = np.asarray(wanted)
    error = np.abs(found.numpy() - wanted).max() / max(np.abs(wanted).max(), 1e-12)
    assert error < tolerance, error


@pytest.mark.parametrize("m", [1, 2, 13])
@pytest.mark.parametrize(("g", "r"), [(5, 5), (3, 6), (6, 3), (1, 1), (9, 8)])
def test_contribution(g: int, r: int, m: int) -> None:
    encoder, (k, v) = _encoder(g, r), _evicted(m)
    _close(reference.contribution(encoder, k, v), _contribution(encoder, k, v), 1e-12)


def test_contribution_is_a_sum_over_blocks_in_any_order() -> None:
    encoder, (k, v) = _encoder(4, 6), _evicted(11)
    blocks = [slice(5, 11), slice(0, 2), slice(2, 5)]
    parts = [reference.contribution(encoder, k[b], v[b]) * (b.stop - b.start) / 11 for b in blocks]
    _close(sum(parts), reference.contribution(encoder, k, v).numpy(), 1e-12)


@pytest.mark.parametrize("how", ["matrix", "row"])
@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (7, 2)])
def test_normalize(shape: tuple[int, int], how: str) -> None:
    s = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = reference.normalize(s, how)
    _close(found, _normalize(s.numpy(), how))
    if how == "matrix":
        assert float(found.norm()) == pytest.approx(math.sqrt(shape[1]), rel=1e-5)
    else:
        assert torch.allclose(found.norm(dim=1), torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("how", ["matrix", "row"])
def test_normalize_of_nothing_is_finite(how: str) -> None:
    assert torch.equal(reference.normalize(torch.zeros(4, 3), how), torch.zeros(4, 3))


@pytest.mark.parametrize("how", ["matrix", "row"])
@pytest.mark.parametrize(("g", "r"), [(5, 5), (3, 6), (6, 3)])
def test_paper_rule_normalises_at_every_fold(g: int, r: int, how: str) -> None:
    encoder, rule = _encoder(g, r), UPDATE_RULES["paper"]
    wanted = _normalize(_contribution(encoder, encoder.global_, encoder.global_), how)
    sums = rule.start(encoder, how)
    _close(rule.read(sums, encoder, how), wanted)
    for seed, m in ((3, 4), (4, 1), (5, 9)):
        k, v = _evicted(m, seed=seed)
        wanted = _normalize(wanted + _contribution(encoder, k, v), how)
        sums = rule.fold(sums, encoder, k, v, how)
        _close(rule.read(sums, encoder, how), wanted)


def test_sum_rule_normalises_when_read_only() -> None:
    encoder, rule = _encoder(3, 6), UPDATE_RULES["sum"]
    total = _normalize(_contribution(encoder, encoder.global_, encoder.global_), "matrix")
    sums = rule.start(encoder, "matrix")
    for seed, m in ((3, 4), (4, 1), (5, 9)):
        k, v = _evicted(m, seed=seed)
        total = total + _contribution(encoder, k, v)
        sums = rule.fold(sums, encoder, k, v, "matrix")
        _close(rule.read(sums, encoder, "matrix"), _normalize(total, "matrix"))


def test_none_rule_keeps_the_initial_state() -> None:
    encoder, rule = _encoder(), UPDATE_RULES["none"]
    sums = rule.fold(rule.start(encoder, "matrix"), encoder, *_evicted(4), "matrix")
    wanted = _normalize(_contribution(encoder, encoder.global_, encoder.global_), "matrix")
    _close(rule.read(sums, encoder, "matrix"), wanted)


@pytest.mark.parametrize("r", [1, 3, 5, 8])
def test_ridge_rule_solves_for_the_map_from_keys_to_values(r: int) -> None:
    encoder, rule = _encoder(r, r), UPDATE_RULES["ridge"]
    sums = rule.start(encoder, "matrix")
    assert torch.equal(rule.read(sums, encoder, "matrix"), torch.zeros(r, r, dtype=torch.float64))
    c, moment, n = np.zeros((r, r)), np.zeros((r, r)), 0
    for seed, m in ((3, 4), (4, 1), (5, 9)):
        k_e, v_e = _evicted(m, seed=seed)
        sums = rule.fold(sums, encoder, k_e, v_e, "matrix")
        k, v = _project(encoder.w_k, encoder.b_k, k_e), _project(encoder.w_v, encoder.b_v, v_e)
        for t in range(m):
            c += np.outer(k[t], k[t])
            moment += np.outer(k[t], v[t])
        n += m
        damp = math.exp(float(encoder.log_ridge)) * np.diag(c / n).mean() * np.eye(r)
        _close(rule.read(sums, encoder, "matrix"), np.linalg.solve(c / n + damp, moment / n))


@pytest.mark.parametrize("r", [1, 3, 5, 8])
def test_delta_rule_moves_the_state_least_for_what_a_fold_holds(r: int) -> None:
    """The minimum of ‖K X − V‖² + μ ‖X − S‖², written as one least squares problem."""
    encoder, rule = _encoder(r, r), UPDATE_RULES["delta"]
    sums = rule.start(encoder, "matrix")
    state, norms, n = np.zeros((r, r)), 0.0, 0
    assert torch.equal(rule.read(sums, encoder, "matrix"), torch.from_numpy(state))
    for seed, m in ((3, 4), (4, 1), (5, 9)):
        k_e, v_e = _evicted(m, seed=seed)
        sums = rule.fold(sums, encoder, k_e, v_e, "matrix")
        k, v = _project(encoder.w_k, encoder.b_k, k_e), _project(encoder.w_v, encoder.b_v, v_e)
        norms, n = norms + (np.asarray(k) ** 2).sum(), n + m
        root = math.sqrt(math.exp(float(encoder.log_ridge)) * norms / n)
        rows, wanted = np.vstack([k, root * np.eye(r)]), np.vstack([v, root * state])
        state = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        _close(rule.read(sums, encoder, "matrix"), state)


def test_delta_rule_overwrites_one_key_and_keeps_the_others() -> None:
    """The last of several values under a key; what other keys lead to is untouched."""
    r = 4
    encoder = _encoder(r, r)
    encoder = replace(
        encoder,
        w_k=torch.eye(r, encoder.w_k.shape[-1], dtype=torch.float64),
        w_v=torch.eye(r, encoder.w_v.shape[-1], dtype=torch.float64),
        b_k=torch.zeros_like(encoder.b_k),
        b_v=torch.zeros_like(encoder.b_v),
        log_ridge=torch.tensor(-30.0, dtype=torch.float64),
    )
    k_e, v_e = _evicted(3, seed=1)
    k_e[:, :r] = torch.eye(r, dtype=torch.float64)[:3]
    rule = UPDATE_RULES["delta"]
    before = rule.fold(rule.start(encoder, "matrix"), encoder, k_e, v_e, "matrix")
    after = rule.fold(before, encoder, k_e[:1], v_e[1:2], "matrix")
    wanted = torch.cat((v_e[1:2, :r], v_e[1:3, :r], torch.zeros(1, r, dtype=torch.float64)))
    _close(rule.read(after, encoder, "matrix"), wanted.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", ["ridge", "delta"])
def test_what_is_read_does_not_depend_on_the_unit_of_keys(
    name: str, features: str, factor: float, dtype: torch.dtype
) -> None:
    """W_K, b_K and A times c: the state is smaller by φ(c), and what A x reads the same."""
    r, rule = 5, UPDATE_RULES[name]
    encoder = replace(_encoder(r, r), features=features).map(lambda t: t.to(dtype))
    scaled = replace(encoder, w_k=factor * encoder.w_k, b_k=factor * encoder.b_k)
    a = torch.randn(7, r, generator=torch.Generator().manual_seed(6)).to(dtype)
    reads = []
    for each, asked in ((encoder, a), (scaled, factor * a)):
        sums = rule.start(each, "matrix")
        for seed, m in ((3, 4), (4, 1), (5, 9)):
            k, v = (side.to(dtype) for side in _evicted(m, seed=seed))
            sums = rule.fold(sums, each, k, v, "matrix")
        reads.append(reference.modulate(asked, rule.read(sums, each, "matrix"), "key", features))
    assert reads[0].abs().max() > 0.1
    _close(reads[1], reads[0].numpy(), 1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", ["ridge", "delta"])
def test_keys_of_zero_say_nothing_and_break_nothing(name: str, features: str) -> None:
    zero = _encoder()
    zero = replace(zero, w_k=0 * zero.w_k, b_k=0 * zero.b_k, features=features)
    encoder = zero.map(lambda t: t.float().requires_grad_())
    k, v = (side.float() for side in _evicted(4))
    rule = UPDATE_RULES[name]
    state = rule.read(
        rule.fold(rule.start(encoder, "matrix"), encoder, k, v, "matrix"), encoder, "matrix"
    )
    assert not state.any()
    state.sum().backward()
    assert all(
        t.grad is None or t.grad.isfinite().all()
        for t in (getattr(encoder, name) for name in reference.TENSORS)
    )


def test_layers_that_disagree_on_features_and_unknown_ones_are_refused() -> None:
    encoders = [_encoder(), replace(_encoder(), features="squared")]
    with pytest.raises(ValueError, match="layers disagree on features: linear, squared"):
        LayerEncoder.stack(encoders)
    with pytest.raises(ValueError, match="features must be one of linear, squared, got 'cubed'"):
        reference.feature_map(torch.ones(2), "cubed")


@pytest.mark.parametrize("name", sorted(UPDATE_RULES))
def test_layers_and_sequences_broadcast(name: str) -> None:
    encoders = [_encoder(seed=seed) for seed in range(3)]
    stacked, rule = LayerEncoder.stack(encoders), UPDATE_RULES[name]
    evicted = [_evicted(6, seed=seed) for seed in range(3)]
    k, v = (torch.stack(side) for side in zip(*evicted, strict=True))
    together = rule.fold(rule.start(stacked, "matrix"), stacked, k, v, "matrix")
    states = rule.read(together, stacked, "matrix")
    for layer, encoder in enumerate(encoders):
        alone = rule.fold(rule.start(encoder, "matrix"), encoder, *evicted[layer], "matrix")
        _close(states[layer], rule.read(alone, encoder, "matrix").numpy(), 1e-10)


@pytest.mark.parametrize("name", sorted(UPDATE_RULES))
def test_squared_features_are_keys_squared(name: str) -> None:
    """The same as plain features of keys that were squared beforehand; reading squares likewise."""
    r = 6
    encoder = replace(_encoder(6, 6), global_=torch.zeros(2, D_KV, dtype=torch.float64))
    k, v = _evicted(9)
    keys = torch.tensor(_project(encoder.w_k, encoder.b_k, k))
    keys **= 2
    direct = replace(
        encoder,
        w_k=torch.eye(r, D_KV, dtype=torch.float64),
        b_k=torch.zeros(r, dtype=torch.float64),
    )
    start = torch.tensor(_project(encoder.w_k, encoder.b_k, encoder.global_))
    start **= 2
    values = torch.tensor(_project(encoder.w_v, encoder.b_v, encoder.global_))
    rule, squared = UPDATE_RULES[name], replace(encoder, features="squared")
    found = rule.fold(rule.start(squared, "matrix"), squared, k, v, "matrix")
    sums = rule.start(direct, "matrix")
    if name in ("paper", "sum", "none"):
        kv = reference.Moments(kv=start.mT @ values, kk=None, num_tokens=2)
        sums = {"S": reference.normalize(reference.contribution_of(direct, kv), "matrix")}
    padded = torch.cat((keys, torch.zeros(len(keys), D_KV - r, dtype=torch.float64)), 1)
    wanted = rule.fold(sums, direct, padded, v, "matrix")
    s = rule.read(found, squared, "matrix")
    _close(s, rule.read(wanted, direct, "matrix").numpy(), 1e-9)
    a = torch.randn(4, r, dtype=torch.float64)
    _close(reference.modulate(a, s, "key", "squared"), (a**2 @ s).numpy())


def test_modulate_reads_by_key_or_by_value() -> None:
    a, s = torch.randn(7, 4), torch.randn(4, 4)
    for t in range(7):
        torch.testing.assert_close(reference.modulate(a, s, "key")[t], s.T @ a[t])
        torch.testing.assert_close(reference.modulate(a, s, "value")[t], s @ a[t])
    assert reference.modulate(torch.randn(7, 3), torch.randn(3, 6), "key").shape == (7, 6)


def test_relative_update_is_a_ratio_of_norms() -> None:
    s, new = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for i in range(2):
        wanted = math.sqrt(float((new[i] ** 2).sum() / (s[i] ** 2).sum()))
        assert float(reference.relative_update(s, new)[i]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scaling", [1.0, 1.37])
@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), [(1, 2, 2), (3, 10, 10), (2, 14, 6)])
def test_unrotate_inverts_the_models_own_rotation(
    heads: int, dim: int, rotary_dim: int, scaling: float
) -> None:
    m, generator = 9, torch.Generator().manual_seed(0)
    plain = torch.randn(2, heads, m, dim, generator=generator, dtype=torch.float64)
    positions = torch.arange(1000, 1000 + m, dtype=torch.float64)
    freqs = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = positions[:, None] * freqs
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    full_cos, full_sin = (torch.cat((t, t), -1)[None] for t in (cos, sin))
    turned = plain[..., :rotary_dim]
    _, turned = apply_rotary_pos_emb(turned, turned, full_cos, full_sin)
    cached = torch.cat((turned, plain[..., rotary_dim:]), -1).transpose(1, 2)  # [2, m, H, D]
    back = rope.unrotate(cached, cos, sin)
    torch.testing.assert_close(back, plain.transpose(1, 2))


def test_map_reaches_every_tensor() -> None:
    encoder = replace(_encoder(), features="squared")
    doubled = encoder.map(lambda t: t * 2)
    assert doubled.features == "squared" and set(reference.TENSORS) < set(vars(encoder))
    for name in reference.TENSORS:
        assert torch.equal(getattr(doubled, name), getattr(encoder, name) * 2)


@pytest.mark.parametrize("log_ridge", [0.0, -30.0])
@pytest.mark.parametrize("features", FEATURES)
def test_ridge_in_fp32_stays_exact_over_many_folds(features: str, log_ridge: float) -> None:
    """Against a solve in fp64, with keys of which some directions are a hundredth of others."""
    r, rule = 4, UPDATE_RULES["ridge"]
    draw = torch.Generator().manual_seed(0)
    encoder = replace(_encoder(r, r), features=features).map(lambda t: t.float())
    scale = 10 ** torch.linspace(0, -2, encoder.w_k.shape[-1])
    encoder = replace(encoder, b_k=0 * encoder.b_k, log_ridge=torch.tensor(log_ridge))
    sums, c, moment = rule.start(encoder, "matrix"), 0.0, 0.0
    for _ in range(300):
        k_e, v_e = torch.randn(2, 16, encoder.w_k.shape[-1], generator=draw)
        k_e = k_e * scale
        sums = rule.fold(sums, encoder, k_e, v_e, "matrix")
        k, v = (side.double() for side in reference.project(encoder, k_e, v_e))
        c, moment = c + k.mT @ k, moment + k.mT @ v
    mu = (math.exp(log_ridge) + reference.EPS) * c.diagonal().mean()
    wanted = torch.linalg.solve(c + mu * torch.eye(r, dtype=torch.float64), moment)
    found = rule.read(sums, encoder, "matrix").double()
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
