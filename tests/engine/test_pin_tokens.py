"""What is pinned where a request does not say: `--pte-pin-tokens`, `--pte-require-pin-tokens`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from pte_vllm.cli.main import main
from pte_vllm.cli.serve import configs, parse
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import RequestOptions
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import TOLERANCE, replayed

PIN, WINDOW = 2 * BLOCK, 4 * BLOCK


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine(model, window_tokens=WINDOW, pin_tokens=PIN, lora_rank=8)
    yield engine
    engine.close()


@pytest.mark.parametrize("question", [20, 45, 300])
def test_parts_of_a_sequence_have_one_plan(
    engine: Engine, model: Path, adapters: Callable[..., Path], question: int
) -> None:
    """AReaL sends question and partial answer as one prompt, to go on and to score by echo.

    Short questions leave room for thoughts in what is pinned; of long ones a part is folded.
    """
    adapter = lora("thoughts", adapters(model, rank=8, rule="ridge", seed=31), 31)
    prompt = random_tokens(question, 500, question)
    (first,) = engine.run([Job(prompt, 230, adapter)])
    (rest,) = engine.run([Job([*prompt, *first.tokens], 150, adapter)])
    sequence = [*prompt, *first.tokens, *rest.tokens]
    (echo,) = engine.run([Job(sequence, 1, adapter, prompt_logprobs=True)])
    plan = FoldPlan(pin_tokens=PIN, window_tokens=WINDOW, block_size=BLOCK)
    expected = replayed(model, Path(adapter.lora_path), sequence, plan)
    for found in ([*first.logprobs, *rest.logprobs], echo.prompt_scores):
        assert (torch.tensor(found) - expected[-len(found) :]).abs().max() <= TOLERANCE
    engine.check_idle()


def test_a_request_may_say_otherwise(engine: Engine) -> None:
    prompt = random_tokens(45, 500, 1)
    engine.run([Job(prompt, 5, options={"pte_pin_tokens": 45})])
    engine.run([Job(prompt, 5, options={"pte_pin_tokens": PIN})])  # the default, said by a client
    with pytest.raises(VLLMValidationError, match="beyond the prompt"):
        engine.run([Job(prompt, 5, options={"pte_pin_tokens": PIN + 1})])


def _pinned(config: EngineConfig, num_prompt: int, pin_tokens: int | None = None) -> int:
    options = RequestOptions(pin_tokens=pin_tokens)
    return options.plan(config, num_prompt_tokens=num_prompt, block_size=BLOCK).pin_tokens


def test_defaults() -> None:
    assert _pinned(EngineConfig(), 45) == 45
    assert (
        _pinned(EngineConfig(pin_tokens=64), 45) == _pinned(EngineConfig(pin_tokens=64), 99) == 64
    )
    assert _pinned(EngineConfig(pin_tokens=0), 45) == 0
    assert _pinned(EngineConfig(pin_tokens=64), 45, 3) == 3


@pytest.mark.parametrize("options", [{}, {"pte_window": 2 * BLOCK}, {"pte_pin_tokens": None}])
def test_what_is_pinned_has_to_be_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """The operator may refuse requests whose question cannot be told from the answer."""
    required = EngineConfig(window_tokens=WINDOW, require_pin_tokens=True).to_dict()
    monkeypatch.setitem(engine.engine.vllm_config.additional_config, "pte", required)
    prompt = random_tokens(45, 500, 1)
    with pytest.raises(VLLMValidationError, match="--pte-require-pin-tokens: .*X-PTE-Pin-Tokens"):
        engine.run([Job(prompt, 5, options=options)])
    engine.run([Job(prompt, 5, options={**options, "pte_pin_tokens": 20})])
    engine.run([Job(prompt, 5, options={**options, "pte_window": 0})])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pte-pin-tokens", "-1"], "--pte-pin-tokens must not be negative"),
        (
            ["--pte-pin-tokens", "600", "--pte-max-prompt-tokens", "512"],
            "--pte-pin-tokens 600 exceeds --pte-max-prompt-tokens 512",
        ),
        (["--pte-keep-loaded", "-1"], "--pte-keep-loaded must not be negative"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "model", *flags]) == 2
    assert message in capsys.readouterr().err


def test_flags_reach_the_engine() -> None:
    engine, service = configs(parse(["m", "--pte-pin-tokens", "64", "--pte-keep-loaded", "5"])[0])
    assert engine.pin_tokens == 64 and not engine.require_pin_tokens and service.keep_loaded == 5
    assert configs(parse(["m", "--pte-require-pin-tokens"])[0])[0].require_pin_tokens
    with pytest.raises(ValueError, match="leave one of them out"):
        EngineConfig(pin_tokens=1, require_pin_tokens=True)
