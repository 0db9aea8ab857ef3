"""Shows a new adapter the queries, keys and values of each layer on sample text.

Letters in shapes: N sequences, T tokens, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pte_vllm.method.rope import rotate_half


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Parts of a sample sequence; the defaults fit text of 256 tokens and more.

    Where a sequence is shorter than they ask for, half of it at most counts as recalled, and a
    quarter as pinned.
    """

    pinned_tokens: int = 32
    """Tokens at the start that are never evicted: attention sinks are among them."""
    recall_tokens: int = 64
    """Tokens at the end that repeat or ask what was said early: heads which look it up show."""
    local_tokens: int = 64
    """Tokens before those, which count as the window."""

    def __post_init__(self) -> None:
        for name in ("pinned_tokens", "recall_tokens", "local_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def evicted_from(self, tokens: int) -> int:
        """Return the first token that counts as evicted, of a sequence of `tokens`."""
        return min(self.pinned_tokens, tokens // 4)

    def recalled(self, tokens: int) -> int:
        """Return how many tokens at the end count as recalled."""
        return min(self.recall_tokens, tokens // 2)

    def far(self, tokens: int) -> slice:
        """Return the tokens that lie beyond the window of those recalled."""
        end = tokens - self.recalled(tokens) - self.local_tokens
        return slice(self.evicted_from(tokens), max(tokens // 2, end))


TEXT_SPANS = Spans()
SEQUENCES, SEQUENCE_TOKENS = 12, 256
_MAX_WORDS = 30


def sample_sequences(
    tokenizer: Any,
    text: str,
    *,
    num_sequences: int = SEQUENCES,
    num_tokens: int = SEQUENCE_TOKENS,
    seed: int = 0,
) -> Tensor:
    """Make sequences `[num_sequences, num_tokens]` of sentences in random order.

    Early sentences come again at the end.

    Raises:
        ValueError: if the text holds fewer than two sentences, or a sequence has no room.
    """
    if num_tokens < sum(astuple(TEXT_SPANS)) + 16:
        raise ValueError(f"a sample sequence of {num_tokens} tokens is too short")
    sentences = _sentences(text)
    if len(sentences) < 2:
        raise ValueError("the sample text needs at least two sentences or lines")
    pieces = tokenizer([f" {s}" for s in sentences], add_special_tokens=False)["input_ids"]
    pieces = [piece for piece in pieces if piece]
    rng = random.Random(seed)
    return torch.tensor([_sequence(pieces, num_tokens, rng) for _ in range(num_sequences)])


def _sentences(text: str) -> list[str]:
    """Cut text at line ends, after full stops and after `_MAX_WORDS` words."""
    parts = []
    for part in re.split(r"(?<=[.!?])\s+|\n+", text):
        words = part.split()
        parts += [" ".join(words[i : i + _MAX_WORDS]) for i in range(0, len(words), _MAX_WORDS)]
    return [part for part in parts if part]


def _sequence(pieces: list[list[int]], num_tokens: int, rng: random.Random) -> list[int]:
    body_tokens = num_tokens - TEXT_SPANS.recall_tokens
    far_tokens = body_tokens - TEXT_SPANS.local_tokens
    body: list[int] = []
    early: list[list[int]] = []
    while len(body) < body_tokens:
        for piece in rng.sample(pieces, len(pieces)):
            if TEXT_SPANS.pinned_tokens <= len(body) < far_tokens - len(piece):
                early.append(piece)
            body += piece
    early = early or [body[TEXT_SPANS.pinned_tokens : far_tokens]]
    rng.shuffle(early)
    tail: list[int] = []
    while len(tail) < TEXT_SPANS.recall_tokens:
        tail += early[0]
        early = [*early[1:], early[0]]
    return body[:body_tokens] + tail[: TEXT_SPANS.recall_tokens]


@dataclass(frozen=True, kw_only=True)
class LayerSample:
    """Attention of one layer on the sample text, in fp32, before RoPE.

    It is valid only while `visit` runs.
    """

    layer: int
    attention: Any  # the module, with its q_proj, k_proj, v_proj
    q: Tensor  # [N, H, T, D] as attention sees it: with bias, or after q_norm
    k: Tensor  # [N, K, T, D] likewise
    v: Tensor  # [N, K, T, D]
    q_scale: Tensor  # [H, D] of q against the output of q_proj; 1 where there is no q_norm
    cos: Tensor  # [T, rotary_dim]
    sin: Tensor  # [T, rotary_dim]
    spans: Spans

    def rotate(self, x: Tensor) -> Tensor:
        """Turn `x: [.., T, D]` by RoPE, each token by its position."""
        rotary_dim = self.cos.shape[-1]
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        return torch.cat((turned * self.cos + rotate_half(turned) * self.sin, rest), -1)

    def far_attention(self) -> Tensor:
        """Compute how much each query head looks beyond the window, `[H]`.

        It is the mean over recalled tokens of the attention that they pay to `spans.far(T)`.
        """
        tokens, group = self.q.shape[2], self.q.shape[1] // self.k.shape[1]
        recall = self.spans.recalled(tokens)
        q, k = self.rotate(self.q)[:, :, -recall:], self.rotate(self.k)
        mask = torch.ones(recall, tokens, dtype=torch.bool, device=q.device)
        mask = mask.tril(tokens - recall)
        scaling = getattr(self.attention, "scaling", q.shape[-1] ** -0.5)
        far = self.spans.far(tokens)
        mass = []
        for head in range(q.shape[1]):  # one head at a time: [N, H, recall, T] may be large
            scores = q[:, head] @ k[:, head // group].mT * scaling
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            mass.append(weights[..., far].sum(-1).mean())
        return torch.stack(mass)


class _Finished(Exception):
    """Ends a forward pass once the last layer that matters has run."""


def decoder_layers(model: nn.Module) -> Sequence[Any]:
    """Return the decoder layers of a model built like Llama.

    Raises:
        ValueError: if the model is built otherwise.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    if layers is None or not all(
        hasattr(getattr(layer, "self_attn", None), name) for layer in layers for name in projections
    ):
        raise ValueError(
            f"{type(model).__name__} has no model.layers[i].self_attn with "
            f"{', '.join(projections)}; adapters are made for models built like Llama and Qwen"
        )
    return list(layers)


@torch.no_grad()
def visit_layers(
    model: Any,
    token_ids: Tensor,
    layers: Collection[int],
    visit: Callable[[LayerSample], None],
    spans: Spans = TEXT_SPANS,
) -> None:
    """Run the model on `token_ids: [N, T]` and show `visit` each of `layers`, in order.

    Only one layer's queries, keys and values are held at a time; layers after the last one asked
    for do not run.
    """
    all_layers, positions = decoder_layers(model), torch.arange(token_ids.shape[1])[None]
    device = next(model.parameters()).device
    like = torch.empty(0, device=device)
    cos, sin = model.model.rotary_emb(like, positions.to(device))
    seen: dict[str, Tensor] = {}
    last = max(layers)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    def show(layer: int) -> Callable[..., None]:
        def hook(attention: nn.Module, inputs: Any, output: Any) -> None:
            visit(_layer_sample(layer, attention, seen, cos[0], sin[0], spans))
            seen.clear()
            if layer == last:
                raise _Finished

        return hook

    handles = []
    for layer in layers:
        attention = all_layers[layer].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            module = getattr(attention, name, None)
            if module is not None:
                handles.append(module.register_forward_hook(keep(name)))
        handles.append(attention.register_forward_hook(show(layer)))
    try:
        model.model(input_ids=token_ids.to(device), use_cache=False)
    except _Finished:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _layer_sample(
    layer: int, attention: Any, seen: dict[str, Tensor], cos: Tensor, sin: Tensor, spans: Spans
) -> LayerSample:
    sequences, tokens = seen["q_proj"].shape[:2]

    def heads(name: str) -> Tensor:
        shape = (sequences, tokens, -1, attention.head_dim)
        return seen[name].float().reshape(shape).transpose(1, 2)

    q_before = heads("q_proj")
    q = heads("q_norm") if "q_norm" in seen else q_before
    # q_norm divides by a norm that differs from token to token: take the best constant instead.
    scale = (q * q_before).sum((0, 2)) / q_before.square().sum((0, 2)).clamp(min=1e-12)
    return LayerSample(
        layer=layer,
        attention=attention,
        q=q,
        k=heads("k_norm") if "k_norm" in seen else heads("k_proj"),
        v=heads("v_proj"),
        q_scale=scale,
        cos=cos.float(),
        sin=sin.float(),
        spans=spans,
    )
