"""Every equation of the method, once (arXiv 2602.16839, section 3; `ridge`, `delta` and `squared`
features are ours).

All functions broadcast over leading dimensions `*`, so that one call serves one layer of one
sequence, a batch of sequences, or all layers at once (an encoder whose tensors are stacked).

Shapes: m evicted tokens, G global tokens, r rank, d_kv = KV heads × head size, n_h learned
global vectors.  `S: [*, G, r]` is the thought state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from pte_vllm.method.names import FEATURES

EPS = 1e-6
_TINY = 1e-30
"""The damping where all keys are zero: below all others, and large enough to divide by in fp32."""

Sums = dict[str, Tensor]
"""What a sequence keeps between folds."""


@dataclass(frozen=True, kw_only=True)
class LayerEncoder:
    """The encoder of one layer, or of several when every tensor has a leading layer dimension."""

    query: Tensor  # [*, G, d_kv]   q_g
    global_: Tensor  # [*, n_h, d_kv] h_g
    w_q: Tensor  # [*, r, d_kv]
    w_k: Tensor  # [*, r, d_kv]
    w_v: Tensor  # [*, r, d_kv]
    gain: Tensor  # [*]            g
    b_k: Tensor  # [*, r]
    b_v: Tensor  # [*, r]
    log_ridge: Tensor  # [*]            log λ
    features: str = "linear"
    """φ of `feature_map`: of keys, and of A x when it meets them."""

    @classmethod
    def stack(cls, encoders: Sequence[LayerEncoder]) -> LayerEncoder:
        """Return all layers as one encoder whose tensors have a leading dimension of layers.

        Raises:
            ValueError: If their features differ.
        """
        kinds = {encoder.features for encoder in encoders}
        if len(kinds) > 1:
            raise ValueError(f"layers disagree on features: {', '.join(sorted(kinds))}")
        stacked = {name: torch.stack([getattr(e, name) for e in encoders]) for name in TENSORS}
        return cls(**stacked, features=encoders[0].features)

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerEncoder:
        """Return an encoder of `function(t)` for every tensor t, such as a move to a device."""
        tensors = {name: function(getattr(self, name)) for name in TENSORS}
        return LayerEncoder(**tensors, features=self.features)


TENSORS = tuple(f.name for f in fields(LayerEncoder) if f.name != "features")
"""The names of the tensors of a `LayerEncoder`."""


def feature_map(x: Tensor, features: str) -> Tensor:
    """Return φ(x): x itself, or with features `squared` the square of each number.

    With linear features the state answers with a sum over all keys, each by its inner product with
    A x. Squares of the numbers are a sketch of a kernel of degree two: what is most alike weighs
    more against the rest, as under softmax, and a weight is never negative.

    Raises:
        ValueError: On a name that it does not know.
    """
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    return x.square() if features == "squared" else x


def project(encoder: LayerEncoder, k_e: Tensor, v_e: Tensor) -> tuple[Tensor, Tensor]:
    """Encode keys and values: `φ(K_e W_Kᵀ + b_K)` and `V_e W_Vᵀ + b_V`, each `[*, m, r]`."""
    return encode(encoder, *multiply(encoder, k_e, v_e))


def multiply(encoder: LayerEncoder, k_e: Tensor, v_e: Tensor) -> tuple[Tensor, Tensor]:
    """Return `K_e W_Kᵀ` and `V_e W_Vᵀ`, each `[*, m, r]`: sums over heads, which may be shared out.

    An encoder whose projections are narrowed to some heads gives the share of those.
    """
    return k_e @ encoder.w_k.mT, v_e @ encoder.w_v.mT


def encode(encoder: LayerEncoder, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Encode what `multiply` returns, over all heads: `φ(k + b_K)` and `v + b_V`."""
    keys = feature_map(k + encoder.b_k[..., None, :], encoder.features)
    return keys, v + encoder.b_v[..., None, :]


@dataclass(frozen=True)
class Moments:
    """All that a fold takes from m evicted tokens: two sums over them, in any order."""

    kv: Tensor  # [*, r, r] Σ kᵀv
    kk: Tensor | None  # [*, r, r] Σ kᵀk, for the rules that read it
    num_tokens: int  # m


def moments(encoder: LayerEncoder, k_e: Tensor, v_e: Tensor, *, with_kk: bool) -> Moments:
    """Sum up kᵀv, and kᵀk if asked, of the encoded `k_e, v_e: [*, m, d_kv]`."""
    return moments_of(encoder, *multiply(encoder, k_e, v_e), with_kk=with_kk)


