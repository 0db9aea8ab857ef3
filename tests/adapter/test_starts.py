"""New adapters: the model is untouched, A asks where keys are stored, the gain is calibrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.init import TARGET_RHO, init_adapter
from pte_vllm.adapter.inspect import describe
from pte_vllm.adapter.starts import LayerReport, _mixtures, query_key_form
from pte_vllm.cli.main import main
from pte_vllm.method.names import FEATURES, INITS
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.reference import UPDATE_RULES, modulate
from pte_vllm.train.options.sections import AdapterOptions
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from tests.harness.models import random_tokens

PLAN = FoldPlan(pin_tokens=16, window_tokens=64, evict_ratio=0.5, block_size=16)


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _text(sequences: int = 4, tokens: int = 192) -> Tensor:
    """Random tokens, the early ones again at the end."""
    rows = []
    for i in range(sequences):
        body = random_tokens(tokens - 64, seed=i)
        rows.append(body + body[32:96])
    return torch.tensor(rows)


def _init(path: Path, **options: Any) -> tuple[Adapter, list[LayerReport]]:
    config = {"rank": 8, "global_tokens": 8, "rule": "ridge", **options}
    reports: list[LayerReport] = []
    extra = {k: config.pop(k) for k in ("layers", "b", "alpha", "seed") if k in config}
    adapter = init_adapter(
        _load(path), _text(), PTEConfig(**config), progress=reports.append, **extra
    )
    return adapter, reports


def _spd(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, size, generator=generator)
    return root @ root.T / size


def _queries_and_keys(count: int = 4000, size: int = 16) -> tuple[Tensor, Tensor]:
    """Correlated numbers, whose leading directions differ between the two."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(size).neg().div(4).exp()
    q, k = (torch.randn(count, size, generator=generator) * decay for _ in range(2))
    return q @ _spd(size, generator), k @ _spd(size, generator)


def test_the_form_is_exact_at_full_rank_and_good_below() -> None:
    q, k = _queries_and_keys()
    scores = q[:300] @ k[:300].T
    errors = []
    for rank in (16, 8, 4):
        w_k, w_a = query_key_form(q, k, rank)
        found = (q[:300] @ w_a.T) @ (k[:300] @ w_k.T).T
        errors.append(float((found - scores).norm() / scores.norm()))
    assert errors[0] < 1e-4 and errors[1] < 0.1 and errors[1] < errors[2] < 0.5
    random = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) / 4
    blind = (q[:300] @ random.T) @ (k[:300] @ random.T).T
    assert errors[1] < 0.2 * float((blind - scores).norm() / scores.norm())


def test_mixtures_sketch_the_square_of_the_form() -> None:
    """Σ_w (w·q)² (w·k)² → 2 (q̃·k̃)² + |q̃|²|k̃|², q̃ and k̃ at the spread of their directions."""
    q, k = _queries_and_keys()
    w_k, w_a = query_key_form(q, k, 16)
    spread = (k - k.mean(0)) @ w_k.T
    spread = spread.square().mean(0).sqrt()[:, None]
    mix_k, mix_a = _mixtures(w_k, w_a, k, 20_000, torch.Generator().manual_seed(2))
    q, k = q[:60], k[:60]
    found = (q @ mix_a.T).square() @ (k @ mix_k.T).square().T / 20_000
    q, k = q @ (w_a / spread).T, k @ (w_k / spread).T
    wanted = (2 * (q @ k.T).square() + q.square().sum(1)[:, None] * k.square().sum(1)) / 16**2
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("init", INITS)
def test_a_fresh_adapter_leaves_the_model_as_it_is(
    architecture: str, init: str, tiny: Callable[[str], Path]
) -> None:
    path, ids = tiny(architecture), random_tokens(200, seed=9)
    adapter, reports = _init(path, init=init)
    assert [report.layer for report in reports] == adapter.layers == [0, 1, 2]
    scores = []
    for made in (None, adapter):
        model = PTEModel(_load(path), made)
        scores.append(log_probs(model, ids, PLAN).logprobs)
        model.detach()
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("features", FEATURES)
def test_a_fold_weighs_what_it_should(features: str, tiny: Callable[[str], Path]) -> None:
    for report in _init(tiny("llama"), rule="paper", features=features)[1]:
        assert sum(report.rho) / len(report.rho) == pytest.approx(TARGET_RHO, rel=1e-3)
        assert len(report.rho) == 4 and report.far_attention is not None


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_state_answers_like_the_head_before_any_training(
    architecture: str, tiny: Callable[[str], Path]
) -> None:
    """At the head's own rank A x meets encoded keys as the head's queries meet its keys."""
    path, rank = tiny(architecture), 32  # the head size
    adapter, reports = _init(path, rank=rank, global_tokens=rank)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 96, generator=generator)
    base = _load(path)
    for report in reports:
        encoder, attention = (
            adapter.encoders[report.layer],
            base.model.layers[report.layer].self_attn,
        )
        assert report.query_head is not None and report.kv_head == report.query_head // 2
        own = slice(32 * report.kv_head, 32 * report.kv_head + 32)
        assert encoder.w_k[:, own].any() and not encoder.w_k.abs().sum(0)[: own.start].any()
        k = torch.randn(40, 64, generator=generator)
        rows = slice(32 * report.query_head, 32 * report.query_head + 32)
        q = x @ attention.q_proj.weight[rows].T
        if architecture == "qwen3":
            q = q * attention.q_norm.weight  # but for the norm, which differs by token
        wanted = (q @ k[:, own].T).flatten()
        a = adapter.lora_a[f"model.layers.{report.layer}.self_attn.v_proj"]
        found = ((x @ a.T) @ (k @ encoder.w_k.T).T).flatten()
        cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
        assert cosine > 0.999, report


