"""Tables of options that every training run has: model, adapter, plan, optimizer, output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pte_vllm.adapter.defaults import OPTIONS, NewAdapter
from pte_vllm.method.names import Evict, KeepScore
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.options.parsing import Options

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelOptions(Options):
    base: str
    """Name or directory of the base model; the server must serve the same."""
    adapter: str | None = None
    """Directory of the adapter to start from; without it, one is made by the section adapter."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base; the adapter is fp32. auto: bfloat16 on CUDA, float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    attention: Literal["sdpa", "xformers", "eager"] = "sdpa"
    """Attention kernels; xformers needs CUDA and the extra of that name."""
    gradient_checkpointing: bool = False
    """Recompute a segment's activations in the backward pass: less memory, more time."""

    def resolve(self, *, cuda: bool) -> Self:
        """Return the same options with `auto` replaced, given whether CUDA is there."""
        device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        return self.model_copy(update={"device": device, "dtype": dtype})


class AdapterOptions(Options, NewAdapter):  # type: ignore[misc]  # models are frozen by their config
    """How an adapter is made where `model.adapter` names none; see docs/method.md."""

    plain: bool = False
    """A plain LoRA without thought state: under a window, the paper's baseline LoRA_c; ignores
    global_tokens, rule, read, normalize, keys, features and init."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.check()
        except ValueError as error:
            # It begins with the option's name; where it is the layers, with their flag.
            raise ValueError(f"--adapter.{str(error).removeprefix('--')}") from error
        if not self.plain:
            self.pte()
        return self

    def pte(self) -> PTEConfig:
        """Return the method's options, as the adapter's file stores them.

        Raises:
            ValueError: naming the flags, if they do not go together.
        """
        try:
            return super().pte()
        except ValueError as error:
            raise ValueError(
                f"--adapter.rule, --adapter.read, --adapter.features: {error}"
            ) from error

    def resolve(self) -> Self:
        """Return the same options, with those filled in that follow from others."""
        if self.plain:
            return self
        made = self.pte()
        return self.model_copy(
            update={"global_tokens": made.global_tokens, "features": made.features}
        )


for _name, _option in OPTIONS.items():  # these have no docstrings that pydantic would find
    AdapterOptions.model_fields[_name].description = _option.metadata["about"]


class PlanOptions(Options):
    window_tokens: Literal["prompt"] | CountOrZero = 1024
    """KV room for the thoughts of one sequence, a multiple of block_size; 0 is full attention;
    prompt, for GRPO only: what the longest question of a step takes."""
    evict_ratio: Fraction = 0.25
    """Part of a full window that is folded at once."""
    block_size: Count = 16
    """Tokens in one block of the KV cache; must be the server's."""
    evict: Evict = "oldest"
    """Which blocks of a full window are folded: the oldest, or random ones, as a control."""
    evict_seed: CountOrZero = 0
    """What is drawn by, the same of all sequences. Only with evict random or keep_score random."""
    keep_tokens: CountOrZero = 0
    """Evicted tokens that each KV head keeps, a multiple of block_size; 0 keeps none."""
    keep_score: KeepScore = "expected"
    """How they are chosen: by the attention that probes pay them, or at random, as a control."""
    probes: str | None = None
    """File of the model's probes, for keep_score expected; for GRPO the server's own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.fold_plan(pin_tokens=0)
        except ValueError as error:
            option = {"evict": "evict", "keep": "keep_tokens"}
            name = option.get(str(error).split()[0], "window_tokens")
            raise ValueError(f"--plan.{name}: {error}") from error
        given = {"keep_score random": self.keep_score == "random", "probes": self.probes}
        if not self.keep_tokens:
            for name in (name for name, value in given.items() if value):
                raise ValueError(f"--plan.{name} needs --plan.keep_tokens: nothing is kept")
        elif self.keep_score == "expected" and self.probes is None:
            raise ValueError(
                "--plan.probes is missing: --plan.keep_tokens chooses by the model's probes, "
                "unless --plan.keep_score is random"
            )
        return self

    def window_for(self, longest_prompt: int) -> int:
        """Return the window, in tokens, of a step whose longest question has `longest_prompt`.

        With "prompt" it is that, in whole blocks, of which a window has at least two.
        """
        if self.window_tokens != "prompt":
            return self.window_tokens
        return max(2, -(-longest_prompt // self.block_size)) * self.block_size

    def fold_plan(self, *, pin_tokens: int) -> FoldPlan:
        """Return the plan of a sequence that pins its first `pin_tokens`.

        With "prompt" it has the smallest window.
        """
        return FoldPlan(
            pin_tokens=pin_tokens,
            window_tokens=self.window_for(longest_prompt=0),
            evict_ratio=self.evict_ratio,
            block_size=self.block_size,
            evict=self.evict,
            evict_seed=self.evict_seed,
            keep_tokens=self.keep_tokens,
            keep_score=self.keep_score,
        )


class OptimizerOptions(Options):
    """Options of AdamW and of its learning rate over the run."""

    lr: PositiveOrZero = 1e-5
    """Highest learning rate, reached after warmup_steps."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the two moments; two numbers."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay."""
    warmup_steps: CountOrZero = 0
    """Steps over which the rate rises linearly from 0."""
    max_grad_norm: Positive = 1.0
    """Gradients of a step are scaled down to this L2 norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 at the last step."""
    steps: Count = 100
    """Optimizer steps of the run; for GRPO, batches of rollouts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(
                f"--optimizer.warmup_steps {self.warmup_steps} must be less than "
                f"--optimizer.steps {self.steps}"
            )
        return self


class DistillOptimizerOptions(OptimizerOptions):
    steps: CountOrZero = 100
    """Optimizer steps of the run; 0 trains the probes only, if there are --keep.steps."""
    lr: PositiveOrZero = 1e-3
    """Highest learning rate, reached after warmup_steps."""


class OutputOptions(Options):
    out: str
    """Directory for checkpoints, metrics and the resolved options."""
    seed: CountOrZero = 0
    """Seed of everything but the data's order."""
    save_every_steps: Count = 10
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    log_every_steps: Count = 1
    """Steps between two records of metrics."""
    tensorboard: bool = True
    """Write TensorBoard events below out."""
    resume: bool = True
    """Go on from the newest checkpoint below out, if there is one."""

    @property
    def directory(self) -> Path:
        return Path(self.out)


class GrpoOutputOptions(OutputOptions):
    out: str = "out/grpo"
    """Directory for checkpoints, metrics and the resolved options."""


class DistillOutputOptions(OutputOptions):
    out: str = "out/distill"
    """Directory for checkpoints, metrics and the resolved options."""
