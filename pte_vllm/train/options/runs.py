"""Options of one training run: a TOML file, with dotted overrides on the command line.

`GrpoRun` and `DistillRun` are what a run is given; each section is a table of the file and a prefix
of flags (`[optimizer] lr = 1e-5` is `--optimizer.lr 1e-5`). `options.parsing` reads and writes them
and words the errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pte_vllm.train.options.distilling import DistillOptions, KeepStageOptions
from pte_vllm.train.options.environments import EnvironmentOptions
from pte_vllm.train.options.parsing import Options, RunOptions
from pte_vllm.train.options.sections import (
    AdapterOptions,
    Count,
    CountOrZero,
    DistillOptimizerOptions,
    DistillOutputOptions,
    Fraction,
    GrpoOutputOptions,
    ModelOptions,
    OptimizerOptions,
    PlanOptions,
    Positive,
    PositiveOrZero,
)

DATA_SOURCES = Literal[
    "dapo-math-17k",
    "math",
    "gsm8k",
    "math-500",
    "aime-2024",
    "aime-2025",
    "amc-2023",
    "minerva",
    "olympiadbench",
    "jsonl",
    "reasoning-gym",
    "memory",
    "ledger",
    "verifiers",
]
REWARD_NAMES = Literal["auto", "math", "reasoning-gym", "exact", "memory", "ledger"]

# In half precision engine and replay round at different places: in bfloat16, log-probs of SmolLM2
# differ by 2e-2 to 7.3e-2 in the mean, most with squared features under rules paper and sum
# (tests/parity/test_rules.py). An error that moves them by less shows in float32 only.
DRIFT_LIMITS: dict[str, float] = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1.5e-1}
"""What `grpo.max_logprob_drift = "auto"` stands for, by dtype of the base model."""


class SamplingOptions(Options):
    temperature: Positive = 1.0
    """Of sampling and, equally, of the log-probs that are trained."""
    max_tokens: Count = 2048
    """Most tokens of one answer."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for one question: GRPO's group."""
    groups_per_step: Count = 8
    """Questions in one step."""


class DistillSamplingOptions(SamplingOptions):
    group_size: Count = 1
    """Answers sampled for one question."""


class ServerOptions(Options):
    url: str = "http://127.0.0.1:8000"
    """Base URL of `pte-vllm serve`."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's API key."""
    admin_key_env: str | None = None
    """Name of the environment variable that holds the key for pushing adapters."""
    adapter_name: str = "policy"
    """Name under which the server holds the adapter in training."""
    timeout_s: Positive = 600.0
    """Longest wait for the next bytes of one request."""
    retry_s: PositiveOrZero = 300.0
    """How long to try again while the server is away or restarting."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--server.url must start with http:// or https://, got {self.url!r}")
        return self


class GrpoOptions(Options):
    """Options of cache-aware GRPO, with those that DAPO added (arXiv 2503.14476)."""

    clip_low: Fraction = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high; DAPO's clip-higher is 0.28."""
    kl_coef: PositiveOrZero = 0.0
    """Weight of the KL to the reference policy; 0 computes none."""
    reference: Literal["base", "initial"] = "base"
    """Reference policy, under the same plan: the base model, or the adapter at the start."""
    loss_level: Literal["token", "sequence"] = "token"
    """token: mean over all tokens of the step (DAPO); sequence: mean of sequences' means (GRPO)."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, or not."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal, which teach nothing (DAPO)."""
    dynamic_sampling_max_tries: Count = 4
    """Most rounds of sampling in one step; the step then goes on with what it has."""
    overlong_tokens: CountOrZero = 0
    """Soft length penalty over the last so many tokens before sampling.max_tokens; 0: none."""
    overlong_penalty: PositiveOrZero = 1.0
    """What the reward of an answer of full length loses; less within overlong_tokens."""
    mask_truncated: bool = False
    """Leave answers cut at sampling.max_tokens out of the loss."""
    is_mode: Literal["token_truncate", "token_mask", "none"] = "token_truncate"
    """Importance weight between sampler and learner: truncate at is_cap, drop above it, or none."""
    is_cap: Positive = 3.0
    """Bound of the importance weight."""
    inner_steps: Count = 1
    """Optimizer steps on one batch of rollouts."""
    max_staleness: CountOrZero = 1
    """Most adapter versions that a token may be behind; older rollouts are dropped."""
    max_logprob_drift: Literal["auto"] | Positive = "auto"
    """Most mean |Δ log p| between server and replay before the run stops; auto: 1e-4 in float32,
    0.15 in bfloat16."""
    micro_batch_sequences: Count = 4
    """Sequences replayed at once; bounds memory, not the result."""

    def drift_limit(self, dtype: str) -> float:
        """Return `max_logprob_drift` as a number, for a base model of `dtype`."""
        if self.max_logprob_drift == "auto":
            return DRIFT_LIMITS[dtype]
        return self.max_logprob_drift


