"""Tables of options of a distillation: what is compared with what, and the training of probes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pte_vllm.train.options.parsing import Options
from pte_vllm.train.options.sections import Count, CountOrZero, Positive


class DistillOptions(Options):
    """Options of distillation.

    The loss is the forward KL from the base model under full attention to the same model under the
    window.
    """

    data: Literal["text", "samples", "rollouts"] = "text"
    """text: running text; samples: answers that the base model, with full attention, gives to the
    questions of data; rollouts: records that a server wrote before."""
    text: str | None = None
    """A .txt or .jsonl file, a directory of text files, or the name or path of a data set; without
    it, the package's sample text."""
    text_field: str = "text"
    """Field with the text in a data set or .jsonl file."""
    text_split: str = "train"
    """Split of a data set."""
    rollouts: str | None = None
    """File of rollout records, one JSON object a line, for data rollouts."""
    max_sequences: Count = 4096
    """Most sequences that are read or sampled."""
    eval_sequences: CountOrZero = 8
    """Sequences held out to measure perplexity beyond the first fold; 0: none."""
    eval_every_steps: CountOrZero = 0
    """Steps between two measurements; 0: only before the first step and after the last."""
    teacher_top_k: CountOrZero = 0
    """Classes of the teacher's distribution: its k best tokens, and all others as one; 0: exact."""
    temperature: Positive = 1.0
    """Temperature of both distributions."""
    sequence_tokens: Annotated[int, Field(ge=2)] = 2048
    """Length of one sequence, pinned tokens included."""
    pin_tokens: CountOrZero = 32
    """Pinned tokens at the start of a sequence of text; answers pin their prompt."""
    batch_sequences: Count = 8
    """Sequences in one step."""
    micro_batch_sequences: Count = 4
    """Sequences replayed at once; bounds memory, not the result."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pin_tokens >= self.sequence_tokens:
            raise ValueError(
                f"--distill.pin_tokens {self.pin_tokens} must be less than "
                f"--distill.sequence_tokens {self.sequence_tokens}"
            )
        if self.data == "rollouts" and self.rollouts is None:
            raise ValueError("--distill.rollouts is missing: --distill.data rollouts reads a file")
        return self


class KeepStageOptions(Options):
    """Options of training the probes, by which tokens are kept, before the first step."""

    steps: CountOrZero = 0
    """Steps of it; 0: the adapter brings no probes, and the model's are used."""
    lr: Positive = 0.05
    """Highest learning rate, as a share of the root mean square of the probes."""
    batch_folds: Count = 4
    """Folds in one step."""
    max_sequences: Count = 128
    """Most sequences that are read for it."""
    probes: CountOrZero = 0
    """Probes for each KV head, the first of the model's; 0: all of them."""
