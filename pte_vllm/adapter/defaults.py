"""What a new adapter is like: its options, each defined once, and what they are unless told.

`NewAdapter` is what flags, files of training runs and callers fill in: `adapter.flags` makes
`add_argument` calls of it, `train.options.sections` a table of a TOML file, and `NewAdapter.pte`
what the adapter's own file stores. Where that file does not name an option, it is the paper's
instead (`PTEConfig`).

Standard library only, so that `pte-vllm --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from pte_vllm.method.names import Features, Init, Keys, Normalize, Read, RuleName
from pte_vllm.method.options import PTEConfig

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BStart = Literal["zero", "random"]
B_STARTS: tuple[str, ...] = get_args(BStart)
NEW_RULE: RuleName = "ridge"
"""The rule that learns to remember best (docs/benchmarks/learning.md)."""
_SQUARED_RULES = ("ridge", "delta")
"""The rule `paper` learned nothing with squares (docs/benchmarks/ablations.md)."""
_SQUARED_STARTS = ("aligned", "aligned_mean")
"""In these starts A asks with the mixtures by which keys are stored. From a random start `delta`
learned next to nothing with squares (docs/benchmarks/ablations.md), and the start `aligned_key`
was not tried."""


def _option(default: Any, about: str, **metadata: str) -> Any:
    """Make a field with what its help says; `metavar` is what help shows as its value."""
    return field(default=default, metadata={"about": about, **metadata})


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """Options of an adapter that is made; those that are None follow from others.

    Raises:
        ValueError: from `check` and `pte`, beginning with the option's name, if one does not fit.
    """

    rank: int = _option(PTEConfig.rank, "r: columns of B", metavar="R")
    global_tokens: int | None = _option(
        None,
        "G: rows of A and of the state; without it, the rank, which rules ridge and delta and read "
        "value need",
        metavar="G",
    )
    rule: RuleName = _option(NEW_RULE, "How folds add up")
    read: Read = _option("key", "Side of the state that A x meets")
    normalize: Normalize = _option(
        "matrix", "How the state is normalised; nothing with rules ridge and delta"
    )
    keys: Keys = _option("unrotated", "Whether RoPE is undone before a key is encoded")
    features: Features | None = _option(
        None,
        "Of keys, and of A x; without it, squared with rules ridge and delta, read key and an "
        "aligned or aligned_mean start, else linear",
    )
    init: Init = _option("aligned", "Start of A and of the encoder's projections")
    b: BStart = _option("zero", "Start of B; zero leaves the base model as it is")
    layers: str = _option("all", "Layers that get a state, such as 0-29, or 17,18,20-24, or all")
    target_modules: tuple[str, ...] = _option(
        TARGET_MODULES, "Linears that get A and B", metavar="NAMES"
    )
    alpha: float | None = _option(None, "The adapter is scaled by alpha / rank; without it, by 1")
    text: str | None = _option(
        None,
        "File with sample text for calibration; without it, the package's own",
        metavar="FILE",
    )

    def check(self) -> None:
        """Refuse what fits no model; `pte` refuses what the method has no meaning for."""
        parse_layers(self.layers)
        if not self.target_modules:
            raise ValueError("target_modules needs at least one name")
        if self.rank < 1:
            raise ValueError(f"rank must be positive, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def pte(self) -> PTEConfig:
        """Return the method's options, as the adapter's file stores them."""
        stored = {f.name: getattr(self, f.name) for f in fields(PTEConfig) if f.name in OPTIONS}
        if self.global_tokens is None:
            stored["global_tokens"] = self.rank
        if self.features is None:
            stored["features"] = new_features(self.rule, self.read, self.init)
        return PTEConfig(**stored)


OPTIONS = {option.name: option for option in fields(NewAdapter)}
"""The fields of `NewAdapter` by name, in order; `metadata["about"]` says what each one is."""


def new_features(rule: str, read: str = PTEConfig.read, init: str = PTEConfig.init) -> Features:
    """Return the features of a new adapter unless told: squared where they were seen to help.

    With read `value` A x meets no keys, so that there is nothing to square.
    """
    helped = rule in _SQUARED_RULES and init in _SQUARED_STARTS
    return "squared" if helped and read == "key" else "linear"


def parse_layers(text: str) -> list[int] | None:
    """Turn `0-3,7` into `[0, 1, 2, 3, 7]`, and `all` into None.

    Raises:
        ValueError: naming `--layers`, if the text is neither.
    """
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers must look like 0-29, 17,18 or all, got {text!r}")
        end = int(last) if dash else int(first)
        if end < int(first):
            raise ValueError(f"--layers: {part.strip()} runs backwards")
        layers.update(range(int(first), end + 1))
    return sorted(layers)
