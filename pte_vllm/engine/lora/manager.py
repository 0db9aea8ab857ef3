"""State-modulated LoRA: y = W x + (alpha/r) B (Sᵀ φ(A x)) inside vLLM's multi-LoRA.

vLLM loads, packs, shards and swaps adapters as always; two things are ours. A manager that reads
the encoder beside the LoRA, and a view of vLLM's punica wrapper per layer that multiplies by the
tokens' states between shrink and expand (upstream: `PunicaWrapperCPU.add_lora_linear` in
vllm/lora/punica_wrapper/punica_cpu.py and its CUDA sibling).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import async_tensor_h2d

from pte_vllm.adapter.files import AdapterError, layer_of
from pte_vllm.adapter.format import ModelShape, load_for_engine
from pte_vllm.engine.huge_pages import Arena
from pte_vllm.engine.lora.cpu import CPULayerPunica, load_native
from pte_vllm.engine.lora.cuda import CUDALayerPunica
from pte_vllm.engine.lora.operators import LayerOperators
from pte_vllm.engine.lora.view import PunicaView
from pte_vllm.engine.state import LoadedEncoder, StatePool
from pte_vllm.kernels.modulate import Segment

_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass
class TokenSlots:
    """Which state modulates which token of the step; written by the runner before the forward."""

    slots: Tensor  # [max_num_batched_tokens] int64, persistent: graphs replay over it
    segments: list[Segment] = field(default_factory=list)
    any: bool = False
    """Whether any token has a thought state."""
    groups: list[tuple[int, Tensor | None]] | None = None
    """Per adapter of the step its index and its tokens (None: all); found by the first layer."""

    @classmethod
    def allocate(cls, max_num_batched_tokens: int, device: torch.device) -> TokenSlots:
        return cls(slots=torch.zeros(max_num_batched_tokens, dtype=torch.int64, device=device))

    def publish(self, segments: list[Segment]) -> None:
        """Set the step's tokens, in batch order; tokens past them use the identity."""
        self.segments, self.groups = segments, None
        self.any = any(slot for _, _, slot in segments)
        self.slots.zero_()
        if self.any:
            # numpy, as torch's would share these few numbers out among threads.
            lengths = [end - start for start, end, _ in segments]
            per_token = np.repeat([slot for _, _, slot in segments], lengths)
            async_tensor_h2d(torch.from_numpy(per_token), out=self.slots[: len(per_token)])


class VocabularyPunica(PunicaView):
    """vLLM's punica wrapper as the embedding and the output layer see it on CPU, and in fp32.

    vLLM multiplies the vectors and the logits of every token by an all-zero LoRA where no adapter
    targets these layers; with a large vocabulary that is a good part of a step. Skip it then. On a
    GPU vLLM's kernels refuse fp32, and `PTELoRAManager` the adapters that would need them.
    """

    def __init__(
        self, module: torch.nn.Module, manager: PTELoRAManager, operators: LayerOperators | None
    ) -> None:
        super().__init__(module.punica_wrapper)
        self._manager = manager
        self._weights = module.lora_b_stacked
        self._operators = operators  # which live as long as one of their layers
        self._apply = self._add_embedding
        if operators is not None and isinstance(module, VocabParallelEmbeddingWithLoRA):
            self._apply = operators.wrap(self._add_embedding)

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        if "lm_head" in self._manager.targeted:
            self._wrapper.add_lora_logits(*args, **kwargs)

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        self._apply(y, x)

    def _add_embedding(self, y: Tensor, x: Tensor) -> None:
        if "embed_tokens" in self._manager.targeted:
            self._wrapper.add_lora_embedding(y, x, self._weights, add_input=True)


