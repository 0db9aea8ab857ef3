"""Follows the requests that are to be recorded, and makes a record of each answer that ends.

A harness of an environment talks to the model as any client does: over chats, with tools, in turns.
Whoever trains on its episodes needs token ids, log-probs, plans and kept tokens, which such clients
do not ask for and drop. The server has them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from pte_vllm.engine.earlier import EARLIER
from pte_vllm.engine.headers import with_headers
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.options import EngineConfig
from pte_vllm.server.adapters.catalog import Catalog, Resolved
from pte_vllm.server.finished import FinishedReader, read_kept, read_rho
from pte_vllm.server.sharing.answer_records import RecordStore
from pte_vllm.wire.rollout import FinishReason, Rollout, WeightSpan

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_REASONS: dict[str | None, FinishReason] = {
    **{"stop": "stop", "length": "length", "abort": "abort"},
    "repetition": "stop",  # the engine's own reason to stop
}


@dataclass
class _Choice:
    """What has come of one answer."""

    index: int
    """Its number among the choices of the request."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, output: CompletionOutput, *, delta: bool) -> None:
        """Take in an output, which continues the last one or repeats it."""
        if not delta:
            self.token_ids, self.logprobs = [], []
        self.token_ids += output.token_ids
        # Each entry has the token that was sampled, and others if the request asked for them.
        pairs = zip(output.token_ids, output.logprobs or (), strict=True)
        self.logprobs += [entry[token].logprob for token, entry in pairs]
        self.finish_reason = output.finish_reason or self.finish_reason


class Recorder:
    """Makes records of what an engine answers.

    Args:
        engine: AsyncLLM. Its `generate` is watched from now on.
        config: the engine's options.
        catalog: the served adapters.
        kept: reads what each fold of a finished request kept.
        rho: reads ρ of its folds.
        store: takes the records.
    """

    def __init__(
        self,
        engine: EngineClient,
        config: EngineConfig,
        catalog: Catalog,
        kept: FinishedReader[KeptRecord],
        rho: FinishedReader[list[float]],
        store: RecordStore,
    ) -> None:
        self._config, self._catalog, self.store = config, catalog, store
        self._kept, self._rho = kept, rho
        self._block_size: int = engine.vllm_config.cache_config.block_size
        generate = cast(Callable[..., AsyncGenerator[RequestOutput, None]], engine.generate)

        @wraps(generate)
        def recorded(
            prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            results = generate(prompt, sampling_params, request_id, **options)
            name = (with_headers(getattr(sampling_params, "extra_args", None)) or {}).get(
                "pte_record"
            )
            if not isinstance(name, str):  # anything else is refused in a moment
                return results
            lora = options.get("lora_request")
            return self._watched(results, name, request_id, sampling_params, lora)

        setattr(engine, "generate", recorded)  # noqa: B010

    async def _watched(
        self,
        results: AsyncGenerator[RequestOutput, None],
        name: str,
        request_id: str,
        params: SamplingParams,
        lora: LoRARequest | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the results; the record is there before the last of them is."""
        adapter = self._resolve(lora)  # now: its version may have left when the answer ends
        delta = params.output_kind == RequestOutputKind.DELTA
        choices = [_Choice(index) for index in range(params.n)]
        is_whole = True
        async with aclosing(results):
            async for result in results:
                try:
                    for output in result.outputs if is_whole else ():
                        choices[output.index].take(output, delta=delta)
                    for choice in choices if is_whole and result.finished else ():
                        await self._record(name, request_id, result, adapter, choice)
                except Exception:  # the answer is worth more than its record
                    logger.exception("%s cannot be recorded as %s", request_id, name)
                    is_whole = False  # what follows would be half of one
                yield result

    def _resolve(self, lora: LoRARequest | None) -> Resolved:
        try:
            return self._catalog.resolve(None if lora is None else lora.lora_name)
        except LookupError:
            return Resolved(version=0, lora=lora)

    async def _record(
        self, name: str, request_id: str, result: RequestOutput, adapter: Resolved, choice: _Choice
    ) -> None:
        """Keep the record of one choice of a request that has finished.

        Raises:
            LookupError, GenerationError: if something of it is not known any more.
        """
        reason = _REASONS.get(choice.finish_reason)
        if reason is None:  # an error of the engine's, which the client is told
            return
        earlier = EARLIER.exactly(request_id)
        if earlier is None:
            raise LookupError("how it folded is not known any more")
        alone = earlier.choices == 1
        own = request_id if alone else f"{choice.index}_{request_id}"
        prompt, answer = tuple(result.prompt_token_ids or ()), tuple(choice.token_ids)
        plan, length = earlier.plan(self._config, self._block_size), len(prompt) + len(answer)
        kept = await read_kept(self._kept, own, plan, length) if answer else None
        rho = None
        if adapter.lora is not None:
            rho = await read_rho(self._rho, own, plan, length)
        spans = (WeightSpan(version=adapter.version, start=0, end=len(answer)),) if answer else ()
        record = Rollout(
            prompt_ids=prompt,
            completion_ids=answer,
            logprobs=tuple(choice.logprobs),
            mask=(1,) * len(answer),
            finish_reason=reason,
            adapter=adapter.engine_name,
            rule=earlier.rule or adapter.rule,
            weight_versions=spans,
            plan=plan,
            rho=rho,
            kept=kept,
            group_id=name,
            index=choice.index,
            num_preempted=_preemptions(result) if alone else None,
        )
        self.store.add(name, record.to_line())


def _preemptions(result: RequestOutput) -> int | None:
    return result.metrics.num_preemptions if result.metrics is not None else None
