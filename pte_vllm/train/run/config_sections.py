"""Options that every training run has: model, adapter, plan, optimizer, output; see `config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pte_vllm.adapter.defaults import NEW_RULE, TARGET_MODULES, new_config, parse_layers
from pte_vllm.method.names import Features, Init, Keys, Normalize, Read, RuleName
from pte_vllm.method.options import PTEConfig
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.run.config_io import Section

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class ModelOptions(Section):
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
        """The same options with `auto` replaced, given whether CUDA is there."""
        device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        return self.model_copy(update={"device": device, "dtype": dtype})


class AdapterOptions(Section):
    """How an adapter is made where `model.adapter` names none; see docs/method.md."""

    plain: bool = False
    """A plain LoRA without thought state: under a window, the paper's baseline LoRA_c; ignores
    global_tokens, rule, read, normalize, keys, features and init."""
    rank: Count = PTEConfig.rank
    """r: columns of B."""
    global_tokens: Count | None = None
    """G: rows of A and of the state; without it, the rank, which rules ridge and delta and read
    value need."""
    rule: RuleName = NEW_RULE
    """How folds add up."""
    read: Read = "key"
    """Side of the state that A x meets."""
    normalize: Normalize = "matrix"
    """How the state is normalised; nothing with rules ridge and delta."""
    keys: Keys = "unrotated"
    """Whether RoPE is undone before a key is encoded."""
    features: Features | None = None
    """Of keys, and of A x; without it, squared with rules ridge and delta, read key and an aligned
    or aligned_mean start, else linear."""
    init: Init = "aligned"
    """Start of A and of the encoder's projections."""
    b: Literal["zero", "random"] = "zero"
    """Start of B; zero leaves the base model as it is."""
    layers: str = "all"
    """Layers that get a state, such as 0-29, or 17,18,20-24, or all."""
    target_modules: tuple[str, ...] = TARGET_MODULES
    """Linears that get A and B."""
    alpha: Positive | None = None
    """The adapter is scaled by alpha / rank; without it, by 1."""
    text: str | None = None
    """File with sample text for calibration; without it, the package's own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            parse_layers(self.layers)
        except ValueError as error:
            raise ValueError(str(error).replace("--layers", "--adapter.layers", 1)) from error
        if not self.target_modules:
            raise ValueError("--adapter.target_modules needs at least one name")
        if not self.plain:
            self.pte()
        return self

    def resolve(self) -> Self:
        """The same options, those filled in that follow from others."""
        if self.plain:
            return self
        made = self.pte()
        return self.model_copy(
            update={"global_tokens": made.global_tokens, "features": made.features}
        )

    def pte(self) -> PTEConfig:
        """The method's options as an adapter stores them."""
        try:
            return new_config(
                rank=self.rank,
                global_tokens=self.global_tokens,
                rule=self.rule,
                read=self.read,
                normalize=self.normalize,
                keys=self.keys,
                features=self.features,
                init=self.init,
            )
        except ValueError as error:
            raise ValueError(
                f"--adapter.rule, --adapter.read, --adapter.features: {error}"
            ) from error


class PlanOptions(Section):
    window_tokens: CountOrZero = 1024
    """KV room for the thoughts of one sequence, a multiple of block_size; 0 is full attention."""
    evict_ratio: Fraction = 0.25
    """Part of a full window that is folded at once."""
    block_size: Count = 16
    """Tokens in one block of the KV cache; must be the server's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.fold_plan(pin_tokens=0)
        except ValueError as error:
            raise ValueError(f"--plan.window_tokens: {error}") from error
        return self

    def fold_plan(self, *, pin_tokens: int) -> FoldPlan:
        """The plan of a sequence that pins its first `pin_tokens`."""
        return FoldPlan(
            pin_tokens=pin_tokens,
            window_tokens=self.window_tokens,
            evict_ratio=self.evict_ratio,
            block_size=self.block_size,
        )


class OptimizerOptions(Section):
    """AdamW."""

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
    lr: PositiveOrZero = 1e-3
    """Highest learning rate, reached after warmup_steps."""


class OutputOptions(Section):
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