def install_views(
    model: torch.nn.Module,
    manager: PTELoRAManager,
    pool: StatePool,
    tokens: TokenSlots,
    *,
    compiled: bool,
) -> None:
    """Give LoRA layers of the decoder, and on CPU or in fp32 embedding and output, their view.

    Args:
        compiled: torch.compile will trace the model.
    """
    on_cpu = tokens.slots.device.type == "cpu"
    skips_unused = on_cpu or manager.lora_config.lora_dtype == torch.float32
    library = load_native(manager.lora_config.lora_dtype) if on_cpu else None
    operators = LayerOperators() if on_cpu and compiled else None
    arena = Arena()
    for name, module in model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            continue
        layer, wrapper = layer_of(name), module.punica_wrapper
        if layer is not None and on_cpu:
            # vLLM looks it up eight times a call, through a `__getattr__` in Python.
            module.__dict__["base_layer"] = module.base_layer
            module.punica_wrapper = CPULayerPunica(
                *(module, pool.states[layer], pool.squared, tokens),
                *(manager.loaded_in, library, arena, operators),
            )
        elif layer is not None:
            states = pool.states[layer]
            module.punica_wrapper = CUDALayerPunica(wrapper, states, pool.squared, tokens)
        elif skips_unused and isinstance(
            module, LogitsProcessorWithLoRA | VocabParallelEmbeddingWithLoRA
        ):
            # On CUDA a captured graph must not depend on which adapters are loaded; in fp32 there
            # it never does, as none may target these.
            module.punica_wrapper = VocabularyPunica(module, manager, operators)


class PTELoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter manager, which also holds the encoders of the adapters it loads."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._shape = ModelShape.from_hf(vllm_config.model_config.hf_config.get_text_config())
        self._encoders: dict[int, LoadedEncoder] = {}
        self._plain: set[int] = set()
        self._loads: dict[int, int] = {}  # by adapter, the number of its loading
        self._load_numbers = itertools.count()
        self.targeted: set[str] = set()
        """Linears, such as q_proj or lm_head, that any adapter loaded so far has weights for."""

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """vLLM's, which may unload others to make room; their encoders go with them.

        A sequence that runs holds its own reference.
        """
        added = super().add_adapter(lora_request)
        keep = self.list_adapters()
        self._encoders = {i: e for i, e in self._encoders.items() if i in keep}
        self._plain &= keep
        self._loads = {i: number for i, number in self._loads.items() if i in keep}
        return added

    def loaded_in(self, index: int) -> tuple[int | None, int | None]:
        """What vLLM's adapter slot `index` holds: the adapter, and which loading of it."""
        adapter_id = self._adapter_manager.lora_index_to_id[index]
        return adapter_id, None if adapter_id is None else self._loads.get(adapter_id)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        adapter_id, path = (
            lora_request.lora_int_id,
            get_adapter_absolute_path(lora_request.lora_path),
        )
        adapter = load_for_engine(
            path,
            model=self._shape,
            max_lora_rank=self.lora_config.max_lora_rank,
            load_inplace=lora_request.load_inplace,
        )
        if lora_request.load_inplace and adapter_id in self._encoders:
            raise AdapterError(f"{path}: load_inplace cannot replace a PTE adapter")
        model = super()._load_adapter(lora_request)
        vocabulary = {name for name in model.loras if name.endswith(_VOCABULARY)}
        if vocabulary and self._in_fp32_on_gpu():
            raise AdapterError(
                f"{path}: a LoRA of {', '.join(sorted(vocabulary))} needs --dtype bfloat16 or "
                "float16 on a GPU"
            )
        self._loads[adapter_id] = next(self._load_numbers)
        self.targeted |= {name.rpartition(".")[2] for name in model.loras}
        if adapter is None or adapter.pte is None:
            self._plain.add(adapter_id)
        else:
            self._encoders[adapter_id] = LoadedEncoder(
                config=adapter.pte,
                layers=adapter.layers,
                encoder=adapter.stacked_encoder().map(lambda t: t.to(self.device)),
            )
        return model

    def _in_fp32_on_gpu(self) -> bool:
        fp32 = self.lora_config.lora_dtype == torch.float32
        return fp32 and torch.device(self.device).type != "cpu"

    def encoder_of(self, lora_request: LoRARequest) -> LoadedEncoder | None:
        """The adapter's encoder, loading the adapter if need be; None for a plain LoRA."""
        adapter_id = lora_request.lora_int_id
        if adapter_id not in self._encoders and adapter_id not in self._plain:
            self.add_adapter(lora_request)
        return self._encoders.get(adapter_id)
