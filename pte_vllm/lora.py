"""State-modulated LoRA: y = W x + (alpha/r) B (Sᵀ (A x)) inside vLLM's multi-LoRA.

vLLM loads, packs, shards and swaps adapters as always; two things are ours. A manager that reads
the encoder beside the LoRA, and a view of vLLM's punica wrapper per layer that multiplies by the
tokens' states between shrink and expand (upstream: `PunicaWrapperCPU.add_lora_linear` in
vllm/lora/punica_wrapper/punica_cpu.py and its CUDA sibling).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from pte_vllm.adapter import AdapterError, ModelShape, layer_of, load_for_engine
from pte_vllm.lora_cpu import CPULayerPunica
from pte_vllm.ops.modulate import Segment, modulate_tokens
from pte_vllm.state import LoadedEncoder, StatePool


@dataclass
class TokenSlots:
    """Which state modulates which token of the step; written by the runner before the forward."""

    slots: Tensor  # [max_num_batched_tokens] int64, persistent: graphs replay over it
    segments: list[Segment] = field(default_factory=list)
    any: bool = False
    """Whether any token has a thought state."""
    groups: list[tuple[int, Tensor | None]] | None = None
    """Per adapter of the step its index and its tokens (None: all); found by the first layer."""
    states: Tensor | None = None
    """`[L, T, R, R]`, of each token: gathered once a step on CPU, where every sequence has one."""

    @classmethod
    def allocate(cls, max_num_batched_tokens: int, device: torch.device) -> TokenSlots:
        return cls(slots=torch.zeros(max_num_batched_tokens, dtype=torch.int64, device=device))

    def publish(self, segments: list[Segment], states: Tensor) -> None:
        """Set the step's tokens, in batch order; tokens past them use the identity.

        `states: [L, slots, R, R]` of all layers, folded as far as the step needs them.
        """
        self.segments, self.groups, self.states = segments, None, None
        self.any = any(slot for _, _, slot in segments)
        self.slots.zero_()
        if self.any:
            lengths = torch.tensor([end - start for start, end, _ in segments])
            slots = torch.tensor([slot for _, _, slot in segments])
            per_token = torch.repeat_interleave(slots, lengths)
            self.slots[: len(per_token)] = per_token.to(self.slots.device)
            if states.device.type == "cpu" and len(per_token) == len(segments):
                self.states = states.index_select(1, per_token)


class LayerPunica:
    """vLLM's punica wrapper as one linear of the decoder sees it, on a GPU."""

    def __init__(self, wrapper: Any, states: Tensor, tokens: TokenSlots) -> None:
        self._wrapper = wrapper
        self._states = states  # [slots, R, R] of this layer
        self._tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice] += B_slice (Sᵀ (A_slice x)); alpha/r is already merged into B.

        `y: [T, d_out]`, `x: [T, d_in]`, each A `[adapters, 1, R, d_in]`, B `[adapters, 1, d, R]`.
        """
        rank = lora_b_stacked[0].size(-1)
        # The shrink kernel zeroes the buffer itself.
        buffer = torch.empty(
            (len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device
        )
        self._wrapper.add_shrink(buffer, x, lora_a_stacked, scale)
        slots = self._tokens.slots[: x.size(0)]
        for a in buffer:
            a.copy_(modulate_tokens(a[:, None], self._states, slots)[:, 0])
        self._wrapper.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs)


class LogitsPunica:
    """vLLM's punica wrapper as the output layer sees it.

    vLLM multiplies the logits of every token by an all-zero LoRA when no adapter targets the output
    layer; with a large vocabulary that is a good part of a step on CPU. Skip it then.
    """

    def __init__(self, wrapper: Any, manager: PTELoRAManager) -> None:
        self._wrapper = wrapper
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        if self._manager.targets_output_layer:
            self._wrapper.add_lora_logits(*args, **kwargs)


def install_views(
    model: torch.nn.Module, manager: PTELoRAManager, pool: StatePool, tokens: TokenSlots
) -> None:
    """Give every LoRA layer of the decoder, and the output layer on CPU, its view."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            continue
        layer, wrapper = layer_of(name), module.punica_wrapper
        on_cpu = wrapper.device.type == "cpu"
        if layer is not None and on_cpu:
            module.punica_wrapper = CPULayerPunica(
                wrapper, pool.states[layer], layer, tokens, manager.loaded_in
            )
        elif layer is not None:
            module.punica_wrapper = LayerPunica(wrapper, pool.states[layer], tokens)
        elif isinstance(module, LogitsProcessorWithLoRA) and on_cpu:
            # On CUDA a captured graph must not depend on which adapters are loaded.
            module.punica_wrapper = LogitsPunica(wrapper, manager)


class PTELoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter manager, which also holds the encoders of the adapters it loads."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._shape = ModelShape.from_hf(vllm_config.model_config.hf_config.get_text_config())
        self._encoders: dict[int, LoadedEncoder] = {}
        self._plain: set[int] = set()
        self._loads: dict[int, int] = {}  # by adapter, the number of its loading
        self._load_numbers = itertools.count()
        self.targets_output_layer = False
        """Whether any adapter loaded so far has weights for the output layer."""

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
        self._loads[adapter_id] = next(self._load_numbers)
        self.targets_output_layer |= any(name.endswith("lm_head") for name in model.loras)
        if adapter is None or adapter.pte is None:
            self._plain.add(adapter_id)
        else:
            self._encoders[adapter_id] = LoadedEncoder(
                config=adapter.pte,
                layers=adapter.layers,
                encoder=adapter.stacked_encoder().map(lambda t: t.to(self.device)),
            )
        return model

    def encoder_of(self, lora_request: LoRARequest) -> LoadedEncoder | None:
        """The adapter's encoder, loading the adapter if need be; None for a plain LoRA."""
        adapter_id = lora_request.lora_int_id
        if adapter_id not in self._encoders and adapter_id not in self._plain:
            self.add_adapter(lora_request)
        return self._encoders.get(adapter_id)
