"""Measures the arms by the trainer's replay: full attention once, and each arm beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.eval.fidelity_arms import FidelityArm
from pte_vllm.eval.fidelity_parts import OnDone, Parts
from pte_vllm.eval.fidelity_tokens import MeasuredTokens
from pte_vllm.train.distill.agreement import compare
from pte_vllm.train.distill.examples import Example, align
from pte_vllm.train.distill.step import of_like_length
from pte_vllm.train.distill.teacher import ask_teacher
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel


def measure(
    base: Any,
    examples: Sequence[Example],
    arms: Sequence[FidelityArm],
    adapters: Mapping[str, Adapter],
    *,
    batch_sequences: int,
    probes: Probes | None = None,
    on_done: OnDone = lambda name: None,
) -> MeasuredTokens:
    """Measure all arms on the tokens that `examples` want; arms that do the same run once.

    Args:
        base: a transformers causal LM; the same again on return.
        examples: answers, with the plan of the smallest window, which says the tokens.
        arms: what is compared.
        adapters: those of the arms, by name.
        batch_sequences: how many answers are read at once; does not change the result.
        probes: the base model's, if an arm keeps tokens by the score `expected`.
        on_done: hears `batches × (1 + different arms)` times of a part.

    Raises:
        ValueError: if the model cannot be replayed, or an adapter or the probes do not fit it.
    """
    bare = PTEModel(base)
    keeper = Keeper(bare, probes) if probes is not None else None
    parts = Parts(arms)
    done = 0
    for chosen in of_like_length(examples, batch_sequences):
        teacher = ask_teacher(bare, align(chosen), keep_cache=True)
        rows, tokens = (x.cpu() for x in (teacher.index >= 0).nonzero(as_tuple=True))
        parts.place(chosen, rows.numpy(), tokens.numpy(), first=done)
        parts.add_full(-teacher.logprobs.cpu()[rows, tokens].numpy())
        on_done("full attention")
        for arm in parts.different:
            adapter = None if arm.adapter is None else adapters[arm.adapter]
            plans = [arm.plan(example.plan.pin_tokens) for example in chosen]
            with _student(base, adapter) as student:
                found = compare(
                    student,
                    [e.tokens for e in chosen],
                    plans,
                    teacher,
                    same_weights=adapter is None,
                    keeper=keeper,
                )
            parts.add(
                arm,
                losses=-found.logprobs.cpu()[rows, tokens].numpy(),
                kls=found.kls.cpu()[rows, tokens].numpy(),
                same_top=found.same_top.cpu()[rows, tokens].numpy(),
            )
            on_done(arm.name)
        done += len(chosen)
    return parts.together(kl_is_bound=False)


@contextmanager
def _student(base: Any, adapter: Adapter | None) -> Iterator[PTEModel]:
    """Put an adapter on the base model for the length of the block."""
    model = PTEModel(base, adapter)
    try:
        yield model
    finally:
        model.detach()
