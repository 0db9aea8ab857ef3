"""Options of adapters, engines and requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pte_vllm.method.options import EngineConfig, PTEConfig
from pte_vllm.method.requests import RequestOptions


def test_adapter_options_survive_json() -> None:
    config = PTEConfig(rank=8, global_tokens=5, rule="sum", read="key", normalize="row")
    assert PTEConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 is not supported"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"global_tokens": 2.5}, "global_tokens must be a positive integer"),
        ({"rule": "mean"}, "rule must be one of paper, sum, none, ridge, delta, got 'mean'"),
        ({"read": "both"}, "read must be one of"),
        ({"normalize": "l2"}, "normalize must be one of"),
        ({"features": "cubed"}, "features must be one of"),
        ({"features": "squared", "read": "value"}, "features squared need read key"),
        ({"keys": "raw"}, "keys must be one of"),
        ({"init": "zeros"}, "init must be one of"),
        ({"rule": "ridge", "rank": 8, "global_tokens": 4}, "rule ridge needs global_tokens equal"),
        ({"rule": "delta", "rank": 4, "global_tokens": 8}, "rule delta needs global_tokens equal"),
        ({"colour": "red", "size": 1}, 'unknown fields in "pte": colour, size'),
    ],
)
def test_bad_adapter_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PTEConfig.from_dict({**PTEConfig().to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_tokens": -1}, "--pte-window must not be negative, got -1"),
        ({"window_tokens": 1.5}, "--pte-window must be an integer"),
        ({"evict_ratio": 0.0}, r"--pte-evict-ratio must lie in \(0, 1\), got 0.0"),
        ({"max_prompt_tokens": 0}, "--pte-max-prompt-tokens must be positive, got 0"),
        ({"keep_thoughts": -1}, "--pte-keep-thoughts must not be negative, got -1"),
        ({"keep_thoughts": 1.5}, "--pte-keep-thoughts must be an integer"),
        ({"keep_thoughts_mib": -1}, "--pte-keep-thoughts-mib must not be negative, got -1"),
    ],
)
def test_bad_engine_options_name_the_flag(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**change)


def test_engine_options_travel_in_additional_config() -> None:
    config = EngineConfig(window_tokens=256, evict_ratio=0.5, max_prompt_tokens=99)
    carried = SimpleNamespace(additional_config={EngineConfig.KEY: config.to_dict()})
    assert EngineConfig.from_vllm(carried) == config
    assert EngineConfig.from_vllm(SimpleNamespace(additional_config={"other": 1})) is None
    assert EngineConfig.from_vllm(SimpleNamespace()) is None


@pytest.mark.parametrize("value", [128, "128", 128.0, " 128 "])
def test_request_numbers_come_in_several_forms(value: object) -> None:
    assert RequestOptions.parse({"pte_window": value}).window_tokens == 128


def test_request_options_of_others_are_left_alone() -> None:
    assert RequestOptions.parse({"my_plugin": 1}) == RequestOptions()
    assert RequestOptions.parse(None) == RequestOptions()
    assert RequestOptions.parse({"pte_window": None}) == RequestOptions()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pte_windw": 1}, "unknown option 'pte_windw'"),
        ({"pte_window": "wide"}, "pte_window must be an integer, got 'wide'"),
        ({"pte_window": True}, "pte_window must be an integer"),
        ({"pte_window": -16}, "pte_window must not be negative"),
        ({"pte_pin_tokens": "-3"}, "pte_pin_tokens must not be negative"),
        ({"pte_state_id": 7}, "pte_state_id must be the id"),
        ({"pte_state_id": ""}, "pte_state_id must be the id"),
        ({"pte_update": "mean"}, "pte_update must be one of"),
        ({"pte_evict": "newest"}, "pte_evict must be one of oldest, random, got 'newest'"),
        ({"pte_evict_seed": "x"}, "pte_evict_seed must be an integer"),
        ({"pte_evict_seed": 2**63}, r"pte_evict_seed must lie in \[0, 2\*\*63\)"),
        ({"pte_keep": "all"}, "pte_keep must be an integer, got 'all'"),
        ({"pte_keep": -32}, "pte_keep must not be negative"),
        ({"pte_keep_score": "best"}, "pte_keep_score must be one of expected, random, got 'best'"),
        ({"pte_return_kept": 2}, "pte_return_kept must be true or false"),
        ({"pte_return_kept": "yes"}, "pte_return_kept must be true or false"),
        ({"pte_kept": 3}, "pte_kept: what folds kept must be a list, got int"),
        ({"pte_kept": [None, "?"]}, "pte_kept: what fold 1 kept must be base64 or null"),
    ],
)
def test_bad_request_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestOptions.parse(given)


def test_request_plan_takes_the_engines_defaults() -> None:
    engine = EngineConfig(window_tokens=256, evict_ratio=0.5)
    plan = RequestOptions().plan(engine, num_prompt_tokens=40, block_size=32)
    assert (plan.pin_tokens, plan.window_tokens, plan.evict_ratio) == (40, 256, 0.5)
    own = RequestOptions.parse({"pte_window": 64, "pte_pin_tokens": 0})
    plan = own.plan(engine, num_prompt_tokens=40, block_size=32)
    assert (plan.pin_tokens, plan.window_tokens) == (0, 64)
    assert (plan.evict, plan.evict_seed) == ("oldest", 0)
    given = {"pte_evict": "random", "pte_evict_seed": 3}
    drawn = RequestOptions.parse(given)
    assert drawn.to_args() == given
    plan = drawn.plan(engine, num_prompt_tokens=40, block_size=32)
    assert (plan.evict, plan.evict_seed) == ("random", 3)
    assert engine.plan(pin_tokens=40, block_size=32).first_fold == 320


def test_what_a_request_keeps() -> None:
    engine = EngineConfig(window_tokens=256, keep_tokens=64, probes="file")

    def kept(**given: Any) -> tuple[int, str, int]:
        options = RequestOptions.parse(given)
        assert RequestOptions.parse(options.to_args()) == options
        plan = options.plan(engine, num_prompt_tokens=40, block_size=32)
        return plan.keep_tokens, plan.keep_score, plan.evict_seed

    assert kept() == (64, "expected", 0)
    assert kept(pte_keep=0) == (0, "expected", 0)
    assert kept(pte_keep="32", pte_keep_score="random", pte_evict_seed=7) == (32, "random", 7)
    # The server's default is for windows whose oldest blocks leave.
    assert kept(pte_window=0) == kept(pte_evict="random") == (0, "expected", 0)
    assert kept(pte_kept=[None, "YWI="], pte_return_kept=True) == (64, "expected", 0)
    assert engine.plan(pin_tokens=40, block_size=32).keep_tokens == 64
    # As vLLM's `vllm_xargs` and headers carry lists with nulls, and truth.
    record = RequestOptions.parse({"pte_kept": [None, "YWI="], "pte_return_kept": True})
    for marks, truth in ((["", "YWI="], 1), (", YWI=", "true")):
        assert RequestOptions.parse({"pte_kept": marks, "pte_return_kept": truth}) == record
    assert not RequestOptions.parse({"pte_return_kept": "0"}).return_kept


def test_request_plan_refuses_what_does_not_fit() -> None:
    engine = EngineConfig(window_tokens=256, max_prompt_tokens=30)
    with pytest.raises(ValueError, match="pte_pin_tokens is 41, beyond the prompt of 40"):
        RequestOptions(pin_tokens=41).plan(engine, num_prompt_tokens=40, block_size=32)
    with pytest.raises(ValueError, match="pte_window: window of 100 tokens is not a multiple"):
        RequestOptions(window_tokens=100).plan(engine, num_prompt_tokens=20, block_size=32)
    with pytest.raises(ValueError, match="40 pinned tokens exceed .*--pte-max-prompt-tokens 30"):
        RequestOptions().plan(engine, num_prompt_tokens=40, block_size=32)
    for given, message in (
        ({"pte_evict_seed": 0}, "pte_evict_seed is 0, but nothing is drawn: send pte_evict random"),
        ({"pte_evict": "oldest", "pte_evict_seed": 5}, "pte_evict_seed is 5, but nothing is drawn"),
        ({"pte_evict": "random", "pte_window": 0}, "pte_evict random needs a window, and this"),
        ({"pte_keep": 32}, "pte_keep is 32, and this server has no probes .* --pte-probes"),
        ({"pte_keep": 33, "pte_keep_score": "random"}, "pte_keep: keep of 33 tokens is not a mult"),
        ({"pte_keep": 32, "pte_window": 0}, "pte_keep is 32, but this request has full attention"),
        ({"pte_keep": 32, "pte_evict": "random"}, "pte_keep is 32, but pte_evict random"),
        ({"pte_keep_score": "random"}, "pte_keep_score is random, but nothing is kept"),
        ({"pte_kept": [None]}, "pte_kept says what folds keep, but nothing is kept"),
    ):
        with pytest.raises(ValueError, match=message):
            RequestOptions.parse(given).plan(engine, num_prompt_tokens=20, block_size=32)
    unbounded = RequestOptions(window_tokens=0).plan(engine, num_prompt_tokens=40, block_size=32)
    assert not unbounded.bounded
