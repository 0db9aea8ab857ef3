"""Which of the engine's requests a client means: `pte_vllm.engine.thoughts.find_id`."""

from __future__ import annotations

from pte_vllm.engine.thoughts import find_id


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
