"""vLLM's adapter manager, which also loads what an adapter has beside its LoRA: encoder, probes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from pte_vllm.adapter.files import AdapterError
from pte_vllm.adapter.for_engine import load_for_engine
from pte_vllm.adapter.format import Adapter, ModelShape, own_probes
from pte_vllm.adapter.numbers import check_lora
from pte_vllm.engine.ranks import Ranks
from pte_vllm.engine.sequences import LoadedEncoder
from pte_vllm.method.options import EngineConfig

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

_VOCABULARY = ("embed_tokens", "lm_head")


class PTELoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter manager, which also holds encoders and probes of the adapters it loads."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._shape = ModelShape.from_hf(vllm_config.model_config.hf_config.get_text_config())
        self.ranks = Ranks.of(vllm_config)
        """Those that load adapters together with this one."""
        self._encoders: dict[int, LoadedEncoder] = {}
        self._probes: dict[int, Tensor] = {}  # of adapters that bring some, [L, H, n, D]
        engine = EngineConfig.from_vllm(vllm_config)
        self._keeps_by_probes = engine is not None and engine.probes is not None
        self._plain: set[int] = set()
        self._loads: dict[int, int] = {}  # by adapter, the number of its loading
        self._load_numbers = itertools.count()
        self.targeted: set[str] = set()
        """Linears, such as q_proj or lm_head, that any adapter loaded so far has weights for."""
        self._failed: dict[int, str] = {}  # in this step: an adapter's id, and why

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter as vLLM does; where that unloads others, encoders and probes go too.

        A sequence that runs holds its own reference.
        """
        added = super().add_adapter(lora_request)
        keep = self.list_adapters()
        self._encoders = {i: e for i, e in self._encoders.items() if i in keep}
        self._probes = {i: p for i, p in self._probes.items() if i in keep}
        self._plain &= keep
        self._loads = {i: number for i, number in self._loads.items() if i in keep}
        return added

    def loaded_in(self, index: int) -> tuple[int | None, int | None]:
        """Return which adapter vLLM's adapter slot `index` holds, and which loading of it."""
        adapter_id = self._adapter_manager.lora_index_to_id[index]
        return adapter_id, None if adapter_id is None else self._loads.get(adapter_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        """Load an adapter on all ranks, or on none: what one could not read, no rank has.

        Ranks that disagreed about what is loaded would wait for each other forever.
        """
        try:
            model = self._load_here(lora_request)
        except Exception as error:
            self.ranks.gather(str(error))
            raise
        for reason in self.ranks.gather(None):
            if reason is not None:
                raise AdapterError(f"another rank could not load it: {reason}")
        return model

    def _load_here(self, lora_request: LoRARequest) -> LoRAModel:
        adapter_id, path = (
            lora_request.lora_int_id,
            get_adapter_absolute_path(lora_request.lora_path),
        )
        adapter = load_for_engine(
            path,
            model=self._shape,
            max_lora_rank=self.lora_config.max_lora_rank,
            dtype=self.lora_config.lora_dtype,
            load_inplace=lora_request.load_inplace,
        )
        if lora_request.load_inplace and adapter_id in self._encoders:
            raise AdapterError(f"{path}: load_inplace cannot replace a PTE adapter")
        model = super()._load_adapter(lora_request)
        if adapter is None:
            _check_plain(path, model)
        vocabulary = {name for name in model.loras if name.endswith(_VOCABULARY)}
        if vocabulary and self._in_fp32_on_gpu():
            raise AdapterError(
                f"{path}: a LoRA of {', '.join(sorted(vocabulary))} needs --dtype bfloat16 or "
                "float16 on a GPU"
            )
        self._loads[adapter_id] = next(self._load_numbers)
        self._load_probes(adapter_id, path, adapter)
        self.targeted |= {name.rpartition(".")[2] for name in model.loras}
        if adapter is None or adapter.pte is None:
            self._plain.add(adapter_id)
        else:
            encoder = adapter.stacked_encoder().map(lambda t: t.to(self.device))
            self._encoders[adapter_id] = LoadedEncoder(
                config=adapter.pte,
                layers=adapter.layers,
                encoder=encoder,
                narrowed=self.ranks.narrow(encoder),
            )
        return model

    def _load_probes(self, adapter_id: int, path: str, adapter: Adapter | None) -> None:
        """Put the adapter's own probes on the device, in place of those it had before.

        Args:
            adapter_id: vLLM's number of it.
            path: Its directory.
            adapter: What was read there; None of a plain LoRA.
        """
        self._probes.pop(adapter_id, None)  # of a load in place
        if not self._keeps_by_probes:  # then no request may ask for them
            return
        probes = adapter.probes if adapter is not None else own_probes(path, self._shape)
        if probes is not None:
            here = probes.queries[:, self.ranks.heads].contiguous()
            self._probes[adapter_id] = here.to(self.device)

    def _in_fp32_on_gpu(self) -> bool:
        fp32 = self.lora_config.lora_dtype == torch.float32
        return fp32 and torch.device(self.device).type != "cpu"

    def encoder_of(self, lora_request: LoRARequest) -> LoadedEncoder | None:
        """Return the adapter's encoder, loading the adapter if need be; None for a plain LoRA."""
        self._load_unless_known(lora_request)
        return self._encoders.get(lora_request.lora_int_id)

    def probes_of(self, lora_request: LoRARequest) -> Tensor | None:
        """Return the probes that the adapter brings, `[L, H, n, D]` float32, loading it if need be.

        None: it brings none, or the engine has none of its own and keeps nothing by probes.
        """
        self._load_unless_known(lora_request)
        return self._probes.get(lora_request.lora_int_id)

    def _load_unless_known(self, lora_request: LoRARequest) -> None:
        adapter_id = lora_request.lora_int_id
        if adapter_id not in self._encoders and adapter_id not in self._plain:
            self._load_in_step(lora_request)

    # -- in a step, where an error would end the engine -------------------------------------------

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Prepare a step; where an adapter cannot be loaded, its tokens get the base model.

        Their requests then end with an error: see `take_failed`.
        """
        self._apply_adapters(requests)
        if mapping is not None:
            if self._failed:
                mapping = replace(
                    mapping,
                    index_mapping=self._without_failed(mapping.index_mapping),
                    prompt_mapping=self._without_failed(mapping.prompt_mapping),
                )
            self._adapter_manager.set_adapter_mapping(mapping)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        # First those that are there, so that loading the others drops none that the step needs. In
        # an order that is the same on all ranks, which load, and drop, together.
        there, requests = self.list_adapters(), sorted(lora_requests, key=lambda r: r.lora_int_id)
        for request in requests:
            if request.lora_int_id in there:
                self.add_adapter(request)
        for request in requests:
            self._load_in_step(request)

    def _without_failed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(0 if i in self._failed else i for i in ids)

    def _load_in_step(self, lora_request: LoRARequest) -> None:
        """Load an adapter that is not there any more, as its files may not be either."""
        adapter_id = lora_request.lora_int_id
        if adapter_id in self._failed or adapter_id in self.list_adapters():
            return
        try:
            self.add_adapter(lora_request)
        except Exception as error:
            logger.exception("adapter %s cannot be loaded again", lora_request.lora_name)
            self._failed[adapter_id] = str(error)

    def take_failed(self) -> dict[int, str]:
        """Return adapters that could not be loaded since the last call, by id, and why.

        The next step tries again, if a request names one.
        """
        failed, self._failed = self._failed, {}
        return failed


def _check_plain(path: str, model: LoRAModel) -> None:
    """Raise AdapterError unless what a plain LoRA adds stays finite, whatever file it came from."""
    for module, lora in model.loras.items():
        # Linears that vLLM packs into one have lists of matrices, with None where there is none.
        sides = (
            side if isinstance(side, list) else [side]
            for side in (lora.lora_a, lora.lora_b, lora.scaling)
        )
        for a, b, scale in zip(*sides, strict=True):
            if a is not None and b is not None:
                check_lora(f"{path}: {module}", a, b, scale=scale, dtype=a.dtype)
