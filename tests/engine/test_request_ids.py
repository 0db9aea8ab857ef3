"""Which of the engine's requests a client means: `pte_vllm.engine.request_ids`."""

from __future__ import annotations

from pte_vllm.engine.request_ids import RequestId, find_external, find_id


def test_names_of_requests() -> None:
    ids = [
        "cmpl-a-0-0123abcd",
        "cmpl-a-1-89abcdef",
        "0_cmpl-b-0-0123abcd",
        "1_cmpl-b-0-0123abcd",
        "0_cmpl-b-1-01234567",
        "1_cmpl-b-1-01234567",
        "chatcmpl-c-0123abcd",
        "1_chatcmpl-d-0123abcd",
    ]
    for name, index in {
        "cmpl-a": 0,
        "cmpl-a-0": 0,
        "cmpl-a-1": 1,
        "cmpl-b": 2,
        "cmpl-b-1": 3,
        "cmpl-b-1-0": 4,
        "cmpl-b-1-1": 5,
        "chatcmpl-c": 6,
        "chatcmpl-c-0": 6,
        "chatcmpl-d-1": 7,
        "cmpl-a-0-0123abcd": 0,
    }.items():
        assert find_id(name, ids) == ids[index], name
    for name in ("cmpl", "a", "cmpl-a-2", "chatcmpl-d", "cmpl-b-0-2", "", "chatcmpl-c-1"):
        assert find_id(name, ids) is None, name


def test_parts() -> None:
    assert RequestId.parse("2_cmpl-b-0") == RequestId("cmpl-b-0", 2)
    assert RequestId.parse("chatcmpl-c") == RequestId("chatcmpl-c", None)
    for text in ("2_cmpl-b-0", "chatcmpl-c"):
        assert str(RequestId.parse(text)) == text


def test_both_sides_of_the_engine_mean_the_same_request() -> None:
    """Of two prompts with two choices each, what the engine runs and what the server sent."""
    sent = [("cmpl-b-1", 2), ("cmpl-b-0", 2)]  # from new to old
    ids = [f"{c}_{external}-0123abcd" for external, n in reversed(sent) for c in range(n)]
    for name in ("cmpl-b", "cmpl-b-0", "cmpl-b-1", "cmpl-b-0-1", "cmpl-b-1-0", "cmpl-b-1-1", *ids):
        found = find_id(name, ids)
        assert found is not None and find_external(name, sent) in found, name
    for name in ("cmpl-b-2", "cmpl-b-1-2", "cmpl", "cmpl-c"):
        assert find_id(name, ids) is None and find_external(name, sent) is None, name


def test_a_response_is_its_newest_step() -> None:
    """`/v1/responses` numbers the steps of a response; a client knows the response only."""
    steps = ["resp_12ab_0-01234567", "resp_12ab_1-01234567", "resp_12_0-01234567"]
    assert find_id("resp_12ab", steps) == steps[1]
    assert find_id("resp_12ab_0", steps) == steps[0]
    assert find_external("resp_12ab", [("resp_12ab_1", 1), ("resp_12ab_0", 1)]) == "resp_12ab_1"
    assert find_external("resp_12a", [("resp_12ab_0", 1)]) is None
