"""The teacher of a distillation: the base model with full attention, and the KL of a student to it.

A teacher must not cost `[tokens, V]`. The output layer is the same frozen matrix for teacher and
student, so its input is kept instead, `[M, d]`, and the distribution computed again beside the
student's, part by part: exact, at d numbers a token. With `top_k` k probabilities are kept.

Shapes: B sequences, M wanted tokens of the batch, N of them scored at once, V vocabulary, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from pte_vllm.train.replay.window_cache import WindowCache

CHUNK_TOKENS = 512
"""Columns of one forward of the teacher; bounds its attention scores, not its KV cache."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the teacher says of a batch's wanted tokens: exactly, or of its k best tokens only."""

    model: PTEModel
    temperature: float
    logprobs: Tensor  # [B, longest] of the tokens themselves, as `ReplayResult.logprobs`
    best: Tensor  # [M] int64: the most probable token
    index: Tensor  # [B, longest] int64: the row of token t below; -1 where not wanted
    hidden: Tensor | None  # [M, d] inputs of the output layer; the exact form
    top_logprobs: Tensor | None  # [M, k + 1] fp32: the k best, then all others together
    top_ids: Tensor | None  # [M, k]
    cache: WindowCache | None = None
    """Its KV cache, token t in column t; only if it was asked for."""

    @property
    def num_tokens(self) -> int:
        """How many tokens the teacher was asked for, M."""
        return int((self.index >= 0).sum())

    def kl(self, scores: Scores) -> Tensor:
        """Compute KL(teacher ‖ student) of each scored token, `[N]`, in nats.

        With `top_k` the vocabulary has k + 1 classes, the teacher's k best and the rest as one, for
        both sides; nothing is renormalised. Merging classes can only lower a KL, so this is a lower
        bound of the exact one, and still 0 for a student that agrees.

        Args:
            scores: the student's scores, at the teacher's temperature.

        Raises:
            ValueError: if the teacher was not asked for one of the tokens.
        """
        rows = self.index[scores.rows, scores.tokens]  # [N]
        if bool((rows < 0).any()):
            raise ValueError("the student scores a token that the teacher was not asked for")
        if self.top_ids is not None and self.top_logprobs is not None:
            log_p = self.top_logprobs[rows]
            log_q = merged_log_softmax(scores.logits, self.top_ids[rows])
        else:
            assert self.hidden is not None
            with torch.no_grad():
                logits = _output_layer(self.model)(self.hidden[rows]).float() / self.temperature
                log_p = logits.log_softmax(-1)
            log_q = scores.logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def ask_teacher(
    model: PTEModel,
    batch: AlignedBatch,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    keep_cache: bool = False,
) -> Teacher:
    """Run the base model, without adapter and window, over a batch.

    Its KV cache holds the whole sequences and is gone on return, unless it is asked for.

    Args:
        model: student and teacher; its adapter is off meanwhile.
        batch: sequences aligned for the student, whose wanted tokens the teacher is asked for.
        temperature: the temperature of both distributions.
        top_k: how many probabilities are kept for each token; 0: the whole distribution.
        chunk_tokens: most tokens of one forward pass.
        keep_cache: whether the teacher keeps its KV cache.

    Raises:
        ValueError: if an option is out of range.
    """
    vocabulary = model.base.get_output_embeddings().weight.shape[0]
    if not 0 <= top_k < vocabulary:
        raise ValueError(f"teacher_top_k must lie in [0, {vocabulary}), got {top_k}")
    everything = unbounded(batch.to(model.device))
    index = torch.full_like(everything.ids, -1)
    inputs: list[Tensor] = []  # of the output layer; the last one belongs to the scores at hand
    best: list[Tensor] = []
    top: list[tuple[Tensor, Tensor]] = []
    count = 0

    def keep(scores: Scores) -> Tensor:
        nonlocal count
        index[scores.rows, scores.tokens] = torch.arange(
            count, count + len(scores.rows), device=index.device
        )
        count += len(scores.rows)
        best.append(scores.logits.argmax(-1))
        if top_k:
            ids = scores.logits.topk(top_k, -1).indices
            top.append((merged_log_softmax(scores.logits, ids), ids))
            inputs.clear()
        return scores.logprobs.new_zeros(())

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    hook = model.base.get_output_embeddings().register_forward_pre_hook(see)
    try:
        with model.adapter_disabled():
            found = replay(
                model,
                everything,
                temperature=temperature,
                loss=keep,
                chunk_tokens=chunk_tokens,
                keep_cache=keep_cache,
            )
    finally:
        hook.remove()
    return Teacher(
        model=model,
        temperature=temperature,
        logprobs=found.logprobs,
        best=torch.cat(best) if best else index.new_zeros(0),
        index=index,
        hidden=torch.cat(inputs) if inputs else None,
        top_logprobs=torch.cat([log_p for log_p, _ in top]) if top else None,
        top_ids=torch.cat([ids for _, ids in top]) if top else None,
        cache=found.cache,
    )


def _output_layer(model: PTEModel) -> nn.Module:
    """Return the base model's output layer, without a LoRA that lies on it."""
    layer: nn.Module = model.base.get_output_embeddings()
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def merged_log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute log-probs `[N, k + 1]` of the tokens `ids: [N, k]`, then of all others together."""
    log_total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((logits.gather(-1, ids), rest), -1) - log_total


def unbounded(batch: AlignedBatch) -> AlignedBatch:
    """Put the same sequences and wanted tokens under full attention: token t in column t."""
    return AlignedBatch(
        ids=batch.by_token(batch.ids),
        left=torch.zeros_like(batch.left),
        lengths=batch.lengths,
        wanted=batch.by_token(batch.wanted).bool(),
        plan=FoldPlan(
            pin_tokens=batch.plan.pin_tokens, window_tokens=0, block_size=batch.plan.block_size
        ),
    )