def moments_of(encoder: LayerEncoder, k: Tensor, v: Tensor, *, with_kk: bool) -> Moments:
    """Do the same with what `multiply` returns over all heads, each `[*, m, r]`."""
    k, v = encode(encoder, k, v)
    return Moments(kv=k.mT @ v, kk=k.mT @ k if with_kk else None, num_tokens=k.shape[-2])


def contribution_of(encoder: LayerEncoder, evicted: Moments) -> Tensor:
    """Return S' = (g/m) (q_g W_Qᵀ) Σ kᵀv, `[*, G, r]`: linear attention of the global queries."""
    queries = encoder.query @ encoder.w_q.mT
    scale = encoder.gain[..., None, None] / evicted.num_tokens
    return scale * (queries @ evicted.kv)


def contribution(encoder: LayerEncoder, k_e: Tensor, v_e: Tensor) -> Tensor:
    """Return S' of `k_e, v_e: [*, m, d_kv]`, which `project` encodes; `[*, G, r]`."""
    return contribution_of(encoder, moments(encoder, k_e, v_e, with_kk=False))


def normalize(s: Tensor, how: str) -> Tensor:
    """Scale S, `[*, G, r]`: `matrix` to the Frobenius norm √r, `row` every row to the L2 norm 1."""
    if how == "row":
        return F.normalize(s, dim=-1, eps=EPS)
    norm = s.flatten(-2).norm(dim=-1)[..., None, None]
    scaled: Tensor = s * (math.sqrt(s.shape[-1]) / (norm + EPS))
    return scaled


def initial_state(encoder: LayerEncoder, how: str) -> Tensor:
    """Return S_0 = Normalize(S'(K_e = V_e = h_g)), the state before any fold, `[*, G, r]`."""
    return normalize(contribution(encoder, encoder.global_, encoder.global_), how)


def modulate(a: Tensor, s: Tensor, read: str, features: str = "linear") -> Tensor:
    """Return what stands between A and B: `Sᵀφ(A x)` for read `key`, `S(A x)` for `value`.

    `a: [*, T, G]`, `s: [*, G, r]`; returns `[*, T, r]` (for `value`, G must equal r).
    """
    return feature_map(a, features) @ (s if read == "key" else s.mT)


def relative_update(s: Tensor, update: Tensor) -> Tensor:
    """Return ‖update‖ / ‖S‖ per state, `[*]`; 1 where S is zero and everything in it is new.

    With `update` = S' this is the paper's weight of a fold; with S_new − S, how far S moved.
    """
    norm = s.flatten(-2).norm(dim=-1)
    ratio = update.flatten(-2).norm(dim=-1) / norm.clamp(min=EPS)
    return torch.where(norm > EPS, ratio, torch.ones_like(ratio))


class UpdateRule(ABC):
    """A rule says what a sequence keeps between folds, and how its state is read from that."""

    reads_kk = False
    """Whether `add` needs Σ kᵀk."""
    changes = True
    """Whether folds change the sums."""
    state_sum: str | None = "S"
    """The name of the sum that `read` returns as it stands; None where there is no such sum."""
    symmetric: tuple[str, ...] = ()
    """The names of sums that are symmetric matrices."""

    @abstractmethod
    def start(self, encoder: LayerEncoder, how: str) -> Sums:
        """Return the sums before any fold."""

    def fold(self, sums: Sums, encoder: LayerEncoder, k_e: Tensor, v_e: Tensor, how: str) -> Sums:
        """Return the sums after a fold of `k_e, v_e: [*, m, d_kv]`."""
        return self.add(sums, encoder, moments(encoder, k_e, v_e, with_kk=self.reads_kk), how)

    @abstractmethod
    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        """Return the sums after a fold, from its tokens' moments, however they were computed."""

    @abstractmethod
    def read(self, sums: Sums, encoder: LayerEncoder, how: str) -> Tensor:
        """Return S, `[*, G, r]`, as the sums have it."""


class PaperRule(UpdateRule):
    """The paper's rule sets S ← Normalize(S + S') after each fold."""

    def start(self, encoder: LayerEncoder, how: str) -> Sums:
        return {"S": initial_state(encoder, how)}

    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        return {"S": normalize(sums["S"] + contribution_of(encoder, evicted), how)}

    def read(self, sums: Sums, encoder: LayerEncoder, how: str) -> Tensor:
        return sums["S"]


class SumRule(PaperRule):
    """This rule sets S ← S + S' and normalises only what is read, so that no fold fades."""

    state_sum = None

    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        return {"S": sums["S"] + contribution_of(encoder, evicted)}

    def read(self, sums: Sums, encoder: LayerEncoder, how: str) -> Tensor:
        return normalize(sums["S"], how)