class DataOptions(Options):
    """Where questions come from; see docs/training.md."""

    source: DATA_SOURCES
    """Data set, file or generator."""
    path: str | None = None
    """Local copy of the data set (file or directory) instead of the hub; the file of jsonl."""
    split: str = "train"
    """Split of the data set; generators draw other problems for every name."""
    task: str | None = None
    """Task of reasoning-gym or memory; subject of math (all of them without it)."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task, such as max_terms=4; of ledger: people and events."""
    reward: REWARD_NAMES = "auto"
    """Reward function; auto: what fits the source."""
    seed: CountOrZero = 0
    """Seed of the order, and of generated problems."""
    prompt_template: str | None = None
    """Text around the question, which stands for {prompt}; without it, what fits the source."""
    system: str | None = None
    """System message."""
    chat: bool = True
    """Ask through the model's chat template; else the prompt is plain text."""
    max_prompt_tokens: Count = 1024
    """Longer questions are left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"--data.prompt_template must contain {{prompt}}, got {self.prompt_template!r}"
            )
        if self.source == "jsonl" and self.path is None:
            raise ValueError("--data.path is missing: the source jsonl reads a file")
        if self.source in ("reasoning-gym", "memory") and self.task is None:
            raise ValueError(f"--data.task is missing: which task of {self.source}?")
        if self.system is not None and not self.chat:
            raise ValueError("--data.system needs --data.chat true")
        return self


class GrpoRun(RunOptions):
    """Everything that `pte-vllm train grpo` is told."""

    model: ModelOptions
    """Base model."""
    adapter: AdapterOptions = AdapterOptions()
    """How an adapter is made, where model.adapter names none."""
    plan: PlanOptions = PlanOptions()
    """What is evicted when."""
    optimizer: OptimizerOptions = OptimizerOptions()
    """AdamW."""
    sampling: SamplingOptions = SamplingOptions()
    """What the server is asked for."""
    server: ServerOptions = ServerOptions()
    """The server that samples."""
    grpo: GrpoOptions = GrpoOptions()
    """The algorithm."""
    data: DataOptions
    """Questions and their reward."""
    environment: EnvironmentOptions = EnvironmentOptions()
    """An environment of the verifiers library, for data.source verifiers."""
    run: GrpoOutputOptions = GrpoOutputOptions()
    """Output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.grpo.overlong_tokens > self.sampling.max_tokens:
            raise ValueError(
                f"--grpo.overlong_tokens {self.grpo.overlong_tokens} must not exceed "
                f"--sampling.max_tokens {self.sampling.max_tokens}"
            )
        if self.data.source == "verifiers":
            self._check_environment()
        elif self.environment.taskset is not None:
            raise ValueError("--environment.taskset needs --data.source verifiers")
        return self

    def _check_environment(self) -> None:
        if self.environment.taskset is None:
            raise ValueError("--environment.taskset is missing: which taskset of verifiers?")
        if self.plan.window_tokens == "prompt":
            raise ValueError(
                "--plan.window_tokens prompt follows the questions of a step, and an environment "
                "asks its own: give a number, such as --plan.window_tokens 1024"
            )
        defaults = DataOptions(source="verifiers")
        for name in ("path", "task", "task_options", "reward", "prompt_template", "system"):
            if getattr(self.data, name) != getattr(defaults, name):
                raise ValueError(
                    f"--data.{name} has no meaning for --data.source verifiers, whose environment "
                    "asks and rewards itself: leave it out, or see --environment.taskset_options"
                )
        if self.grpo.overlong_tokens:
            raise ValueError(
                "--grpo.overlong_tokens is a penalty of single answers: leave it out with "
                "--data.source verifiers, or have the environment's reward do it"
            )


class DistillRun(RunOptions):
    """Everything that `pte-vllm train distill` is told."""

    model: ModelOptions
    """Base model: teacher under full attention, student under the window."""
    adapter: AdapterOptions = AdapterOptions()
    """How an adapter is made, where model.adapter names none."""
    plan: PlanOptions = PlanOptions()
    """What is evicted when."""
    optimizer: DistillOptimizerOptions = DistillOptimizerOptions()
    """AdamW."""
    keep: KeepStageOptions = KeepStageOptions()
    """Training of what is kept, before the first step."""
    distill: DistillOptions = DistillOptions()
    """The algorithm."""
    data: DataOptions | None = None
    """Questions, for distill.data samples."""
    sampling: DistillSamplingOptions = DistillSamplingOptions()
    """What the server is asked for, for distill.data samples."""
    server: ServerOptions = ServerOptions()
    """The server that samples, for distill.data samples."""
    run: DistillOutputOptions = DistillOutputOptions()
    """Output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.distill.data == "samples" and self.data is None:
            raise ValueError("--data.source is missing: --distill.data samples asks its questions")
        if self.data is not None and self.data.source == "verifiers":
            raise ValueError("--data.source verifiers is for train grpo: it has no questions alone")
        if self.keep.steps and not (self.plan.keep_tokens and self.plan.probes):
            raise ValueError(
                "--keep.steps trains the probes of --plan.probes, by which --plan.keep_tokens "
                "chooses: give both"
            )
        if self.plan.window_tokens == "prompt":
            raise ValueError(
                "--plan.window_tokens prompt follows the questions of each step of train grpo; "
                "here it must be a number, such as --plan.window_tokens 512"
            )
        return self
