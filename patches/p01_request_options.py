"""Refuse a request with impossible PTE options where it enters, so that HTTP answers 400.

vLLM's `validate_params` of logits processors sees no prompt, and `Platform.validate_request` no
engine config; the input processor sees both, before the request reaches the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.engine import EngineCoreRequest

from pte_vllm.adapter.files import read_pte_config
from pte_vllm.engine.chat_pins import with_pins
from pte_vllm.engine.earlier import EARLIER, EarlierRequest
from pte_vllm.engine.headers import with_headers
from pte_vllm.engine.loads import loading
from pte_vllm.method.keep_marks import marks_of
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.options import EngineConfig, check_rule_fits
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.requests import LOGPROBS_MODE, REQUEST_OPTIONS, RequestOptions
from pte_vllm.patches.base import Patch


def check_request(vllm_config: Any, request: EngineCoreRequest, tokenizer: Any) -> None:
    """Check the PTE options of a request, and remember it for those that continue it.

    What a chat pins becomes numbers, by the tokenizer's template.

    Its prefix blocks are kept apart where its options change what they hold. The options of an
    earlier request that it continues take the place of `pte_state_id`.

    Raises:
        VLLMValidationError: If an option does not fit; the server answers HTTP 400 and names it.
    """
    engine = EngineConfig.from_vllm(vllm_config)
    params = request.sampling_params
    if engine is None or params is None:
        return
    try:
        _check(engine, vllm_config, request, params, tokenizer)
    except VLLMValidationError:
        raise
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error


def _check(
    engine: EngineConfig,
    vllm_config: Any,
    request: EngineCoreRequest,
    params: Any,
    tokenizer: Any,
) -> None:
    params.extra_args = with_headers(params.extra_args)  # params are the request's own
    options = RequestOptions.parse(params.extra_args)
    cache, prompt, lora = vllm_config.cache_config, request.prompt_token_ids, request.lora_request
    if prompt is None:
        raise ValueError("prompt embeddings are not supported with PTE")
    num_prompt_tokens = len(prompt)
    _check_allowed(params)
    adapter = (lora.lora_name, lora.lora_path) if lora is not None else None
    says_pins = options.pin is not None or options.pin_tokens is not None
    state_id = options.state_id
    earlier = None if state_id is None else EARLIER.get(state_id)
    given = options
    options = with_pins(options, engine, tokenizer=tokenizer, prompt=prompt, earlier=earlier)
    if earlier is not None:
        rule = _adapter_rule(request) if options.rule is not None else None
        earlier.check(options, adapter=adapter, adapter_rule=rule, prompt=prompt)
        options = earlier.apply(options)
        if request.data_parallel_rank is None:  # to the engine that has its state
            request.data_parallel_rank = EARLIER.engine_of(str(state_id))
    if options.record is not None:
        options = _recorded(options, params, vllm_config)
    if options != given:
        others = {k: v for k, v in (params.extra_args or {}).items() if k not in REQUEST_OPTIONS}
        params.extra_args = {**others, **options.to_args()}
    plan = options.plan(engine, num_prompt_tokens=num_prompt_tokens, block_size=cache.block_size)
    if engine.require_pin_tokens and plan.bounded and not (says_pins or earlier is not None):
        raise ValueError(
            "pte_pin_tokens is missing, and this server runs with --pte-require-pin-tokens: send "
            "the length of the question in tokens, as an option or as the header X-PTE-Pin-Tokens, "
            "or pte_pin prompt or first_and_last_user, or pte_window 0 for full attention"
        )
    if plan.bounded and request.resumable:
        raise ValueError("streaming input sessions need full attention: send pte_window 0")
    longest = min(num_prompt_tokens + params.max_tokens, vllm_config.model_config.max_model_len)
    pool = (cache.num_gpu_blocks or 0) // _num_engines(vllm_config.parallel_config)
    peak, usable = plan.peak_blocks(longest), pool - 1  # block 0 is vLLM's null block
    if usable > 0 and peak > usable:
        raise ValueError(
            f"the request may hold {peak} KV cache blocks, but the pool has {usable}; lower "
            "max_tokens, pte_window or pte_pin_tokens"
        )
    if options.record is not None and plan.pin_tokens > num_prompt_tokens:
        raise ValueError(
            f"pte_record: a record begins with its question, but this server pins "
            f"{plan.pin_tokens} tokens and the prompt has {num_prompt_tokens}: send pte_pin_tokens"
        )
    if options.kept:
        _check_kept(options.kept, plan, vllm_config)
        # What is kept changes later blocks, and their names do not tell it.
        digest = hashlib.sha256(repr(options.kept).encode()).hexdigest()
        request.cache_salt = f"{request.cache_salt or ''}|pte_kept={digest}"
    if options.rule is not None:
        _check_rule(options.rule, request)
        # Before the first fold some rules start from different states; never share their blocks.
        request.cache_salt = f"{request.cache_salt or ''}|pte_update={options.rule}"
    if lora is not None:
        request.cache_salt = f"{request.cache_salt or ''}|loading={loading(lora)}"
    continued = EarlierRequest.of(
        options,
        plan=plan,
        adapter=adapter,
        choices=params.n,
        prompt=prompt,
        is_told=_is_told(params),
    )
    EARLIER.add(request.request_id, continued)


def _recorded(options: RequestOptions, params: Any, vllm_config: Any) -> RequestOptions:
    """Return the options of a request whose answer is recorded, and ask for what a record has.

    Raises:
        ValueError: If this server, or the request, cannot have its answer recorded.
    """
    mode = vllm_config.model_config.logprobs_mode
    if mode != LOGPROBS_MODE:
        raise ValueError(
            f"pte_record needs --logprobs-mode {LOGPROBS_MODE}; this server runs with {mode}"
        )
    if params.logprobs is None:
        params.logprobs = 0  # that of the sampled token alone; the route shows what it was asked
    return replace(options, return_kept=True)


def _is_told(params: Any) -> bool:
    """Return whether the answer tells what was pinned and folded.

    It does for a request that sent PTE options, is a chat with earlier turns, or wants log-probs of
    what may be pinned. Other answers are vLLM's, unchanged.
    """
    given = params.extra_args or {}
    return params.prompt_logprobs is not None or any(name in given for name in REQUEST_OPTIONS)


def _num_engines(parallel: Any) -> int:
    """Return how many engines this process sends requests to; vLLM adds up their blocks."""
    local_only = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    count: int = parallel.data_parallel_size_local if local_only else parallel.data_parallel_size
    return max(1, count)


def _check_kept(record: KeptRecord, plan: FoldPlan, vllm_config: Any) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    sizes = model.get_num_layers(parallel), model.get_total_num_kv_heads()
    try:
        marks_of(record, plan, *sizes)
    except ValueError as error:
        raise ValueError(f"pte_kept: {error}") from error


def _check_allowed(params: Any) -> None:
    """Refuse `allowed_token_ids` of which nothing is left: vLLM would answer with token 0.

    Raises:
        VLLMValidationError: If other options of the request ban all of them.
    """
    if not params.allowed_token_ids:
        return
    bans = {"bad_words": {ids[0] for ids in params.bad_words_token_ids or () if len(ids) == 1}}
    if params.min_tokens:  # until then nothing may end the answer
        bans["min_tokens"] = params.all_stop_token_ids
    allowed = set(params.allowed_token_ids)
    if not allowed.difference(*bans.values()):
        why = " and ".join(name for name, ids in bans.items() if ids & allowed)
        raise VLLMValidationError(
            f"allowed_token_ids: nothing is left of them after {why}, so no token can be sampled",
            parameter="allowed_token_ids",
            value=params.allowed_token_ids,
        )


def _adapter_rule(request: EngineCoreRequest) -> str | None:
    lora = request.lora_request
    pte = read_pte_config(get_adapter_absolute_path(lora.lora_path)) if lora is not None else None
    return pte.rule if pte is not None else None


def _check_rule(rule: str, request: EngineCoreRequest) -> None:
    lora = request.lora_request
    if lora is None:
        raise ValueError("pte_update needs a PTE adapter: name one as the request's model")
    pte = read_pte_config(get_adapter_absolute_path(lora.lora_path))
    if pte is None:
        raise ValueError(f"pte_update needs a PTE adapter; {lora.lora_name} is a plain LoRA")
    check_rule_fits(rule, pte.rank, pte.global_tokens)


def _wrap(original: Callable[..., EngineCoreRequest]) -> Callable[..., EngineCoreRequest]:
    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = original(self, *args, **kwargs)
        check_request(self.vllm_config, request, self.tokenizer)
        return request

    return process_inputs


PATCH = Patch(
    name="p01_request_options",
    target="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    upstream="vllm/v1/engine/input_processor.py at v0.32.0",
    why="no plugin point sees prompt, sampling parameters and engine config of a request together",
    remove_when="vLLM offers request validation to plugins with the engine's config",
    sha256="2086f7c6da70e91d2eec131b67f5734ccb44620f0d654433108a6a13368db61d",
    wrap=_wrap,
)
