"""A model's own answers, sampled by a server: questions, plan, and the flags of that server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.cli.eval import main as eval_command
from pte_vllm.wire.rollout import Rollout
from tests.harness.server import Server


def test_answers_by_a_server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    server, out = shared("admin"), tmp_path / "new" / "thoughts.jsonl"
    arguments = ["thoughts", str(tiny("qwen3")), str(out), "--url", server.url]
    arguments += ["--task", "gsm_symbolic", "--questions", "3", "--answers", "2"]
    arguments += ["--max-tokens", "40", "--max-prompt-tokens", "500"]
    assert eval_command(arguments) == 0
    found = [Rollout.from_json(line) for line in out.read_text().splitlines()]
    assert sorted((r.group_id, r.index) for r in found) == [(g, i) for g in "012" for i in (0, 1)]
    assert len({r.prompt_ids for r in found}) == 3 and len({r.completion_ids for r in found}) == 6
    for rollout in found:
        assert rollout.adapter is None and not rollout.plan.bounded
        assert rollout.plan.pin_tokens == len(rollout.prompt_ids)
        assert len(rollout.completion_ids) <= 40
    with pytest.raises(ValueError, match="exists already"):
        eval_command(arguments)


def test_a_model_that_is_too_short(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [str(tiny("llama")), str(tmp_path / "out.jsonl"), "--task", "chain_sum"]
    with pytest.raises(ValueError, match="--max-tokens are 41024 together"):
        eval_command(["thoughts", *arguments, "--max-tokens", "40000"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task is missing: which task of reasoning-gym"),
        (["--source", "jsonl"], "--path is missing"),
        (["--task", "a", "--template", "no place"], "--template must contain {prompt}"),
        (["--task", "a", "--questions", "0"], "--questions"),
        (["--task", "a", "--temperature", "0"], "--temperature"),
        (["--task", "a", "--url", "ftp://a"], "--url must start with http"),
        (
            ["--task", "gsm_symbolic", "--api-key-env", "NO_SUCH_KEY", "--url", "http://a"],
            "--api-key-env NO_SUCH_KEY: there is no such",
        ),
    ],
)
def test_mistakes_name_the_flag(
    arguments: list[str], message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        eval_command(["thoughts", str(tiny("llama")), str(tmp_path / "out.jsonl"), *arguments])
