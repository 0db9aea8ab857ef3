"""Values of a record, with what pydantic checks of each and how it writes it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WrapSerializer,
)

from pte_vllm.method.kept_record import KeptRecord, record_from_json, record_to_json
from pte_vllm.method.plan import FoldPlan

_ROUNDING = 1e-4  # a log-softmax in fp32 may end this far above zero

Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]
LogProb = Annotated[float, Field(le=_ROUNDING)]
Bit = Annotated[int, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


def _without_defaults(plan: FoldPlan, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """Leave out what says that nothing is drawn and nothing kept: earlier readers know no more."""
    values: dict[str, Any] = write(plan)
    if plan.evict == "oldest":
        del values["evict"]
        if plan.keep_score != "random":
            del values["evict_seed"]
    if not plan.pin_spans:
        del values["pin_spans"]
    if not plan.keep_tokens:
        del values["keep_tokens"], values["keep_score"]
    return values


Plan = Annotated[FoldPlan, WrapSerializer(_without_defaults)]


def _to_text(record: KeptRecord) -> list[str | None] | None:
    return record_to_json(record)


Kept = Annotated[KeptRecord, BeforeValidator(record_from_json), PlainSerializer(_to_text)]
