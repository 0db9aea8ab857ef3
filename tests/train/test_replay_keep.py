"""Kept tokens in the replay, against one forward with a mask for every head (`KeptReference`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.method import keep
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper, num_candidates
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs, replay
from tests.harness.models import make_probes, random_tokens
from tests.train import naive
from tests.train.kept_reference import KeptReference

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
LAYERS, HEADS, DIM = 3, 2, 32  # of the tiny checkpoints
LENGTHS, PINS = (203, 150, 218), (41, 5, 60)
QUERIES = torch.randn(LAYERS, HEADS, 10, DIM, generator=torch.Generator().manual_seed(3))


def fold_plan(
    pin_tokens: int = 41, keep_blocks: int = 2, ratio: float = 0.25, **o: Any
) -> FoldPlan:
    return FoldPlan(
        pin_tokens=pin_tokens,
        window_tokens=4 * BLOCK,
        evict_ratio=ratio,
        block_size=BLOCK,
        keep_tokens=keep_blocks * BLOCK,
        **o,
    )


def load(path: Path, adapter: Path | None = None) -> tuple[PTEModel, Keeper]:
    """Load a model; without an adapter in float64, so that no rounding hides a difference."""
    model = PTEModel.from_pretrained(path, adapter)
    if adapter is None:
        model.base.double()
    return model, Keeper(model, Probes.of(QUERIES, "none"))


def random_marks(plan: FoldPlan, folds: int, seed: int) -> list[Tensor | None]:
    """Marks of the first folds, of those that select."""
    g = torch.Generator().manual_seed(seed)
    found: list[Tensor | None] = []
    for fold in range(folds):
        size = num_candidates(plan, fold)
        scores = torch.rand(LAYERS, HEADS, size, generator=g)
        marks = keep.survival(keep.best(scores, plan.keep_tokens), size)
        found.append(marks if plan.selects(fold) else None)
    return found


def assert_same_marks(found: Sequence[Any], reference: KeptReference) -> None:
    """What a replay's folds kept by themselves is what the reference's scores say."""
    selecting = [number for number, fold in enumerate(found) if fold.marks is not None]
    assert selecting == sorted(reference.own)
    for number in selecting:
        own = torch.stack([reference.own[number][layer] for layer in range(LAYERS)])
        assert torch.equal(found[number].marks, own)


@pytest.mark.parametrize(
    ("keep_blocks", "ratio", "selecting"),
    [
        (1, 0.5, [0, 1, 2]),  # fewer than leave at once
        (1, 0.25, [1, 2, 3, 4, 5]),
        (3, 0.25, [3, 4, 5]),  # as many as leave in three folds
        (3, 0.5, [1, 2]),  # one and a half
        (20, 0.25, []),  # more than ever leave: full attention
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_base_model(
    architecture: str, keep_blocks: int, ratio: float, selecting: list[int], tiny: Tiny
) -> None:
    model, keeper = load(tiny(architecture))
    ids, plan = random_tokens(203, seed=5), fold_plan(41, keep_blocks, ratio)
    found = log_probs(model, ids, plan, keeper=keeper)
    reference = KeptReference(model.base, plan, QUERIES)
    with torch.no_grad():
        expected = reference.log_probs(ids).float()
    assert [n for n, fold in enumerate(found.folds[0]) if fold.marks is not None] == selecting
    assert len(found.folds[0]) == (3 if ratio == 0.5 else 6)
    assert_same_marks(found.folds[0], reference)
    assert all(fold.agreement is None for fold in found.folds[0])
    torch.testing.assert_close(found.logprobs[0, 1:], expected, atol=5e-6, rtol=0)
    if not selecting:
        plain = log_probs(model, ids, FoldPlan(pin_tokens=0, window_tokens=0, block_size=BLOCK))
        torch.testing.assert_close(found.logprobs, plain.logprobs, atol=5e-6, rtol=0)


def test_heads_and_layers_choose_differently(tiny: Tiny) -> None:
    """Otherwise the tests above could not tell one head's choice from another's."""
    model, keeper = load(tiny("llama"))
    fold = log_probs(model, random_tokens(203, seed=5), fold_plan(), keeper=keeper).folds[0][-1]
    assert fold.marks is not None
    rows = fold.marks.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == LAYERS * HEADS
    oldest = rows[:, : num_candidates(fold_plan(), 5) - BLOCK].sum(-1)
    assert int(oldest.min()) > 0 and int(oldest.max()) < 2 * BLOCK  # some old ones, some new


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("score", ["expected", "random"])
def test_sequences_side_by_side(score: Any, chunk_tokens: int | None, tiny: Tiny) -> None:
    model, keeper = load(tiny("qwen3"))
    seed = 12345 if score == "random" else 0
    plans = [fold_plan(pin, keep_score=score, evict_seed=seed) for pin in PINS]
    sequences = [random_tokens(n, seed=n) for n in LENGTHS]
    batch = AlignedBatch.align(sequences, plans)
    assert len(set(batch.left.tolist())) == 3
    needed = keeper if score == "expected" else None
    found = replay(model, batch, keeper=needed, chunk_tokens=chunk_tokens)
    for b, (ids, plan) in enumerate(zip(sequences, plans, strict=True)):
        reference = KeptReference(model.base, plan, QUERIES)
        with torch.no_grad():
            expected = reference.log_probs(ids).float()
        assert_same_marks(found.folds[b], reference)
        torch.testing.assert_close(found.logprobs[b, 1 : len(ids)], expected, atol=5e-6, rtol=0)


def test_probes_stop_at_the_last_position(tiny: Tiny) -> None:
    model, keeper = load(tiny("llama"))
    ids, plan = random_tokens(203, seed=5), fold_plan()
    free = log_probs(model, ids, plan, keeper=keeper).folds[0]
    model.base.config.max_position_embeddings = 204
    found = log_probs(model, ids, plan, keeper=keeper)
    reference = KeptReference(model.base, plan, QUERIES)
    with torch.no_grad():
        expected = reference.log_probs(ids).float()
    assert_same_marks(found.folds[0], reference)
    torch.testing.assert_close(found.logprobs[0, 1:], expected, atol=5e-6, rtol=0)
    pairs = zip(free, found.folds[0], strict=True)
    assert not all(torch.equal(a.marks, b.marks) for a, b in pairs if a.marks is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "ridge", "features": "squared"},
        {"rule": "paper", "keys": "rotated"},
        {"rule": "delta", "layers": [1]},
    ],
    ids=str,
)
def test_thought_states_hold_all_that_left(
    options: dict[str, Any], tiny: Tiny, adapters: Adapters
) -> None:
    path = tiny("llama")
    directory = adapters(path, **options)
    ids, plan = random_tokens(203, seed=5), fold_plan(ratio=0.5)
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    reference = KeptReference(base, plan, QUERIES)
    with reference.attending():
        expected, states = naive.log_probs(
            base, Adapter.load(directory), ids, plan, options["rule"]
        )
    model, keeper = load(path, directory)
    found = log_probs(model, ids, plan, keeper=keeper)
    assert_same_marks(found.folds[0], reference)
    assert [fold.spans for fold in found.folds[0]] == [((3, 5),), ((5, 7),), ((7, 9),)]
    assert found.states is not None
    torch.testing.assert_close(found.logprobs[0, 1:], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.states[:, 0], states, atol=1e-4, rtol=1e-3)


def test_given_marks_are_kept(tiny: Tiny) -> None:
    """One sequence has marks of all folds, one of the first few, one of none."""
    model, keeper = load(tiny("llama"))
    plans = [fold_plan(pin) for pin in PINS]
    sequences = [random_tokens(n, seed=n) for n in LENGTHS]
    batch = AlignedBatch.align(sequences, plans)
    marks = [random_marks(plans[0], 6, 1), random_marks(plans[1], 4, 2), ()]
    found = replay(model, batch, keeper=keeper, marks=marks)
    free = replay(model, batch, keeper=keeper)
    for b, (ids, plan) in enumerate(zip(sequences, plans, strict=True)):
        reference = KeptReference(model.base, plan, QUERIES, marks=marks[b])
        with torch.no_grad():
            expected = reference.log_probs(ids).float()
        torch.testing.assert_close(found.logprobs[b, 1 : len(ids)], expected, atol=5e-6, rtol=0)
        for number, fold in enumerate(found.folds[b]):
            own = reference.own.get(number)
            given = marks[b][number] if number < len(marks[b]) else None
            if own is None or fold.marks is None:
                assert own is None and fold.marks is None and fold.agreement is None
                continue
            own_marks = torch.stack([own[layer] for layer in range(LAYERS)])
            if given is None:
                assert torch.equal(fold.marks, own_marks) and fold.agreement is None
                continue
            assert torch.equal(fold.marks, given)
            share = (own_marks & given).sum() / given.sum()
            assert fold.agreement is not None
            assert float(fold.agreement) == pytest.approx(float(share)) and 0.3 < share < 0.9
    moved = (found.logprobs - free.logprobs).abs().amax(1)
    assert moved[0] > 1e-3 and moved[1] > 1e-3 and moved[2] == 0


def test_own_marks_change_nothing(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("qwen2")
    model, keeper = load(path, adapters(path, rule="ridge"))
    batch = AlignedBatch.align(
        [random_tokens(n, seed=n) for n in LENGTHS], [fold_plan(pin) for pin in PINS]
    )
    free = replay(model, batch, keeper=keeper)
    marks = [[fold.marks for fold in folds] for folds in free.folds]
    forced = replay(model, batch, keeper=keeper, marks=marks)
    assert torch.equal(forced.logprobs, free.logprobs)
    agreed = [f.agreement for folds in forced.folds for f in folds if f.marks is not None]
    assert agreed and all(a is not None and float(a) == 1 for a in agreed)


def _other(marks: list[Tensor | None], number: int, other: Tensor | None) -> list[Tensor | None]:
    return [*marks[:number], other, *marks[number + 1 :]]


def test_what_does_not_fit_is_refused(tiny: Tiny) -> None:
    model, keeper = load(tiny("llama"))
    plan = fold_plan()
    batch = AlignedBatch.align([random_tokens(203), random_tokens(203)], [plan, plan])
    right = random_marks(plan, 6, 0)
    last = right[5]
    assert last is not None and right[0] is None
    one_more = last.clone()
    one_more[2, 1] = True
    for marks, message in (
        ([right], "2 sequences, and marks of 1"),
        ([right, [*right, last]], "sequence 1 folds 6 times, and has marks of 7"),
        ([right, _other(right, 0, last)], "sequence 1, fold 0: it keeps all"),
        ([_other(right, 5, last[:2]), ()], r"sequence 0, fold 5: marks must be bool of shape \[3"),
        ([_other(right, 5, last.int()), ()], "sequence 0, fold 5: marks must be bool"),
        ([(), _other(right, 5, one_more)], "sequence 1, fold 5: every head keeps 32 .* has 48"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(model, batch, keeper=keeper, marks=marks)
    with pytest.raises(ValueError, match="give the replay a Keeper"):
        replay(model, batch)
    plain = AlignedBatch.align([random_tokens(203)], [fold_plan(keep_blocks=0)])
    with pytest.raises(ValueError, match="a plan that keeps none"):
        replay(model, plain, marks=[()])
    with pytest.raises(ProbesError, match="for 2 layers"):
        Keeper(model, Probes.of(QUERIES[:2], "none"))
    with pytest.raises(ValueError, match="what is kept"):
        AlignedBatch.align([[5], [5]], [plan, fold_plan(keep_blocks=1)])


@pytest.mark.parametrize("plain", [False, True])
def test_probes_of_the_adapter_come_first(
    plain: bool, tiny: Tiny, adapters: Adapters, tmp_path: Path
) -> None:
    """They take the keeper's place while the adapter is on, and go where the adapter goes."""
    path, ids, plan = tiny("llama"), random_tokens(203, seed=5), fold_plan()
    kind = {"plain": True} if plain else {"rule": "ridge"}
    own = make_probes(9)
    model, keeper = load(path, adapters(path, **kind, own_probes=9))
    bare, _ = load(path, adapters(path, **kind))

    def marks(model: PTEModel, keeper: Keeper | None) -> Tensor:
        found = log_probs(model, ids, plan, keeper=keeper).folds[0][-1].marks
        assert found is not None
        return found

    by_own, by_keeper = marks(bare, Keeper(bare, own)), marks(bare, keeper)
    assert not torch.equal(by_own, by_keeper)
    for given in (keeper, None):
        assert torch.equal(marks(model, given), by_own)
    with model.adapter_disabled():
        assert torch.equal(marks(model, keeper), marks(PTEModel.from_pretrained(path), keeper))
        with pytest.raises(ValueError, match="give the replay a Keeper"):
            marks(model, None)
    assert torch.equal(marks(model, None), by_own)
    model.save_pretrained(tmp_path)
    saved = Adapter.load(tmp_path)
    assert saved.probes is not None and saved.probes.content_hash == own.content_hash
    model.load_adapter_weights(bare.adapter())
    assert model.adapter().probes is None and torch.equal(marks(model, keeper), by_keeper)
    model.load_adapter_weights(saved)
    assert torch.equal(marks(model, keeper), by_own)
    wrong = replace(saved, probes=make_probes(layers=2))
    with pytest.raises(ProbesError, match="for 2 layers"):
        model.load_adapter_weights(wrong)
    with pytest.raises(ProbesError, match="for 2 layers"):
        PTEModel.from_pretrained(path, wrong)
