"""State-modulated LoRA: y = W x + (alpha/r) B (Sᵀ φ(A x)) inside vLLM's multi-LoRA.

vLLM loads, packs, shards and swaps adapters as always. Each of its LoRA layers gets a view of its
punica wrapper here, which multiplies by the tokens' states between shrink and expand (upstream:
`PunicaWrapperCPU.add_lora_linear` in vllm/lora/punica_wrapper/punica_cpu.py and its CUDA sibling).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from pte_vllm.adapter.files import layer_of
from pte_vllm.engine.huge_pages import Arena
from pte_vllm.engine.lora.cpu import CPULayerPunica, load_native
from pte_vllm.engine.lora.cpu_row import CPURowPunica
from pte_vllm.engine.lora.cuda import CUDALayerPunica
from pte_vllm.engine.lora.manager import PTELoRAManager
from pte_vllm.engine.lora.operators import as_operator
from pte_vllm.engine.lora.punica_view import OpaquePunicaView, PunicaView
from pte_vllm.engine.lora.slots import TokenSlots
from pte_vllm.engine.state import StatePool


class VocabularyPunica(OpaquePunicaView):
    """A view of vLLM's punica wrapper for embedding and output layer, on CPU and in fp32.

    vLLM multiplies the vectors and the logits of every token by an all-zero LoRA where no adapter
    targets these layers; with a large vocabulary that is a good part of a step. This view skips it
    then. On a GPU vLLM's kernels refuse fp32, and `PTELoRAManager` refuses the adapters that would
    need them.

    Args:
        module: The embedding or output layer that will use the view.
        manager: The adapter manager, which knows what the loaded adapters target.
    """

    def __init__(self, module: torch.nn.Module, manager: PTELoRAManager) -> None:
        super().__init__(module.punica_wrapper)
        self._manager = manager
        self._weights = module.lora_b_stacked

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapters' share of the logits, if any adapter has one."""
        if "lm_head" in self._manager.targeted:
            self._wrapper.add_lora_logits(*args, **kwargs)

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the adapters' share of the embedding `y: [T, hidden]`, if any adapter has one."""
        self.apply(y, x)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Do the work of `add_lora_embedding`; torch.compile does not look into it."""
        if "embed_tokens" in self._manager.targeted:
            self._wrapper.add_lora_embedding(y, x, self._weights, add_input=True)


def install_views(
    model: torch.nn.Module,
    manager: PTELoRAManager,
    pool: StatePool,
    tokens: TokenSlots,
    *,
    traced_layers: dict[str, Any] | None,
) -> None:
    """Give LoRA layers of the decoder, and on CPU or in fp32 embedding and output, their view.

    Args:
        model: The model after vLLM has put its LoRA layers in.
        manager: The adapter manager of the worker.
        pool: The states that views read.
        tokens: Which state each token of a step uses; views read it in every forward pass.
        traced_layers: Where operators find layers by name, vLLM's `static_forward_context`; None
            if torch.compile will not trace the model.
    """
    on_cpu = tokens.slots.device.type == "cpu"
    skips_unused = on_cpu or manager.lora_config.lora_dtype == torch.float32
    library = load_native(manager.lora_config.lora_dtype) if on_cpu else None
    arena = Arena()
    for name, module in model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            continue
        layer, wrapper = layer_of(name), module.punica_wrapper
        view: PunicaView
        shares_inputs = isinstance(module, RowParallelLinearWithLoRA) and module.tp_size > 1
        if layer is not None and on_cpu:
            # vLLM looks it up eight times a call, through a `__getattr__` in Python.
            module.__dict__["base_layer"] = module.base_layer
            about = (module, pool.states[layer], pool.squared, tokens)
            compiled = manager.loaded_in, library, arena
            if shares_inputs:
                view = CPURowPunica(*about, *compiled, ranks=manager.ranks)
            else:
                view = CPULayerPunica(*about, *compiled)
        elif layer is not None:
            view = CUDALayerPunica(
                *(wrapper, pool.states[layer], pool.squared, tokens),
                ranks=manager.ranks if shares_inputs else None,
            )
        elif skips_unused and isinstance(
            module, LogitsProcessorWithLoRA | VocabParallelEmbeddingWithLoRA
        ):
            # On CUDA a captured graph must not depend on which adapters are loaded; in fp32 there
            # it never does, as none may target these.
            view = VocabularyPunica(module, manager)
        else:
            continue
        if isinstance(view, OpaquePunicaView) and on_cpu and traced_layers is not None:
            view.apply = as_operator(traced_layers, name, view.add)
        module.punica_wrapper = view
