"""Probes are queries of the model's own thoughts, from before RoPE, and drawn evenly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.probe_sampling import Thought, draw_probes, sample_thoughts, visit_queries
from tests.harness.models import random_tokens

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYERS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 2, 32  # of the tiny models
Tiny = Callable[[str], Path]


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _thoughts(*sizes: tuple[int, int]) -> list[Thought]:
    """Random tokens, by the sizes of prompt and thought."""
    return [
        Thought(token_ids=torch.tensor(random_tokens(p + t, seed=i)), prompt_tokens=p)
        for i, (p, t) in enumerate(sizes)
    ]


def _hooked_queries(model: Any, token_ids: Tensor) -> Tensor:
    """Queries `[layers, tokens, query heads, D]` as q_norm or q_proj gives them, before RoPE."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.reshape(len(token_ids), KV_HEADS * GROUP, HEAD_DIM))

    attentions = [layer.self_attn for layer in model.model.layers]
    handles = [
        (getattr(a, "q_norm", None) or a.q_proj).register_forward_hook(keep) for a in attentions
    ]
    with torch.no_grad():
        model(token_ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def _places(probes: Tensor, queries: Tensor) -> Tensor:
    """Return which of `queries: [N, D]` each of `probes: [n, D]` is."""
    distances = torch.cdist(probes, queries, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, found = distances.min(-1)
    assert nearest.max() < 1e-3 * queries.norm(dim=-1).mean()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_are_those_before_rope(architecture: str, tiny: Tiny) -> None:
    model, token_ids = _load(tiny(architecture)), torch.tensor(random_tokens(70))
    before, found = model.config._attn_implementation, {}
    visit_queries(model, token_ids, found.__setitem__)
    assert sorted(found) == list(range(LAYERS))
    wanted = _hooked_queries(model, token_ids)
    torch.testing.assert_close(torch.stack([found[i] for i in range(LAYERS)]), wanted)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probes_are_queries_of_the_thoughts_alone(architecture: str, tiny: Tiny) -> None:
    """All of them are drawn, each once: none of a prompt, and none of another head's."""
    model, thoughts = _load(tiny(architecture)), _thoughts((9, 5), (3, 1), (4, 0), (6, 11))
    total = GROUP * 17
    probes = draw_probes(model, thoughts, total, seed=0)
    assert probes.shape == (LAYERS, KV_HEADS, total, HEAD_DIM) and probes.dtype == torch.float32
    whole = [_hooked_queries(model, thought.token_ids) for thought in thoughts]
    queries = torch.cat([w[:, t.prompt_tokens :] for w, t in zip(whole, thoughts, strict=True)], 1)
    orders = set()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            own = queries[layer, :, head * GROUP : (head + 1) * GROUP].flatten(0, 1)
            order = _places(probes[layer, head], own).tolist()
            assert sorted(order) == list(range(total))
            orders.add(tuple(order))
    assert len(orders) == LAYERS * KV_HEADS  # each head draws for itself, in random order


def test_fewer_probes_are_drawn_evenly(tiny: Tiny) -> None:
    model, thoughts = _load(tiny("llama")), _thoughts((4, 30), (4, 10))
    probes = [draw_probes(model, thoughts, 8, seed=seed) for seed in range(25)]
    queries = torch.cat([_hooked_queries(model, t.token_ids)[:, 4:] for t in thoughts], 1)
    own = queries[1, :, :GROUP].flatten(0, 1)
    drawn = torch.cat([_places(p[1, 0], own) for p in probes])
    assert drawn.view(25, 8).sort(-1).values.diff().min() > 0  # no probe twice
    assert len(drawn.unique()) > 60  # of 80
    assert 120 < int((drawn < 60).sum()) < 180  # 150 of 200 of the longer thought


def test_too_few_thoughts(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="--probes: the thoughts have 12 queries .* than 13"):
        draw_probes(_load(tiny("llama")), _thoughts((5, 6)), 13, seed=0)


def test_queries_that_overflow_are_refused(tiny: Tiny) -> None:
    model = _load(tiny("llama"))
    model.model.layers[1].self_attn.q_proj.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match="--dtype: some queries are not finite"):
        draw_probes(model, _thoughts((5, 6)), 4, seed=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thoughts_are_the_models_own(architecture: str, tiny: Tiny) -> None:
    """Near temperature 0 they are its most probable tokens, however prompts are batched."""
    model = _load(tiny(architecture))
    prompts, told = [random_tokens(n, seed=n) for n in (3, 17, 8)], []
    thoughts = sample_thoughts(
        model,
        prompts,
        max_tokens=10,
        temperature=1e-4,
        batch_size=2,
        end_ids=(),
        seed=0,
        progress=told.append,
    )
    assert sum(told) == 30
    for prompt, thought in zip(prompts, thoughts, strict=True):
        assert thought.num_tokens == 10 and thought.prompt_tokens == len(prompt)
        token_ids = thought.token_ids.tolist()
        assert token_ids[: len(prompt)] == prompt
        with torch.no_grad():
            best = model(thought.token_ids[None]).logits[0].argmax(-1).tolist()
        assert token_ids[len(prompt) :] == best[len(prompt) - 1 : -1]


def test_a_thought_ends_before_its_end_token(tiny: Tiny) -> None:
    model, prompts = _load(tiny("llama")), [random_tokens(5), random_tokens(9, seed=1)]

    def sample(end_ids: tuple[int, ...]) -> tuple[list[Thought], int]:
        told: list[int] = []
        thoughts = sample_thoughts(
            model,
            prompts,
            max_tokens=20,
            temperature=1.0,
            batch_size=2,
            end_ids=end_ids,
            seed=3,
            progress=told.append,
        )
        return thoughts, sum(told)

    (whole, other), _ = sample(())
    end = int(whole.token_ids[whole.prompt_tokens + 7])
    first = whole.token_ids[whole.prompt_tokens :].tolist().index(end)
    (cut, same), told = sample((end,))
    assert cut.num_tokens == first and told == 40
    assert torch.equal(cut.token_ids, whole.token_ids[: len(cut.token_ids)])
    assert torch.equal(same.token_ids, other.token_ids[: len(same.token_ids)])
