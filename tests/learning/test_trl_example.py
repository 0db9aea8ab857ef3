"""examples/trl_grpo.py against a real server: TRL's trainer, our sampler, replay and adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.plan import FoldPlan
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

STEPS = 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo.py"


@pytest.fixture(scope="module")
def example() -> Any:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_few_steps(example: Any, tiny: Tiny, adapters: Adapters, tmp_path: Path) -> None:
    path = tiny("llama")
    start = adapters(path, rank=8, rule="paper")
    out = tmp_path / "out"
    with Server(path, {}, log=tmp_path / "server.log") as server:
        server.wait_ready()
        trainer = _train(example, server, path, start, out)
        versions = server.get("/pte/v1/adapters")["adapters"][0]
        server.wait_idle()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(history) == STEPS
    for entry in history:
        # Sampler and learner compute the same policy, every step, with every version pushed.
        assert entry["sampling/sampling_logp_difference/mean"] <= 1e-4
        assert entry["sampling/sampling_logp_difference/max"] <= 2e-3
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert entry["grad_norm"] > 0
    plan = FoldPlan(pin_tokens=13, window_tokens=WINDOW, block_size=trainer.plan.block_size)
    longest = max(entry["completions/max_length"] for entry in history)
    assert 13 + longest > plan.first_fold + plan.stride  # there were folds
    assert versions["name"] == "policy" and versions["newest"] == STEPS + 1
    before, after = Adapter.load(start), Adapter.load(out)
    for name, b in before.lora_b.items():
        assert not torch.equal(after.lora_b[name], b), name
    for layer, encoder in before.encoders.items():
        for name in ("query", "w_q", "w_k", "w_v", "gain", "global_"):
            assert not torch.equal(getattr(after.encoders[layer], name), getattr(encoder, name))


def _train(example: Any, server: Server, path: Path, start: Path, out: Path) -> Any:
    arguments = {
        "model": str(path),
        "adapter": str(start),
        "server": server.url,
        "out": str(out),
        "steps": STEPS,
        "lr": 1e-3,
        "group_size": 4,
        "max_tokens": 260,
    }
    return example.train(example.argparse.Namespace(**arguments))


@pytest.mark.slow
def test_log_probs_by_position(example: Any, tiny: Tiny, adapters: Adapters) -> None:
    """TRL's padding, left of prompts and right of answers, against one sequence at a time."""
    from pte_vllm.train.replay.modeling import PTEModel
    from pte_vllm.train.replay.segments import log_probs

    path = tiny("qwen3")
    trainer = example.PTEGRPOTrainer.__new__(example.PTEGRPOTrainer)
    trainer.pte = PTEModel.from_pretrained(path, adapters(path, rank=8))
    trainer.plan = FoldPlan(pin_tokens=0, window_tokens=64, block_size=16)
    trainer.temperature = 0.7
    sizes = ((5, 150), (40, 90), (23, 201))
    prompts = [random_tokens(p, seed=p) for p, _ in sizes]
    answers = [random_tokens(a, seed=a) for _, a in sizes]
    P, C = 40, 201
    ids = torch.ones(3, P + C, dtype=torch.int64)
    mask = torch.zeros(3, P + C, dtype=torch.int64)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[b, P - len(prompt) : P + len(answer)] = torch.tensor(prompt + answer)
        mask[b, P - len(prompt) : P + len(answer)] = 1
    call = example.PTEGRPOTrainer._get_per_token_logps_and_entropies
    call = getattr(call, "__wrapped__", call)
    with torch.no_grad():
        found, entropies, aux = call(
            trainer, None, ids, mask, C, batch_size=2, compute_entropy=True
        )
    assert aux is None and found.shape == entropies.shape == (3, C)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        plan = FoldPlan(pin_tokens=len(prompt), window_tokens=64, block_size=16)
        expected = log_probs(trainer.pte, prompt + answer, plan, temperature=0.7).logprobs[0]
        torch.testing.assert_close(
            found[b, : len(answer)], expected[len(prompt) :], atol=1e-4, rtol=0
        )
        assert not found[b, len(answer) :].any() and not entropies[b, len(answer) :].any()
        assert (entropies[b, : len(answer)] > 0).all()
