"""What an arm of the recall experiment runs with: its plan, its probes, ordinary text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.experiments.recall_arms import ARMS
from pte_vllm.train.experiments.recall_task import PIN_TOKENS

if TYPE_CHECKING:
    from pte_vllm.train.distill.examples import Example
    from pte_vllm.train.experiments.recall_arms import RecallArm
    from pte_vllm.train.replay.keeping import Keeper
    from pte_vllm.train.replay.modeling import PTEModel

BLOCK_TOKENS, EVICT_RATIO = 32, 0.5
TEXT_TOKENS, TEXT_SEQUENCES = 768, 16
"""Length and number of sequences of ordinary text on which perplexity is measured."""
TRAIN_TEXT_TOKENS, TRAIN_TEXT_BATCH = 256, 4
"""Length and number of sequences of ordinary text that are distilled in each step."""


def plan_of(arm: RecallArm) -> FoldPlan:
    """Return what an arm evicts when, for a sequence that pins the instruction only."""
    return FoldPlan(
        pin_tokens=PIN_TOKENS,
        window_tokens=arm.window_tokens,
        evict_ratio=EVICT_RATIO,
        block_size=BLOCK_TOKENS,
        keep_tokens=arm.keep_tokens,
        keep_score=arm.keep_score,
    )


def keeper_of(model: PTEModel, arm: RecallArm, base: str) -> Keeper | None:
    """Return the base model's probes, where an arm keeps tokens by them."""
    if not arm.keep_tokens or arm.keep_score != "expected":
        return None
    from pte_vllm.adapter.probe_cache import calibrated
    from pte_vllm.adapter.probes import Probes
    from pte_vllm.train.replay.keeping import Keeper

    return Keeper(model, Probes.load(calibrated(base)))


def training_text(tokenizer: Any, plan: FoldPlan, source: str) -> list[Example]:
    """Pack all of the text into short sequences; none without a source."""
    from pte_vllm.train.distill.examples import pack, read_texts

    if not source:
        return []
    examples = pack(read_texts(source), tokenizer, plan, sequence_tokens=TRAIN_TEXT_TOKENS)
    if len(examples) < TRAIN_TEXT_BATCH:
        least = TRAIN_TEXT_TOKENS * TRAIN_TEXT_BATCH
        raise ValueError(f"--train-text: {source} has fewer than {least} tokens")
    return examples


def perplexity(
    model: PTEModel, tokenizer: Any, plan: FoldPlan, keeper: Keeper | None, source: str
) -> float | None:
    """Compute the perplexity of ordinary text beyond the first fold, the same for every arm."""
    if not source:
        return None
    from pte_vllm.train.distill.examples import pack, read_texts
    from pte_vllm.train.experiments.supervised import score_answers
    from pte_vllm.train.replay.aligned import AlignedBatch

    examples = pack(
        read_texts(source),
        tokenizer,
        plan_of(ARMS["window"]),
        sequence_tokens=TEXT_TOKENS,
        max_sequences=TEXT_SEQUENCES,
    )
    batches = (
        AlignedBatch.align([e.tokens for e in part], [plan] * len(part), [e.wanted for e in part])
        for part in (examples[i : i + 4] for i in range(0, len(examples), 4))
    )
    return math.exp(score_answers(model, batches, keeper=keeper).loss)
