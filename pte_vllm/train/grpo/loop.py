"""`pte-vllm train grpo`: sample, score, learn, push, and so on, until the last step.

    OUT/run.toml        every option, as resolved
    OUT/initial/        the adapter that the run started from
    OUT/checkpoints/    the newest ones (`run.checkpoint` says what they hold)
    OUT/metrics.jsonl   numbers by step; OUT/tensorboard/ the same
    OUT/training.png    reward, length and drift
    OUT/environment.log what an environment printed
    OUT/adapter/        after the last step

A run that was interrupted or killed goes on from its newest checkpoint with the same command. Every
step's adapter is pushed as a new version; versions only rise, also over a resume.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.data.questions import Problem, QuestionStream, prompt_ids
from pte_vllm.train.data.sources import open_stream
from pte_vllm.train.environments.process import EnvironmentFailed, EnvironmentWorker
from pte_vllm.train.environments.tasks import TaskSource
from pte_vllm.train.grpo.episodes import EpisodeSampler
from pte_vllm.train.grpo.learner import Learner, StepResult
from pte_vllm.train.grpo.loss import DriftError
from pte_vllm.train.grpo.publishing import Publisher, RolloutSource
from pte_vllm.train.grpo.sampling import Sampler, StepRollouts, check_plan
from pte_vllm.train.options.runs import GrpoRun
from pte_vllm.train.run.build import build_keeper
from pte_vllm.train.run.checkpoint import RunState
from pte_vllm.train.run.connection import connect
from pte_vllm.train.run.log import PLOT_FILE, MetricsLog, ProgressBar, plot_run
from pte_vllm.train.run.resume import resumed
from pte_vllm.train.run.signals import Interrupted, Signals
from pte_vllm.train.run.start import ADAPTER, StartedRun, learning_rate, load_tokenizer, start_run
from pte_vllm.wire.client import ServerError

INITIAL = "initial"
ENVIRONMENT_LOG = "environment.log"


def main(options: GrpoRun) -> int:
    """Train or go on; what stops it is said in a line. Returns the exit status."""
    run = resumed(options)
    try:
        with connect(run.server) as client:
            return 0 if train(run, client) else 130
    except (ServerError, DriftError, EnvironmentFailed, FloatingPointError) as error:
        print(f"pte-vllm: error: {error}", file=sys.stderr)
        return 2


def train(run: GrpoRun, source: RolloutSource, *, stream: QuestionStream | None = None) -> bool:
    """Train until the last step, from the newest checkpoint on if there is one.

    Args:
        run: the options of the run.
        source: the server that samples.
        stream: the questions; None: those that `run.data` names.

    Returns:
        Whether the last step was reached; False after SIGTERM or SIGINT.

    Raises:
        ValueError: naming the option, if one does not fit.
        OSError: if a file cannot be read or written.
        ServerError: if the server refuses, or stays away.
        DriftError: if server and replay do not compute the same policy.
        EnvironmentFailed: if the environment cannot be played.

    Before an error leaves here, the steps that were done are saved.
    """
    run = resumed(run)
    console = Console(stderr=True, highlight=False)
    console.print(f"server: {run.server.url}", soft_wrap=True)
    check_plan(run, source.wait_ready(run.server.retry_s))  # before anything that takes long
    with ExitStack() as until:
        worker: EnvironmentWorker | None = None
        if run.data.source == "verifiers" and stream is None:
            console.print(f"environment: {run.environment.taskset}, in a process that starts now")
            keys = {run.server.admin_key_env} - {None}
            worker = EnvironmentWorker(
                run.environment,
                log=run.run.directory / ENVIRONMENT_LOG,
                hidden={str(name) for name in keys},
            )
            until.callback(worker.close)
            tasks = TaskSource(str(run.environment.taskset), worker.num_tasks)
            stream = QuestionStream(tasks, seed=run.data.seed)
        return _train(run, source, stream, worker, console)


def _train(
    run: GrpoRun,
    source: RolloutSource,
    stream: QuestionStream | None,
    worker: EnvironmentWorker | None,
    console: Console,
) -> bool:
    console.print(f"model: {run.model.base}", soft_wrap=True)
    directory, tokenizer = run.run.directory, load_tokenizer(run.model.base)
    if stream is None:
        stream = open_stream(run.data, keep=_short_enough(run, tokenizer))
    start = start_run(run)
    if start.resumed:
        stream.restore(start.state.stream)  # type: ignore[arg-type]  # what `state` gave
        console.print(f"going on after step {start.state.step}")
    else:
        start.model.save_pretrained(directory / INITIAL)
    metrics = MetricsLog(directory, step=start.state.step, tensorboard=run.run.tensorboard)
    trainer = _Trainer(run, source, stream, tokenizer, start, metrics, worker)
    try:
        finished = trainer.run_steps(start.state, console)
    finally:
        metrics.close()
        if metrics.records:
            plot_run(metrics.records, directory / PLOT_FILE, title=directory.name)
    if finished:
        start.model.save_pretrained(directory / ADAPTER)
        console.print(f"wrote {directory / ADAPTER}", soft_wrap=True)
    return finished


def _short_enough(run: GrpoRun, tokenizer: Any) -> Callable[[Problem], bool]:
    def keep(problem: Problem) -> bool:
        if tokenizer is None and not isinstance(problem.prompt[0], int):
            raise ValueError(f"--model.base {run.model.base} has no tokenizer for {problem.key}")
        return len(prompt_ids(problem, tokenizer)) <= run.data.max_prompt_tokens

    return keep


class _Trainer:
    """The parts of a run that its steps use."""

    def __init__(
        self,
        run: GrpoRun,
        source: RolloutSource,
        stream: QuestionStream,
        tokenizer: Any,
        start: StartedRun,
        metrics: MetricsLog,
        worker: EnvironmentWorker | None,
    ) -> None:
        self._worker = worker
        self._run, self._source, self._stream, self._tokenizer = run, source, stream, tokenizer
        self._model, self._optimizer = start.model, start.optimizer
        self._checkpoints, self._metrics = start.checkpoints, metrics
        dtype = str(start.model.base.dtype).removeprefix("torch.")
        self._learner = Learner(
            start.model,
            start.optimizer,
            run.grpo,
            temperature=run.sampling.temperature,
            max_drift=run.grpo.drift_limit(dtype),
            max_grad_norm=run.optimizer.max_grad_norm,
            initial=Adapter.load(run.run.directory / INITIAL),
            keeper=build_keeper(start.model, run.plan),
        )

    def run_steps(self, state: RunState, console: Console) -> bool:
        """Do the remaining steps; returns whether all were done."""
        run, last = self._run, self._run.optimizer.steps
        check_plan(run, self._source.wait_ready(run.server.retry_s))
        publisher = Publisher(self._source, run.server.adapter_name, state.version)
        with (
            Signals() as signals,
            ProgressBar(console, title="grpo", done=state.step, total=last) as bar,
        ):
            sampler = self._sampler(publisher, bar.note)
            if state.step < last or not self._has_pushed_last():
                publisher.publish(self._model.adapter())
            step, position = state.step, self._stream.state()
            try:
                while step < last and not signals.came:
                    position = self._stream.state()
                    values = self._step(step + 1, sampler, publisher, signals)
                    step, position = step + 1, self._stream.state()
                    try:
                        values |= self._push(publisher)
                    finally:  # where the push fails, the step is done all the same
                        if step % run.run.log_every_steps == 0 or step == last:
                            self._metrics.add(step, values)
                    bar.update(step, values)
                    if step == last or step % run.run.save_every_steps == 0:
                        self._save(step, publisher.version, position)
            except Interrupted:
                pass
            except Exception as error:
                if isinstance(error, DriftError):
                    self._metrics.add(step + 1, {"drift": error.drift})
                bar.note(self._rescue(step, publisher.version, position))
                raise
            if step < last:
                self._save(step, publisher.version, position)
                bar.note(f"interrupted after step {step}: saved; the same command goes on")
        return step == last

    def _sampler(self, publisher: Publisher, note: Callable[[str], None]) -> Sampler:
        if self._worker is not None:
            return EpisodeSampler(self._run, self._source, publisher, self._worker, note=note)
        return Sampler(self._run, self._source, publisher, self._tokenizer, note=note)

    def _step(
        self, step: int, sampler: Sampler, publisher: Publisher, signals: Signals
    ) -> dict[str, float]:
        """Sample and learn; the model has changed when it returns."""
        began = time.monotonic()
        with signals.interrupting():
            batch = sampler.batch(self._stream, step)
        sampled = time.monotonic()
        rate = learning_rate(self._run.optimizer, step - 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        result = self._learner.step(batch.samples, publisher.version) if batch.samples else None
        learned = time.monotonic()
        return {
            **step_values(batch, result),
            "lr": rate,
            "sampling_s": sampled - began,
            "learning_s": learned - sampled,
            "tokens_per_s": sum(len(s.rollout.token_ids) for s in batch.seen) / (learned - began),
        }

    def _has_pushed_last(self) -> bool:
        """Say whether the newest step that was logged was pushed, too."""
        records = self._metrics.records
        return not records or "version" in records[-1]

    def _push(self, publisher: Publisher) -> dict[str, float]:
        began = time.monotonic()
        version = publisher.publish(self._model.adapter())
        return {"version": version, "push_s": time.monotonic() - began}

    def _rescue(self, step: int, version: int, position: Any) -> str:
        """After an error, save what was done by `step`, if it is whole; returns what to tell."""
        if self._learner.updating:
            return f"failed within the update of step {step + 1}, so the last checkpoint stays"
        try:
            self._save(step, version, position)
        except Exception as error:  # must not hide the one that ended the run
            return f"failed after step {step}, which could not be saved: {error}"
        return f"failed after step {step}: saved; the same command goes on"

    def _save(self, step: int, version: int, position: Any) -> None:
        state = RunState(step=step, version=version, stream=dict(position))
        self._checkpoints.save(state, self._model.adapter(), self._optimizer)


def step_values(batch: StepRollouts, result: StepResult | None) -> dict[str, float]:
    """Return the numbers of one step; `reward` and `length` count dropped groups, too."""
    count = max(len(batch.seen), 1)
    lengths = [len(sample.rollout.completion_ids) for sample in batch.seen]
    values = {
        "reward": math.fsum(sample.reward for sample in batch.seen) / count,
        "length": sum(lengths) / count,
        "length_max": float(max(lengths, default=0)),
        "truncated": sum(s.rollout.finish_reason == "length" for s in batch.seen) / count,
        "preempted": float(sum(s.rollout.num_preempted or 0 for s in batch.seen)),
        "samples": float(len(batch.samples)),
        "dropped_groups": float(batch.dropped_groups),
        "stale_samples": float(batch.stale_samples),
        "sampling_rounds": float(batch.rounds),
        "window_tokens": float(batch.window_tokens),
    }
    if result is not None:
        found = result.to_dict()
        del found["seconds"]
        values |= {**found, "clipped": result.clipped_low + result.clipped_high}
    return values
