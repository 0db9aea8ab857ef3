"""With drafts a step verifies several tokens at once; log-probs stay the replay's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.kept import assert_selected
from tests.harness.drafting import add_mtp_layer, calm_down, make_eagle_head
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK
LENGTH = WINDOW + 5 * BLOCK + 5
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


@pytest.fixture(scope="module", params=["ngram", "eagle", "mtp"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(
    method: str, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("calm")
    calm_down(tiny("qwen2" if method == "mtp" else "llama"), directory / "model")
    if method == "mtp":
        add_mtp_layer(directory / "model")
    elif method == "eagle":
        make_eagle_head(directory / "model", directory / "head")
    return directory / "model"


@pytest.fixture(scope="module")
def engine(method: str, model: Path, probes: Path) -> Iterator[Engine]:
    drafts = {
        "ngram": NGRAM,
        "eagle": {"model": str(model.parent / "head"), "num_speculative_tokens": 4},
        "mtp": {"num_speculative_tokens": 1},
    }
    made = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        probes=probes,
        max_num_seqs=16,
        speculative_config={"method": method, **drafts[method]},
        # In a process of its own: where vLLM's n-grams were imported, no other engine starts.
        distributed_executor_backend="mp",
    )
    yield made
    made.close()


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_mixed_batch(
    temperature: float,
    engine: Engine,
    model: Path,
    adapters: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A calm model counts, which n-grams and heads foresee, however it is sampled."""
    given = [
        lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1),
        lora("paper", adapters(model, rank=8, rule="paper", layers=[0, 2]), 2),
        None,
    ]
    options: tuple[dict[str, object], ...] = ({}, {"pte_keep": BLOCK}, {"pte_window": 0})
    jobs = [
        Job(random_tokens(9 + 21 * i, 500, i), LENGTH, adapter, dict(more), temperature, seed=i)
        for i, adapter in enumerate(given)
        for more in options
    ]
    drafts: list[int] = []
    lengths: dict[str, int] = {}
    accepted = 0
    schedule, requests = engine.scheduler.schedule, engine.scheduler.requests

    def watched(*args: object, **kwargs: object) -> object:
        nonlocal accepted
        for name, before in lengths.items():
            if name in requests:
                accepted += max(0, requests[name].num_tokens - before - 1)
        output = schedule(*args, **kwargs)
        verified = output.scheduled_spec_decode_tokens
        drafts.extend(map(len, verified.values()))
        lengths.clear()
        lengths.update({name: requests[name].num_tokens for name in verified})
        return output

    def on_step(step: int, request_ids: list[str]) -> None:
        if step in (60, 90):
            engine.preempt()

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    engine.run(jobs, on_step)
    engine.check_idle()
    assert drafts, "no draft was verified"
    assert accepted > len(drafts) // 10, f"{accepted} of {sum(drafts)} tokens were accepted"
    folding = [job for job in jobs if job.options.get("pte_window") != 0]
    worst = assert_parity(model, folding, WINDOW, min_folds=4)
    chosen = assert_selected([job for job in folding if job.keeps], WINDOW)
    print(
        f"{len(drafts)} verifications accepted {accepted} of {sum(drafts)} tokens, "
        f"{chosen} choices, max |Δ log p| {worst:.1e}"
    )