@pytest.mark.parametrize("features", FEATURES)
def test_a_key_asked_for_gives_back_its_value(features: str, tiny: Callable[[str], Path]) -> None:
    """One of 24 folded keys, asked for as a query that is like it: its value comes out, roughly."""
    adapter, _ = _init(tiny("llama"), rank=32, global_tokens=32, features=features)
    encoder = replace(adapter.encoders[1], log_ridge=torch.tensor(-8.0))  # hardly damped
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(24, 64, generator=generator) for _ in range(2))
    rule = UPDATE_RULES["ridge"]
    sums = rule.fold(rule.start(encoder, "matrix"), encoder, k, v, "matrix")
    state = rule.read(sums, encoder, "matrix")
    keys = k @ encoder.w_k.T + encoder.b_k
    values = v @ encoder.w_v.T + encoder.b_v
    found = modulate(keys, state, "key", features)
    guesses = torch.cdist(found, values).argmin(1)
    assert (guesses == torch.arange(24)).float().mean() > 0.9


def test_layers_b_alpha_and_seed(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama")
    some, _ = _init(path, layers=[0, 2], b="random", alpha=4, seed=5)
    every, _ = _init(path, seed=5)
    other, _ = _init(path, seed=6, init="random")
    assert some.layers == [0, 2] and some.scale == 0.5
    assert all(b.any() for b in some.lora_b.values())
    name = "model.layers.2.self_attn.q_proj"
    assert torch.equal(some.lora_a[name], every.lora_a[name])  # whichever others are chosen
    assert not torch.equal(other.lora_a[name], every.lora_a[name])
    for layers, message in (([], "names no layer"), ([0, 3], "layers 0-2, not 3")):
        with pytest.raises(ValueError, match=message):
            _init(path, layers=layers)
    with pytest.raises(ValueError, match="alpha must be positive"):
        _init(path, alpha=0)
    with pytest.raises(ValueError, match="no linear 'c_proj'"):
        init_adapter(_load(path), _text(), PTEConfig(), target_modules=["q_proj", "c_proj"])


@pytest.mark.parametrize(
    ("flags", "rule", "features"),
    [
        ([], "ridge", "squared"),
        (["--rule", "delta"], "delta", "squared"),
        (["--rule", "paper"], "paper", "linear"),
        (["--read", "value"], "ridge", "linear"),
        (["--init", "random"], "ridge", "linear"),
        (["--init", "aligned_key", "--features", "squared"], "ridge", "squared"),
        (["--init", "aligned_mean"], "ridge", "squared"),
        (["--rule", "paper", "--features", "squared"], "paper", "squared"),
    ],
)
def test_what_the_command_makes_unless_told(
    flags: list[str], rule: str, features: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same from the command, from the trainer's options, and in what `inspect` says."""
    out = tmp_path / "adapter"
    args = ["adapter", "init", str(tiny("llama")), str(out), "--rank", "4", *flags]
    assert main(args) == 0
    about = describe(out)
    assert (about["rule"], about["features"]) == (rule, features)
    assert about["encoder_parameters"] == 3 * (5 * 4 * 64 + 2 * 4 + 2)
    # Three layers; a token of the cache has keys and values of 64 numbers in each.
    weight = 3 * {"ridge": 6 * 16 + 2 * 4, "paper": 4 * 16, "delta": 4 * 16 + 8}[rule]
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        tokens = round(weight / (3 * 2 * 64 * itemsize), 1)
        assert about["state"][dtype] == {"bytes_per_sequence": weight, "kv_tokens": tokens}
    given = {flags[i].removeprefix("--"): flags[i + 1] for i in range(0, len(flags), 2)}
    pte = AdapterOptions(rank=4, **given).pte()
    assert (pte.rule, pte.features) == (rule, features)