class NoneRule(PaperRule):
    """This rule keeps S at S_0, the paper's "Global-Only" control; nothing is encoded."""

    changes = False

    def fold(self, sums: Sums, encoder: LayerEncoder, k_e: Tensor, v_e: Tensor, how: str) -> Sums:
        return sums

    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        return sums


def damping(encoder: LayerEncoder, level: Tensor) -> Tensor:
    """Return (λ + ε) · level, `[*]`: the damping of a solve by Σ kᵀk with numbers of size `level`.

    ε keeps the solve well posed where λ vanishes. It scales with the level, which with squared
    features is quartic in the keys: a fixed floor would damp away all that small keys say.
    """
    return (encoder.log_ridge.exp() + EPS) * level + _TINY


def solve_damped(c: Tensor, damp: Tensor, right: Tensor) -> Tensor:
    """Return (C + damp·I)⁻¹ · right of definite `c: [*, r, r]`, `damp: [*]`, `right: [*, r, r]`."""
    identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    # solve_ex does not wait for the device to report singularity; C + damp is definite.
    solution: Tensor = torch.linalg.solve_ex(c + damp[..., None, None] * identity, right)[0]
    return solution


class RidgeRule(UpdateRule):
    """This rule fits S to all folded pairs by ridge regression; S is zero before any fold.

    S = (C + μI)⁻¹ M with C = Σ kᵀk, M = Σ kᵀv and μ = (λ + ε)·mean(diag(C)) over all tokens. M is
    not kept: it is (C + μI) S, so that a fold moves S by (C + μI)⁻¹ (Σ kᵀv − Σ kᵀk S − Δμ S), with
    sums over its own tokens, Δμ what they add to μ, and C and μ after it (recursive least squares).
    In fp32 this is at least as exact as a solve for M: errors of earlier folds fade as C grows.
    """

    reads_kk = True
    symmetric = ("C",)

    def start(self, encoder: LayerEncoder, how: str) -> Sums:
        rank = encoder.w_k.shape[-2]
        zero = encoder.w_k.new_zeros(*encoder.w_k.shape[:-2], rank, rank)
        return {"S": zero, "C": zero.clone()}

    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        assert evicted.kk is not None
        state, c = sums["S"], sums["C"] + evicted.kk
        more, mu = (
            damping(encoder, s.diagonal(dim1=-2, dim2=-1).mean(-1)) for s in (evicted.kk, c)
        )
        unsaid = evicted.kv - evicted.kk @ state - more[..., None, None] * state
        return {"S": state + solve_damped(c, mu, unsaid), "C": c}

    def read(self, sums: Sums, encoder: LayerEncoder, how: str) -> Tensor:
        return sums["S"]


class DeltaRule(UpdateRule):
    """This rule overwrites what a fold's keys lead to: S ← argmin_X ‖K X − V‖² + μ ‖X − S‖².

    In closed form S ← (Σ kᵀk + μ I)⁻¹ (Σ kᵀv + μ S), zero before any fold, with μ = λ + ε times
    the mean |k|² of all tokens folded so far. For a single token it is the delta rule with the
    implicit step size 1 / (μ + |k|²). Keys that a fold does not touch keep what they lead to.
    """

    reads_kk = True

    def start(self, encoder: LayerEncoder, how: str) -> Sums:
        rank = encoder.w_k.shape[-2]
        zero = encoder.gain.new_zeros(encoder.gain.shape)
        state = encoder.w_k.new_zeros(*encoder.w_k.shape[:-2], rank, rank)
        return {"S": state, "kk": zero, "n": zero.clone()}

    def add(self, sums: Sums, encoder: LayerEncoder, evicted: Moments, how: str) -> Sums:
        assert evicted.kk is not None
        norms = sums["kk"] + evicted.kk.diagonal(dim1=-2, dim2=-1).sum(-1)  # Σ |k|²
        count = sums["n"] + evicted.num_tokens
        mu = damping(encoder, norms / count)
        right = evicted.kv + mu[..., None, None] * sums["S"]
        return {"S": solve_damped(evicted.kk, mu, right), "kk": norms, "n": count}

    def read(self, sums: Sums, encoder: LayerEncoder, how: str) -> Tensor:
        return sums["S"]


UPDATE_RULES: dict[str, UpdateRule] = {
    "paper": PaperRule(),
    "sum": SumRule(),
    "none": NoneRule(),
    "ridge": RidgeRule(),
    "delta": DeltaRule(),
}
"""The update rules by name."""
