"""Samples probes: queries of a model's own thoughts, from before RoPE (see `method.keep`).

Letters in shapes: B thoughts of a batch, P tokens of a prompt, T of a thought, V vocabulary, L
layers, H KV heads, G query heads of a KV head, D head size, n probes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pte_vllm.adapter.format import ModelShape
from pte_vllm.adapter.shown_attention import visit_attention
from pte_vllm.models.rope_check import undo_rope


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A prompt and what the model went on with."""

    token_ids: Tensor
    """`[P + T]` int64, on the host, without the token that ends the thought."""
    prompt_tokens: int
    """P."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids) - self.prompt_tokens


@torch.no_grad()
def sample_thoughts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    end_ids: Collection[int],
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Thought]:
    """Sample one thought to each prompt; it may be empty.

    Memory: the KV cache of one batch.

    Args:
        model: A transformers causal LM.
        prompts: Their token ids; none is empty.
        max_tokens: Most tokens of a thought.
        temperature: Logits are divided by it; nothing is cut off the distribution.
        batch_size: Thoughts that are sampled at once.
        end_ids: Tokens that end a thought.
        seed: Of the draws. The same seed on the same machine gives the same thoughts.
        progress: Is told how many tokens more are done, of `len(prompts) * max_tokens`.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    thoughts = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        sampled: list[Tensor] = []
        alive = torch.ones(len(batch), dtype=torch.bool, device=model.device)
        lengths = torch.zeros_like(alive, dtype=torch.long)
        ends = torch.tensor(sorted(end_ids), device=model.device)
        for logits in _steps(model, batch, sampled):
            probs = (logits.float() / temperature).softmax(-1)  # [B, V]
            sampled.append(torch.multinomial(probs, 1, generator=generator))
            alive &= ~torch.isin(sampled[-1][:, 0], ends)
            lengths += alive
            progress(len(batch))
            if len(sampled) == max_tokens or not alive.any():
                break
        progress(len(batch) * (max_tokens - len(sampled)))
        tokens = torch.cat(sampled, 1).cpu()
        for prompt, row, length in zip(batch, tokens, lengths.tolist(), strict=True):
            token_ids = torch.cat((torch.tensor(prompt), row[:length]))
            thoughts.append(Thought(token_ids=token_ids, prompt_tokens=len(prompt)))
    return thoughts


def _steps(
    model: Any, prompts: Sequence[Sequence[int]], sampled: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield the logits `[B, V]` of the next token; the caller appends it, `[B, 1]`, to `sampled`.

    Finished rows go on beside the others, for nothing.
    """
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    places = torch.arange(longest)[None]
    token_ids = torch.tensor(padded, device=model.device)
    mask = (places >= longest - torch.tensor([[len(prompt)] for prompt in prompts])).long()
    mask = mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    while True:
        found = model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        yield found.logits[:, -1]
        cache, token_ids = found.past_key_values, sampled[-1]
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        positions = positions[:, -1:] + 1


@torch.no_grad()
def draw_probes(
    model: Any,
    thoughts: Sequence[Thought],
    num_probes: int,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw probes `[L, H, n, D]` float32, on the host, from the queries of the thoughts' tokens.

    For each KV head of each layer, any n of the queries of all its query heads are equally likely.
    Memory: beside the probes, one layer's queries of one thought.

    Args:
        model: The causal LM that thought so; `check_unrotation` must have passed on all layers.
        thoughts: At least n queries for each KV head.
        num_probes: n.
        seed: Of the draw.
        progress: Is called after each thought.

    Raises:
        ValueError: If the thoughts are too few or too short, the queries cannot be seen, or they
            are not finite.
    """
    shape = ModelShape.from_hf(model.config)
    heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    total = group * sum(thought.num_tokens for thought in thoughts)
    if total < num_probes:
        raise ValueError(
            f"--probes: the thoughts have {total} queries for each KV head, fewer than "
            f"{num_probes}; ask for fewer probes, or raise --num-thoughts or --max-tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [
            torch.randperm(total, generator=generator)[:num_probes]
            for _ in range(shape.num_layers * heads)
        ]
    ).view(shape.num_layers, heads, num_probes)
    probes = torch.full((*drawn.shape, shape.head_dim), float("nan"))
    shown: set[int] = set()

    def take(thought: Thought, first: int, layer: int, queries: Tensor) -> None:
        """Put what is drawn of a thought, whose queries begin at `first`, where it belongs."""
        shown.add(layer)
        queries = queries[thought.prompt_tokens :].cpu().unflatten(1, (heads, group))
        numbers = drawn[layer] - first
        head, place = ((numbers >= 0) & (numbers < group * thought.num_tokens)).nonzero().T
        number = numbers[head, place]
        probes[layer, head, place] = queries[number // group, head, number % group]

    first = 0
    for thought in thoughts:
        visit_queries(model, thought.token_ids, partial(take, thought, first))
        first += group * thought.num_tokens
        progress()
    if len(shown) < shape.num_layers:
        raise ValueError(f"{type(model).__name__} has layers whose attention shows no queries")
    if not bool(probes.isfinite().all()):
        raise ValueError("--dtype: some queries are not finite numbers; try float32")
    return probes


@torch.no_grad()
def visit_queries(model: Any, token_ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Run the model on `token_ids: [N]` and show `visit` each layer's queries from before RoPE.

    Args:
        model: A transformers causal LM.
        token_ids: One sequence, on any device.
        visit: Takes a layer's index and its queries, `[N, H·G, D]` float32, after any norm of the
            model's and before its scaling.
    """
    positions = torch.arange(len(token_ids), device=model.device)[None]

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        visit(layer, undo_rope(model, query.transpose(1, 2), positions)[0])

    visit_attention(model, token_ids, look)
