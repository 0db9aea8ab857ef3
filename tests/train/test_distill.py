"""Distillation: the teacher is full attention, the KL and its gradient are the ones spelled out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.distill.agreement import compare
from pte_vllm.train.distill.examples import Example, align, batches, pack
from pte_vllm.train.distill.teacher import ask_teacher
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from tests.harness.models import VOCAB, random_tokens

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
TEMPERATURE = 1.3


def plan(pin_tokens: int) -> FoldPlan:
    return FoldPlan(pin_tokens=pin_tokens, window_tokens=4 * BLOCK, block_size=BLOCK)


def examples() -> list[Example]:
    """Different questions and lengths; six folds and more; one with tokens that do not count."""
    sizes = [(41, 203), (7, 190), (64, 241)]
    made = [Example(tokens=tuple(random_tokens(n, seed=n)), plan=plan(pin)) for pin, n in sizes]
    mask = tuple(int(t % 3 > 0) for t in range(190))
    made[1] = Example(tokens=made[1].tokens, plan=made[1].plan, mask=mask)
    return made


def full_logits(path: Path, tokens: tuple[int, ...]) -> Tensor:
    """`[T, V]` of one plain forward."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def student(path: Path, adapters: Adapters, **options: Any) -> PTEModel:
    return PTEModel.from_pretrained(path, adapters(path, **options))


def gradients(model: PTEModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_trainable():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_teacher_is_full_attention(architecture: str, tiny: Tiny, adapters: Adapters) -> None:
    path, chosen = tiny(architecture), examples()
    model = student(path, adapters)
    teacher = ask_teacher(model, align(chosen), temperature=TEMPERATURE, chunk_tokens=37)
    assert teacher.num_tokens == sum(sum(e.wanted) for e in chosen)
    output_layer = model.base.get_output_embeddings()
    for b, example in enumerate(chosen):
        expected = (full_logits(path, example.tokens) / TEMPERATURE).log_softmax(-1)
        wanted = torch.tensor(example.wanted)
        t = wanted.nonzero()[:, 0]
        assert torch.equal(teacher.index[b, : len(wanted)] >= 0, wanted)
        assert teacher.hidden is not None
        kept = output_layer(teacher.hidden[teacher.index[b, t]]) / TEMPERATURE
        torch.testing.assert_close(kept.log_softmax(-1), expected[t - 1], atol=1e-4, rtol=0)
        own = expected[t - 1, torch.tensor(example.tokens)[t]]
        torch.testing.assert_close(teacher.logprobs[b, t], own, atol=1e-4, rtol=0)


def test_kl_of_the_teacher_to_itself_is_zero(tiny: Tiny, adapters: Adapters) -> None:
    model = student(tiny("llama"), adapters)
    batch = align(examples())
    unbounded = AlignedBatch.align(
        [e.tokens for e in examples()],
        [FoldPlan(pin_tokens=0, window_tokens=0, block_size=BLOCK)] * 3,
        [e.wanted for e in examples()],
    )
    for top_k in (0, 5):
        teacher = ask_teacher(model, batch, temperature=TEMPERATURE, top_k=top_k)
        found: list[Tensor] = []

        def keep(scores: Scores, teacher: Any = teacher, found: Any = found) -> Tensor:
            found.append(teacher.kl(scores))
            return found[-1].sum()

        with model.adapter_disabled():
            replay(model, unbounded, temperature=TEMPERATURE, loss=keep)
        assert torch.cat(found).abs().max() < 1e-5
        found.clear()
        replay(model, batch, temperature=TEMPERATURE, loss=keep)
        assert torch.cat(found).mean() > 0.05  # the window and the adapter do differ
        assert torch.cat(found).min() > -1e-5


@pytest.mark.parametrize("top_k", [0, VOCAB - 1])
def test_the_teacher_has_no_lora_on_the_output_layer(
    top_k: int, tiny: Tiny, adapters: Adapters
) -> None:
    path, example = tiny("llama"), examples()[0]
    plain = Adapter.load(adapters(path, plain=True))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 96, generator=generator), torch.randn(VOCAB, 8, generator=generator)
    on_output = Adapter(
        peft=plain.peft | {"target_modules": ["lm_head"]},
        pte=None,
        lora_a={"lm_head": 0.1 * a},
        lora_b={"lm_head": 0.1 * b},
        encoders={},
    )
    model = PTEModel.from_pretrained(path, on_output)
    unbounded = FoldPlan(pin_tokens=0, window_tokens=0, block_size=BLOCK)
    batch = AlignedBatch.align([example.tokens], [unbounded])
    teacher = ask_teacher(model, batch, temperature=TEMPERATURE, top_k=top_k)
    log_p = (full_logits(path, example.tokens) / TEMPERATURE).log_softmax(-1)[:-1]  # [T - 1, V]

    def kl(scores: Scores) -> Tensor:
        log_q = scores.logits.log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)[scores.tokens - 1]
        found = teacher.kl(scores)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert found.mean() > 0.05
        return found.sum()

    replay(model, batch, temperature=TEMPERATURE, backward="segments", loss=kl)
    assert gradients(model)["lm_head.lora_B"].norm() > 0


