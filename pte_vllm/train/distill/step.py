"""Distillation: a warm start without rewards.

Teacher and student are the same model; the teacher has full attention and no adapter, the student
the adapter and the window. The loss of a step is forward KL, for the tokens beyond the first fold:

    loss = mean over tokens of KL( softmax(z_teacher / T) ‖ softmax(z_student / T) )

without a factor T², so that it reads in nats at any temperature. Gradients come from the replay
segment by segment: activations do not grow with the length of a sequence. The teacher's KV cache
does, the student's evicted keys and values do (`replay.segments`), and one hidden state is kept of
each token (`distill.teacher`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pte_vllm.train.distill.agreement import compare
from pte_vllm.train.distill.examples import Example, align
from pte_vllm.train.distill.teacher import CHUNK_TOKENS, Teacher, ask_teacher
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step found."""

    kl: float
    """The loss: the mean KL to the teacher before the step, in nats."""
    grad_norm: float
    """The gradient's norm before clipping."""
    wanted_tokens: int
    """How many tokens have a loss."""
    tokens: int
    """How many tokens the batch has."""
    folds: float
    """The mean number of folds of a sequence."""

    def as_metrics(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def accumulate_gradient(
    model: PTEModel,
    examples: Sequence[Example],
    *,
    micro_batch_sequences: int,
    temperature: float = 1.0,
    teacher_top_k: int = 0,
    teacher_chunk_tokens: int = CHUNK_TOKENS,
    keeper: Keeper | None = None,
) -> StepReport:
    """Add the gradient of one batch's loss to the gradients of the model's parameters.

    Args:
        model: student and teacher.
        examples: the batch.
        micro_batch_sequences: how many sequences are replayed at once; does not change the result.
        temperature: the temperature of both distributions.
        teacher_top_k: how many of the teacher's best tokens are compared, as `Teacher.kl` says; 0:
            the whole distribution.
        teacher_chunk_tokens: most tokens of one forward pass of the teacher.
        keeper: the model's probes, for plans that keep tokens by the score `expected`.

    Raises:
        ValueError: if no token of the batch lies beyond a first fold.
    """
    wanted_tokens = sum(sum(example.wanted) for example in examples)
    if not wanted_tokens:
        raise ValueError("no token of the batch lies beyond its first fold")
    loss, folds = 0.0, 0
    for batch in micro_batches(examples, micro_batch_sequences):
        teacher = ask_teacher(
            model,
            batch,
            temperature=temperature,
            top_k=teacher_top_k,
            chunk_tokens=teacher_chunk_tokens,
        )

        def kl(scores: Scores, teacher: Teacher = teacher) -> Tensor:
            return teacher.kl(scores).sum() / wanted_tokens

        result = replay(
            model, batch, temperature=temperature, backward="segments", loss=kl, keeper=keeper
        )
        loss += result.loss
        folds += sum(len(f) for f in result.folds)
    gradients = [p.grad for p in model.trainable_parameters() if p.grad is not None]
    return StepReport(
        kl=loss,
        grad_norm=float(torch.nn.utils.get_total_norm(gradients)),
        wanted_tokens=wanted_tokens,
        tokens=sum(len(example.tokens) for example in examples),
        folds=folds / len(examples),
    )


def micro_batches(examples: Sequence[Example], size: int) -> Iterable[AlignedBatch]:
    """Align at most `size` examples at a time, of like length, so that little is padded."""
    for chosen in of_like_length(examples, size):
        yield align(chosen)


def of_like_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut examples, ordered by their length, into parts of at most `size`."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def take_step(
    model: PTEModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    *,
    max_grad_norm: float,
    **options: Any,
) -> StepReport:
    """Take an optimizer step on a batch; `options` are `accumulate_gradient`'s.

    Raises:
        FloatingPointError: if the gradient is not finite; the adapter is then unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    report = accumulate_gradient(model, examples, **options)
    if not math.isfinite(report.grad_norm):
        raise FloatingPointError(
            f"the gradient's norm is {report.grad_norm}; the adapter is unchanged"
        )
    torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), max_grad_norm)
    optimizer.step()
    return report


# -- how good is it -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well text beyond the first fold is predicted at temperature 1.

    Losses and KLs are means over `tokens` tokens, in nats.
    """

    tokens: int
    loss_full: float
    """The teacher's negative log-likelihood, under full attention."""
    loss_window: float
    """That of the base model, which forgets what leaves the window."""
    loss_student: float
    """That of the base model with the adapter, under the same window."""
    kl_window: float
    """KL(teacher ‖ base model under the window)."""
    kl_student: float

    @property
    def perplexities(self) -> tuple[float, float, float]:
        """Perplexities under full attention, of the window, and of the student."""
        return math.exp(self.loss_full), math.exp(self.loss_window), math.exp(self.loss_student)

    @property
    def recovered(self) -> float:
        """Share of the window's KL to the teacher that the adapter takes away; 1 is all of it."""
        return 1.0 - self.kl_student / self.kl_window if self.kl_window else math.nan

    def as_metrics(self) -> dict[str, float]:
        """Return the numbers by name, perplexities included."""
        full, window, student = self.perplexities
        return {
            **asdict(self),
            "perplexity_full": full,
            "perplexity_window": window,
            "perplexity_student": student,
            "recovered": self.recovered,
        }


@torch.no_grad()
def evaluate(
    model: PTEModel,
    examples: Sequence[Example],
    *,
    micro_batch_sequences: int = 4,
    rule: str | None = None,
    keeper: Keeper | None = None,
) -> Evaluation:
    """Measure full attention, the window, and the window with the adapter, on the same tokens.

    Args:
        model: student and teacher.
        examples: the sequences to measure on.
        micro_batch_sequences: how many sequences are replayed at once; does not change the result.
        rule: the rule to fold by; None: the adapter's.
        keeper: the model's probes, for plans that keep tokens by the score `expected`.

    Raises:
        ValueError: if no token lies beyond a first fold.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    tokens = 0
    for chosen in of_like_length(examples, micro_batch_sequences):
        sequences, plans = [e.tokens for e in chosen], [e.plan for e in chosen]
        teacher = ask_teacher(model, align(chosen), keep_cache=True)
        tokens += teacher.num_tokens
        with model.adapter_disabled():
            window = compare(model, sequences, plans, teacher, same_weights=True, keeper=keeper)
        student = compare(model, sequences, plans, teacher, rule=rule, keeper=keeper)
        values = [-x.logprobs for x in (teacher, window, student)] + [window.kls, student.kls]
        sums += torch.stack([x.double().sum().cpu() for x in values])
    if not tokens:
        raise ValueError("no token of the evaluation lies beyond its first fold")
    full, window_nll, student_nll, window_kl, student_kl = (sums / tokens).tolist()
    return Evaluation(
        tokens=tokens,
        loss_full=full,
        loss_window=window_nll,
        loss_student=student_nll,
        kl_window=window_kl,
        kl_student=student_kl,
    )
