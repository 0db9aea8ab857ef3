"""A real server scores given tokens under a plan, as it samples them and as the replay says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from pte_vllm.wire.client import RolloutClient, ServerError
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE
from tests.harness.server import WINDOW, Server
from tests.server.pushed import SAMPLING, difference, make_versions, push_all


@pytest.fixture(scope="module")
def versions(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> dict[str, Path]:
    return make_versions(tiny("qwen3"), adapters)


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server], versions: dict[str, Path]) -> Server:
    server = shared("admin")
    push_all(server, versions)
    return server


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url, admin_key=ADMIN_KEY) as client:
        yield client


@pytest.mark.parametrize(
    "plan",
    [
        {"window_tokens": 2 * BLOCK},
        {"evict": "random", "evict_seed": 2**53 + 1},
        {"keep_tokens": 2 * BLOCK},
        {"keep_tokens": BLOCK, "keep_score": "random", "evict_seed": 3},
    ],
    ids=str,
)
def test_scores_agree_with_rollouts(
    server: Server, client: RolloutClient, versions: dict[str, Path], plan: dict
) -> None:
    prompts = [random_tokens(30 + 20 * i, 500, i) for i in range(2)]
    options = {"adapter": "ridge", **plan}
    sampling = {**SAMPLING, "temperature": 1.0}
    sampled = {r.group_id: r for r in client.rollouts(prompts, sampling=sampling, **options)}
    records = [sampled["0"], sampled["1"]]
    scored = client.score(
        [r.token_ids for r in records],
        [len(r.prompt_ids) for r in records],
        kept=[r.kept for r in records],
        **options,
    )
    for record, score in zip(records, scored, strict=True):
        assert len(score.fold_events) >= 6 and score.plan == record.plan
        for ours, theirs in zip(score.fold_events, record.fold_events, strict=True):
            assert (ours.at, ours.blocks, ours.spans) == (theirs.at, theirs.blocks, theirs.spans)
            assert ours.rho == pytest.approx(theirs.rho, rel=1e-3)
        assert score.kept == record.kept and (record.kept is not None) == ("keep_tokens" in plan)
        assert difference(server, versions, record) <= TOLERANCE
        pairs = zip(record.logprobs, score.logprobs, strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 2e-4
    if "keep_tokens" in plan:
        (first, second), ids = (r.kept for r in records), [r.token_ids for r in records]
        assert first is not None and second is not None
        with pytest.raises(ServerError, match=rf"kept: {len(second) + 1} entries .* sequence 1"):
            list(client.score(ids, [30, 50], kept=[first, (*second, second[-1])], **options))
    # Another rule is another distribution, so the options do arrive.
    other = client.score([records[0].token_ids], [30], rule="none", **options)[0]
    assert (scored[0].rule, other.rule) == ("ridge", "none")
    assert max(abs(a - b) for a, b in zip(other.logprobs, scored[0].logprobs, strict=True)) > 0.01


@pytest.mark.parametrize("adapter", [None, "ridge"])
def test_scores_name_the_most_probable_tokens(
    server: Server, client: RolloutClient, versions: dict[str, Path], adapter: str | None
) -> None:
    """Beside the same log-probs as without, and with the likeliest token where it stands itself."""
    tokens, question = random_tokens(WINDOW + 3 * BLOCK, 500, 9), 20
    sequences = [tokens, random_tokens(60, 500, 10)]
    plain = client.score(sequences, [question] * 2, adapter=adapter)
    most = 5  # the server's --max-logprobs
    for record, before in zip(
        client.score(sequences, [question] * 2, adapter=adapter, top_logprobs=most),
        plain,
        strict=True,
    ):
        assert record.num_top == most and before.num_top == 0
        assert record.logprobs == pytest.approx(before.logprobs, abs=1e-5)
        for own, value, ids, top in zip(
            record.completion_ids,
            record.logprobs,
            record.top_ids,
            record.top_logprobs,
            strict=True,
        ):
            assert len(set(ids)) == most and list(top) == sorted(top, reverse=True)
            if own in ids:
                assert top[ids.index(own)] == pytest.approx(value, abs=1e-6)
            else:
                assert value <= top[-1]
    # The likeliest token is the one that greedy sampling takes.
    (greedy,) = client.rollouts(
        [tokens[:question]],
        adapter=adapter,
        sampling={"temperature": 0.0, "max_tokens": WINDOW + 2 * BLOCK, "ignore_eos": True},
    )
    (record,) = client.score([greedy.token_ids], [question], adapter=adapter, top_logprobs=1)
    gaps = [top[0] - own for own, top in zip(record.logprobs, record.top_logprobs, strict=True)]
    same = [own == ids[0] for own, ids in zip(record.completion_ids, record.top_ids, strict=True)]
    assert max(gaps) < 1e-3 and sum(same) >= len(same) - 1  # up to near ties
    with pytest.raises(ServerError, match="top_logprobs is 6, more than .* --max-logprobs 5"):
        client.score([tokens], [question], top_logprobs=6)


def test_scores_without_an_answer(server: Server, client: RolloutClient) -> None:
    """vLLM's own route echoes a prompt and samples nothing; its folds keep all the same."""
    tokens, question = random_tokens(WINDOW + 7 * BLOCK, 500, 12), 30
    found = {}
    for keep in (0, BLOCK):
        echoed = server.client.completions.create(
            model="base",
            prompt=tokens,
            max_tokens=0,
            echo=True,
            logprobs=0,
            extra_body={"vllm_xargs": {"pte_keep": keep, "pte_pin_tokens": question}},
        )
        assert echoed.usage.completion_tokens <= 1  # vLLM computes one, and drops it
        (score,) = client.score([tokens], [question], keep_tokens=keep)
        found[keep] = echoed.choices[0].logprobs.token_logprobs[question : len(tokens)]
        assert found[keep] == pytest.approx(score.logprobs, abs=TOLERANCE)
        assert any(score.kept or ()) == bool(keep)
    assert found[0] != pytest.approx(found[BLOCK], abs=0.01)
    url = f"{server.url}/pte/v1/score"
    body = {"token_ids": [tokens], "prompt_tokens": [len(tokens)], "keep_tokens": BLOCK}
    answer = httpx.post(url, json=body, timeout=30)
    assert answer.status_code == 400 and f"prompt_tokens {len(tokens)}" in answer.text
