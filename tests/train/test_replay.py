"""The replay against full forwards, merged weights, and the method spelled out (`naive.py`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Fold, Scores
from pte_vllm.train.replay.segments import log_probs
from tests.harness.models import random_tokens
from tests.train import naive

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
PROMPT = 41  # not a multiple of the block size
LENGTH = 203  # folds at 112, 128, … 192 with the plan below, and a last segment of odd length


def plan(pin_tokens: int = PROMPT, window_blocks: int = 4, evict_ratio: float = 0.25) -> FoldPlan:
    return FoldPlan(
        pin_tokens=pin_tokens,
        window_tokens=window_blocks * BLOCK,
        evict_ratio=evict_ratio,
        block_size=BLOCK,
    )


def load(path: Path, attention: str = "sdpa", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=attention, **{"dtype": torch.float32, **options}
    ).eval()


@dataclass
class Found:
    logprobs: torch.Tensor  # [T - 1]
    states: torch.Tensor | None  # [L, G, r]
    folds: list[Fold]
    logits: torch.Tensor | None  # [T - 1, V]


class Replay:
    """One sequence at a time; gives the model back at the end."""

    def __init__(self, model: Any, adapter: Adapter | None = None) -> None:
        self.model = PTEModel(model, adapter)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.model.detach()

    def log_probs(self, ids: list[int], fold_plan: FoldPlan, **options: Any) -> Found:
        logits: list[torch.Tensor] = []

        def keep(scores: Scores) -> torch.Tensor:
            logits.append(scores.logits)
            return scores.logprobs.sum()

        found = log_probs(self.model, ids, fold_plan, loss=keep, **options)
        return Found(
            logprobs=found.logprobs[0, 1:],
            states=None if found.states is None else found.states[:, 0],
            folds=found.folds[0],
            logits=torch.cat(logits) if logits else None,
        )


def assert_matches_naive(
    path: Path, adapter: Adapter, fold_plan: FoldPlan, rule: str, **options: Any
) -> None:
    ids = random_tokens(LENGTH, seed=5)
    expected, states = naive.log_probs(
        load(path, "eager", **options), adapter, ids, fold_plan, rule
    )
    with Replay(load(path, **options), adapter) as replay:
        found = replay.log_probs(ids, fold_plan, rule=rule)
    assert found.states is not None
    assert len(found.folds) == len(naive.walk(LENGTH, fold_plan)[1]) > 0
    torch.testing.assert_close(found.logprobs, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.states, states, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_unbounded_plan_is_one_full_forward(architecture: str, tiny: Tiny) -> None:
    model, ids = load(tiny(architecture)), random_tokens(LENGTH)
    with Replay(model) as replay:
        found = replay.log_probs(ids, plan(window_blocks=0))
        logits = model(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(LENGTH - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=0)
    assert found.logits is not None
    torch.testing.assert_close(found.logits, logits[:-1], atol=1e-5, rtol=0)
    assert found.folds == [] and found.states is None


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_window_is_the_method_spelled_out(
    architecture: str, rule: str, tiny: Tiny, adapters: Adapters
) -> None:
    path = tiny(architecture)
    adapter = Adapter.load(adapters(path, rule="paper"))  # so every rule but one is an override
    assert_matches_naive(path, adapter, plan(), rule)


@pytest.mark.parametrize(
    "options",
    [
        {"read": "value"},
        {"keys": "rotated", "rule": "ridge"},
        {"normalize": "row"},
        {"features": "squared"},
        {"features": "squared", "rule": "ridge"},
        {"features": "squared", "rule": "delta"},
        {"normalize": "row", "rule": "sum", "global_tokens": 12},
        {"layers": [1]},
        {"targets": ["q_proj", "v_proj", "down_proj"]},
    ],
    ids=str,
)
def test_named_options(options: dict[str, Any], tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    adapter = Adapter.load(adapters(path, **options))
    assert_matches_naive(path, adapter, plan(), options.get("rule", "paper"))


@pytest.mark.parametrize(
    ("pin_tokens", "window_blocks", "evict_ratio", "options"),
    [
        (PROMPT, 4, 0.25, {"rule": "ridge", "features": "squared"}),
        (0, 6, 0.4, {"rule": "delta"}),
        (30, 5, 0.4, {"keys": "rotated"}),
    ],
)
def test_random_blocks(
    pin_tokens: int,
    window_blocks: int,
    evict_ratio: float,
    options: dict[str, Any],
    tiny: Tiny,
    adapters: Adapters,
) -> None:
    """What is drawn leaves the cache and goes into S: with the oldest both would be others."""
    path = tiny("llama")
    adapter = Adapter.load(adapters(path, **options))
    oldest = plan(pin_tokens, window_blocks, evict_ratio)
    drawn = replace(oldest, evict="random", evict_seed=5)
    rule = options.get("rule", "paper")
    assert_matches_naive(path, adapter, drawn, rule)
    ids = random_tokens(LENGTH, seed=5)
    with Replay(load(path), adapter) as replay:
        plans = oldest, drawn, replace(drawn, evict_seed=6)
        found = [replay.log_probs(ids, p) for p in plans]
    assert len({len(one.folds) for one in found}) == 1
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one.logprobs - other.logprobs)[oldest.first_fold :].abs().mean() > 0.02
            assert (one.states - other.states).norm() > 0.01 * other.states.norm()


@pytest.mark.parametrize("pin_tokens", [0, 1, 16, 30, PROMPT, 48])
@pytest.mark.parametrize(("window_blocks", "evict_ratio"), [(2, 0.25), (5, 0.6)])
def test_pins_and_windows(
    pin_tokens: int, window_blocks: int, evict_ratio: float, tiny: Tiny, adapters: Adapters
) -> None:
    path = tiny("qwen3")
    adapter = Adapter.load(adapters(path, rule="sum"))
    assert_matches_naive(path, adapter, plan(pin_tokens, window_blocks, evict_ratio), "sum")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda r: r["rope_type"],
)
@pytest.mark.parametrize("keys", ["unrotated", "rotated"])
def test_scaled_rope(rope: dict[str, Any], keys: str, tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    config = AutoConfig.from_pretrained(path, rope_parameters={"rope_theta": 10_000.0, **rope})
    adapter = Adapter.load(adapters(path, keys=keys))
    model = load(path, config=config)
    if rope["rope_type"] == "yarn":
        assert model.model.rotary_emb.attention_scaling > 1.1
    assert_matches_naive(path, adapter, plan(), "paper", config=config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 16])
def test_chunks_and_attention_do_not_matter(
    chunk_tokens: int, attention: str, tiny: Tiny, adapters: Adapters
) -> None:
    path, ids = tiny("llama"), random_tokens(LENGTH, seed=3)
    adapter = Adapter.load(adapters(path))
    with Replay(load(path), adapter) as replay:
        whole = replay.log_probs(ids, plan())
    with Replay(load(path, attention), adapter) as replay:
        cut = replay.log_probs(ids, plan(), chunk_tokens=chunk_tokens)
    torch.testing.assert_close(cut.logprobs, whole.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(cut.states, whole.states, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(cut.logits, whole.logits, atol=2e-4, rtol=0)
    assert [f.spans for f in cut.folds] == [f.spans for f in whole.folds]


def test_plain_lora_is_merged_weights(tiny: Tiny, adapters: Adapters) -> None:
    peft = pytest.importorskip("peft")
    path, ids = tiny("qwen2"), random_tokens(LENGTH)
    directory = adapters(path, plain=True, rank=6)
    merged = peft.PeftModel.from_pretrained(load(path), directory).merge_and_unload()
    with torch.no_grad():
        unbounded = plan(window_blocks=0)
        with Replay(load(path), Adapter.load(directory)) as replay:
            found, windowed = (replay.log_probs(ids, p) for p in (unbounded, plan()))
        with Replay(merged) as replay:
            expected, merged_windowed = (replay.log_probs(ids, p) for p in (unbounded, plan()))
        with Replay(load(path)) as replay:
            bare = replay.log_probs(ids, unbounded)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(windowed.logprobs, merged_windowed.logprobs, atol=1e-4, rtol=0)
    assert (found.logprobs - bare.logprobs).abs().mean() > 0.05
    assert found.states is None and windowed.states is None
    assert len(windowed.folds) == 6 and windowed.folds[0].rho.shape == (0,)


def test_folds_are_reported_and_none_at_the_end(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    adapter = Adapter.load(adapters(path))
    ids, first = random_tokens(160), plan().first_fold
    assert first == 112
    with Replay(load(path), adapter) as replay:
        results = {n: replay.log_probs(ids[:n], plan()) for n in (1, first, first + 1, 160)}
    assert [len(r.folds) for r in results.values()] == [0, 0, 1, 3]
    assert [r.logprobs.shape[0] for r in results.values()] == [0, first - 1, first, 159]
    assert [(f.at, f.spans) for f in results[160].folds] == [
        (112, ((3, 4),)),
        (128, ((4, 5),)),
        (144, ((5, 6),)),
    ]
    assert all(f.rho.shape == (3,) and (f.rho > 0.2).all() for f in results[160].folds)
    for n, result in results.items():  # later tokens change nothing before them
        expected = results[160].logprobs[: n - 1]
        torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=0)
    states = [result.states for result in results.values() if result.states is not None]
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[1], states[2])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_fixtures_tell_right_from_wrong(
    architecture: str, tiny: Tiny, adapters: Adapters
) -> None:
    """Window, adapter and each rule change the log-probs by far more than any tolerance."""
    path, ids = tiny(architecture), random_tokens(LENGTH)
    model = load(path)
    after = slice(plan().first_fold, None)
    with torch.no_grad():
        with Replay(model) as replay:
            full, bare = (
                replay.log_probs(ids, p).logprobs for p in (plan(window_blocks=0), plan())
            )
        with Replay(model, Adapter.load(adapters(path))) as replay:
            by_rule = [replay.log_probs(ids, plan(), rule=rule).logprobs for rule in RULE_NAMES]
    runs = [full, bare, *by_rule]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            assert (one - other)[after].abs().mean() > 0.05


def test_closing_restores_the_model(tiny: Tiny, adapters: Adapters) -> None:
    path, ids = tiny("llama"), torch.tensor([random_tokens(40)])
    model = load(path)
    with torch.no_grad():
        before = model(ids).logits
        with Replay(model, Adapter.load(adapters(path, plain=True))):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_bf16_model_reads_a_bf16_state_and_keeps_it_in_fp32(tiny: Tiny, adapters: Adapters) -> None:
    path, ids = tiny("llama"), random_tokens(LENGTH)
    adapter = Adapter.load(adapters(path, rule="ridge"))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with Replay(load(path, dtype=dtype), adapter) as replay:
            found[dtype] = replay.log_probs(ids, plan())
    exact, rounded = found[torch.float32], found[torch.bfloat16]
    assert exact.states is not None and rounded.states is not None
    assert rounded.logprobs.dtype == rounded.states.dtype == torch.float32
    assert torch.equal(rounded.states, rounded.states.bfloat16().float())
    assert not torch.equal(exact.states, exact.states.bfloat16().float())
    assert (rounded.states - exact.states).norm() < 0.1 * exact.states.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, "long"),
        ({"sliding_window": 64}, "full attention"),
    ],
)
def test_models_that_are_refused(
    change: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny("mistral"), path)
    config = json.loads((path / "config.json").read_text())
    if "rope_type" in change:
        original = {"original_max_position_embeddings": 4096, "rope_theta": 10_000.0}
        config["rope_parameters"] = original | change
    else:
        config |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Replay(load(path))


def test_arguments_that_are_refused(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    model = load(path)
    wide = Adapter.load(adapters(path, global_tokens=12))
    with Replay(model, wide) as replay:
        for ids, options, message in (
            ([], {}, "empty"),
            ([5, 6], {"rule": "mean"}, "mean"),
            ([5, 6], {"rule": "ridge"}, "ridge"),
            ([5, 6], {"chunk_tokens": 0}, "chunk_tokens"),
        ):
            with pytest.raises(ValueError, match=message):
                replay.log_probs(ids, plan(), **options)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match=r"layers\.2\."):
        Replay(model, wide)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "ridge", "features": "squared"}, "features is squared, the model's is linear; "),
        ({"rule": "ridge"}, "rule is ridge, the model's is paper$"),
        ({"keys": "rotated"}, "keys is rotated, the model's is unrotated$"),
        ({"rank": 4, "global_tokens": 4}, "r is 4, the model's is 8; rank is 4"),
        ({"layers": [0, 1]}, "other modules or layers"),
        ({"plain": True}, "other modules or layers"),
    ],
    ids=str,
)
def test_weights_of_another_form_are_refused(
    options: dict[str, Any], message: str, tiny: Tiny, adapters: Adapters
) -> None:
    path = tiny("llama")
    own = adapters(path)
    model = PTEModel(load(path), Adapter.load(own))
    with pytest.raises(ValueError, match=message):
        model.load_adapter_weights(Adapter.load(adapters(path, **options)))
    for name, b in Adapter.load(own).lora_b.items():
        assert torch.equal(model.adapter().lora_b[name], b)


def test_weights_of_the_same_form_are_taken(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    own, other = Adapter.load(adapters(path)), Adapter.load(adapters(path, seed=1))
    assert own.pte is not None
    other = replace(other, pte=replace(own.pte, init="aligned"))
    model = PTEModel(load(path), own)
    model.load_adapter_weights(other)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.adapter().lora_a[name], other.lora_a[name])
    with pytest.raises(ValueError, match=r"LoRA scale is 0\.5, the model's is 2\.0"):
        model.load_adapter_weights(replace(other, peft=other.peft | {"lora_alpha": 4}))
    with pytest.raises(ValueError, match="the model has no adapter"):
        PTEModel(load(path)).load_adapter_weights(own)


def test_import_leaves_vllm_alone() -> None:
    code = "import sys, pte_vllm.train.replay.segments; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
