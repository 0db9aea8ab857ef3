"""`train grpo` on an environment of the verifiers library: turns, and one replay of an episode."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pte_vllm.adapter.format import Adapter
from pte_vllm.launch import ProcessGroup, pte_command
from pte_vllm.train.data.questions import QuestionStream
from pte_vllm.train.environments.process import EnvironmentFailed, EnvironmentWorker
from pte_vllm.train.environments.tasks import TaskSource
from pte_vllm.train.grpo.episodes import EpisodeSampler
from pte_vllm.train.grpo.publishing import Publisher
from pte_vllm.train.options.environments import EnvironmentOptions
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.train.run.log import read_metrics
from pte_vllm.wire.client import RolloutClient
from tests.harness.engine import BLOCK
from tests.harness.kinds import CHAT_TEMPLATE
from tests.harness.server import WINDOW, Server

TASKSETS = Path(__file__).parent / "tasksets"
TIMEOUT_S = 900.0


@pytest.fixture(scope="module")
def server(shared: Callable[..., Server]) -> Server:
    return shared("chat", {})


@pytest.fixture(scope="module")
def base(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's model, with the template that the server was told."""
    path = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(server.model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def _options(server: Server, base: Path, start: Path, out: Path, steps: int) -> dict[str, Any]:
    return {
        "model.base": str(base),
        "model.adapter": str(start),
        "model.device": "cpu",
        "plan.window_tokens": WINDOW,
        "plan.block_size": BLOCK,
        "plan.keep_tokens": BLOCK,
        "plan.probes": str(server.probes),
        "optimizer.lr": 1e-3,
        "optimizer.steps": steps,
        "sampling.max_tokens": 60,
        "sampling.group_size": 3,
        "sampling.groups_per_step": 2,
        "sampling.temperature": 0.9,
        "server.url": server.url,
        "server.adapter_name": "talks",
        "data.source": "verifiers",
        "environment.taskset": "talk",
        "environment.path": str(TASKSETS),
        "run.out": str(out),
        "run.save_every_steps": 1,
    }


def test_a_run_learns_from_episodes(
    server: Server, base: Path, adapters: Callable[..., Path], tmp_path: Path
) -> None:
    """The replay of whole episodes agrees with what each turn sampled; failed ones are left out."""
    start, out = adapters(server.model, rank=8, rule="ridge"), tmp_path / "run"
    options = _options(server, base, start, out, 3) | {"environment.taskset_options": "failing=1"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with ProcessGroup(pte_command("train", "grpo", *words), log=tmp_path / "log") as trainer:
        trainer.wait_exit(timeout_s=TIMEOUT_S)
    log = (tmp_path / "log").read_text()
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3], log
    for record in records:
        assert record["drift"] <= 1e-4 and record["kept_agreement"] > 0.99
        assert record["drift_tokens"] > 0 and record["folds"] > 1
        assert 0 < record["reward"] < 1
    assert "3 of 6 episodes failed; the last: ValueError: this one fails" in log


def test_episodes_are_records_of_all_turns(
    server: Server, base: Path, adapters: Callable[..., Path], tmp_path: Path
) -> None:
    start = adapters(server.model, rank=8, rule="ridge")
    options = _options(server, base, start, tmp_path / "run", 1)
    run = GrpoRun.from_options(options | {"environment.path": [str(TASKSETS)]})
    with (
        RolloutClient(server.url) as client,
        closing(EnvironmentWorker(run.environment, log=tmp_path / "log")) as worker,
    ):
        publisher = Publisher(client, "talks")
        publisher.publish(Adapter.load(start))
        stream = QuestionStream(TaskSource("talk", worker.num_tasks), seed=0)
        batch = EpisodeSampler(run, client, publisher, worker).batch(stream, 1)
    assert worker.num_tasks == 4 and len(batch.samples) == 6
    for sample in batch.samples:
        episode = sample.rollout
        assert len(episode.plan.pin_spans) == 2 and episode.plan.keep_tokens == BLOCK
        assert 0 in episode.mask and episode.mask[0] == 1 == episode.mask[-1]
        assert episode.weight_versions[-1].version == publisher.version
        assert 0 <= sample.reward < 1 and sample.advantage is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taskset": "no-such-thing"}, "taskset 'no-such-thing' not found"),
        ({"python": "/nowhere/python"}, "--environment.python"),
        ({"taskset_options": {"sise": 3}}, "sise"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = {"taskset": "talk", "path": (str(TASKSETS),), **changes}
    with pytest.raises(EnvironmentFailed, match=message):
        EnvironmentWorker(EnvironmentOptions(**values), log=tmp_path / "log")


def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    options = EnvironmentOptions(taskset="talk", path=(str(TASKSETS),))
    with closing(EnvironmentWorker(options, log=tmp_path / "log")) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailed, match="its process ended with status -9; see"):
            list(worker.play([{"id": "a"}]))