@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize("rule", ["paper", "ridge"])
def test_gradient_is_that_of_the_kl_spelled_out(
    rule: str, top_k: int, tiny: Tiny, adapters: Adapters
) -> None:
    """Against whole distributions `[T, V]` of plain forwards and torch's own KL."""
    path, chosen = tiny("llama"), examples()
    model = student(path, adapters, rule=rule)
    batch = align(chosen)
    assert all(e.plan.folded_blocks(len(e.tokens) - 1) >= 6 for e in chosen)
    teacher = ask_teacher(model, batch, temperature=TEMPERATURE, top_k=top_k)

    found = {}
    for mode in ("segments", "full"):
        result = replay(
            model,
            batch,
            temperature=TEMPERATURE,
            backward=mode,
            loss=lambda scores: teacher.kl(scores).sum() / teacher.num_tokens,
        )
        found[mode] = (result.loss, gradients(model))

    plain = [(full_logits(path, e.tokens) / TEMPERATURE).log_softmax(-1) for e in chosen]

    def naive(scores: Scores) -> Tensor:
        pairs = zip(scores.rows.tolist(), scores.tokens.tolist(), strict=True)
        p = torch.stack([plain[b][t - 1] for b, t in pairs]).exp()  # [N, V]
        q = scores.logits.softmax(-1)
        if top_k:
            order = p.argsort(-1, descending=True)
            p, q = p.gather(1, order), q.gather(1, order)
            p, q = (torch.cat((x[:, :top_k], x[:, top_k:].sum(1, keepdim=True)), 1) for x in (p, q))
        kl = torch.nn.functional.kl_div(q.log(), p, reduction="sum")
        return kl / teacher.num_tokens

    expected = {}
    for mode in ("segments", "full"):
        result = replay(model, batch, temperature=TEMPERATURE, backward=mode, loss=naive)
        expected[mode] = (result.loss, gradients(model))
    for mode, (loss, grads) in expected.items():
        assert found[mode][0] == pytest.approx(loss, rel=1e-4)
        for name, gradient in grads.items():
            difference = (found[mode][1][name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-7, (mode, name)
    moved = [g.norm() for n, g in found["segments"][1].items() if n.startswith("encoder.w_")]
    assert min(moved[1:]) > 1e-6  # W_K and W_V: the gradient went through the folds


def test_top_k_approaches_the_exact_kl_from_below(tiny: Tiny, adapters: Adapters) -> None:
    model, batch = student(tiny("qwen2"), adapters), align(examples())
    losses = []
    for top_k in (1, 8, 64, VOCAB - 1, 0):
        teacher = ask_teacher(model, batch, top_k=top_k)
        assert (teacher.hidden is None) == bool(top_k)
        loss = replay(model, batch, loss=lambda s, t=teacher: t.kl(s).sum()).loss
        losses.append(loss / teacher.num_tokens)
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[-1]
    assert losses[-2] == pytest.approx(losses[-1], rel=1e-4)  # one class each
    for wrong in (-1, VOCAB):
        with pytest.raises(ValueError, match="teacher_top_k"):
            ask_teacher(model, batch, top_k=wrong)


def test_what_the_teacher_computed_before_the_first_fold_is_taken_over(
    tiny: Tiny, adapters: Adapters
) -> None:
    """In plans of several windows, one of which folds only after the end of a sequence."""
    model, chosen = student(tiny("qwen3"), adapters), examples()
    wanted = [[t > 60 for t in range(len(e.tokens))] for e in chosen]
    batch = AlignedBatch.align([e.tokens for e in chosen], [e.plan for e in chosen], wanted)
    plans = [
        FoldPlan(pin_tokens=e.plan.pin_tokens, window_tokens=blocks * BLOCK, block_size=BLOCK)
        for e, blocks in zip(chosen, (4, 12, 4), strict=True)
    ]
    assert plans[1].first_fold > len(chosen[1].tokens)
    found = []
    for keep_cache in (False, True):
        teacher = ask_teacher(model, batch, keep_cache=keep_cache)
        assert (teacher.cache is not None) == keep_cache
        tokens = [e.tokens for e in chosen]
        with model.adapter_disabled():
            found.append(compare(model, tokens, plans, teacher, same_weights=True))
    whole, shared = found
    torch.testing.assert_close(shared.logprobs, whole.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(shared.kls, whole.kls, atol=1e-4, rtol=0)
    assert torch.equal(shared.same_top, whole.same_top)
    assert whole.kls[0].max() > 0.05 and not whole.same_top[0, 61:203].all()
    assert shared.kls[1].max() == 0 and shared.same_top[1, 61:190].all()
    with pytest.raises(ValueError, match="before_fold works without backward"):
        replay(
            model,
            batch,
            backward="segments",
            loss=lambda scores: scores.logprobs.sum(),
            before_fold=teacher.cache,
        )


def test_only_tokens_asked_for(tiny: Tiny, adapters: Adapters) -> None:
    model, chosen = student(tiny("llama"), adapters), examples()
    teacher = ask_teacher(model, align(chosen))
    everything = AlignedBatch.align([e.tokens for e in chosen], [e.plan for e in chosen])
    with pytest.raises(ValueError, match="not asked for"):
        replay(model, everything, loss=lambda s: teacher.kl(s).sum())


def test_wanted_tokens_are_predicted_after_a_fold() -> None:
    example = examples()[1]
    first = example.plan.first_fold
    assert first == 80
    wanted = [t for t, is_wanted in enumerate(example.wanted) if is_wanted]
    assert wanted[0] == 82 and 81 not in wanted  # 81 is masked out: 81 % 3 == 0
    assert all(t % 3 for t in wanted) and len(wanted) == len([t for t in range(81, 190) if t % 3])


class _Bytes:
    eos_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_packing() -> None:
    packed = pack(["ab" * 60, "cd" * 60], _Bytes(), plan(16), sequence_tokens=100)
    assert [len(e.tokens) for e in packed] == [100, 100]
    joined = [t for e in packed for t in e.tokens]
    assert (
        bytes(joined[:120]) == b"ab" * 60 and joined[120] == 1 and bytes(joined[121:123]) == b"cd"
    )
    once = pack(["ab" * 60, "cd" * 60], _Bytes(), plan(16), sequence_tokens=100, max_sequences=1)
    assert once == packed[:1]
    with pytest.raises(ValueError, match="sequence_tokens 81"):
        pack(["ab"], _Bytes(), plan(16), sequence_tokens=81)
    with pytest.raises(ValueError, match="3 tokens"):
        pack(["ab"], _Bytes(), plan(16), sequence_tokens=82)


def test_batches_go_on_where_they_stopped() -> None:
    chosen = [Example(tokens=(i,), plan=plan(0)) for i in range(7)]
    whole = batches(chosen, 3, seed=4)
    first = [next(whole) for _ in range(12)]
    for start in (1, 2, 5, 7):
        again = batches(chosen, 3, seed=4, start=start)
        assert [next(again) for _ in range(12 - start)] == first[start:]
    seen = [e.tokens[0] for batch in first for e in batch]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7)) and seen[:7] != seen[7:14]
    other = batches(chosen, 3, seed=5)
    assert [next(other) for _ in range(12)] != first
