"""A frozen transformers model with a trainable adapter: a PEFT LoRA modulated by thought states.

The LoRA is PEFT's own, but for its A: ours has G rows and multiplies what it computes by the
layer's state, so that a linear computes `W x + (alpha/r) B (Sᵀ φ(A x))`. The replay sets the
states, segment by segment. The encoder that writes them is held here as parameters, all layers
stacked.

Shapes: B sequences, n tokens of a segment, L layers with an encoder; G, r and d_kv as in
`method.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.files import layer_of
from pte_vllm.adapter.format import Adapter, ModelShape
from pte_vllm.adapter.probes import Probes
from pte_vllm.method import reference
from pte_vllm.method.reference import TENSORS, LayerEncoder
from pte_vllm.models.rope_check import check_unrotation
from pte_vllm.train.replay.attention_kernels import resolve_attention
from pte_vllm.train.replay.model_parts import ModulatedA, checkpointed, submodule
from pte_vllm.train.replay.supported import check_model

_NAME = "default"


class PTEModel(nn.Module):
    """A causal LM whose weights are frozen, and an adapter in fp32 that may learn.

    Args:
        base: a transformers causal LM built like Llama or Qwen; changed in place until `detach`.
        adapter: a PTE adapter, or a plain LoRA, whose state is the identity; None: the bare model.
        gradient_checkpointing: whether the backward pass computes decoder layers again instead of
            keeping their activations; works with the replay's constant-memory mode only.

    Raises:
        ValueError: if the model cannot be replayed, lacks a module of the adapter, or has keys
            whose RoPE the adapter wants undone and that cannot be.
    """

    def __init__(
        self, base: Any, adapter: Adapter | None = None, *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        check_model(base)
        base.eval().requires_grad_(False)
        self.base = base
        self.config = adapter.pte if adapter is not None else None
        self.layers = adapter.layers if adapter is not None else []
        self.probes: Probes | None = None
        self.probe_queries: Tensor | None = None
        """The adapter's own probes where the model is, `[L, H, n, D]` fp32; None without, and where
        the adapter is off. The replay scores kept tokens by these, as a server does."""
        self.states: Tensor | None = None
        """The states `[L, B, G, r]` of the segment that runs; the replay sets them."""
        self.gradient_checkpointing = gradient_checkpointing
        self._peft = adapter.peft if adapter is not None else {}
        self._form = adapter.form if adapter is not None else {}
        self._lora: dict[str, Any] = {}  # of LoraLayer, by module
        self._tuner: LoraModel | None = None
        self._encoder = nn.ParameterDict()
        self._layer_forwards: list[tuple[nn.Module, Any]] = []
        if adapter is not None:
            self._attach(adapter)
        if gradient_checkpointing:
            self._checkpoint_layers()

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: str | Path | Adapter | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Load a base model, and put on it an adapter from a directory or from memory.

        Raises:
            ValueError: naming the option, if one does not fit.
            AdapterError: if the adapter is broken or does not fit the model.
        """
        device = torch.device(device)
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation=resolve_attention(attention, device)
        )
        model.to(device)
        if isinstance(adapter, str | Path):
            adapter = Adapter.load(adapter, ModelShape.from_hf(model.config))
        return cls(model, adapter, gradient_checkpointing=gradient_checkpointing)

    # -- attaching --------------------------------------------------------------------------------

    def _attach(self, adapter: Adapter) -> None:
        self.take_probes(adapter.probes)
        # Sorted, so that an optimizer's state fits whether the adapter was made or loaded.
        used = [
            name
            for name in sorted(adapter.lora_a)
            if adapter.pte is None or layer_of(name) in adapter.encoders
        ]
        for name in used:  # all are looked for before the first is changed
            submodule(self.base, name)
        if adapter.pte is not None and adapter.pte.keys == "unrotated":
            check_unrotation(self.base, self.layers)
        config = LoraConfig(
            r=adapter.peft["r"],
            lora_alpha=adapter.peft["lora_alpha"],
            use_rslora=bool(adapter.peft.get("use_rslora")),
            target_modules=used,
            lora_dropout=0.0,
            bias="none",
        )
        self._tuner = LoraModel(self.base, {_NAME: config}, _NAME)
        self._lora = {name: self.base.get_submodule(name) for name in used}
        for name, linear in self._lora.items():
            a, b = adapter.lora_a[name], adapter.lora_b[name]
            linear.lora_B[_NAME].weight = self._parameter(b)
            if adapter.pte is None:
                linear.lora_A[_NAME].weight = self._parameter(a)
            else:
                layer = layer_of(name)
                assert layer is not None
                modulate = partial(self._modulate, self.layers.index(layer))
                linear.lora_A[_NAME] = ModulatedA(self._parameter(a), modulate)
        if adapter.pte is not None:
            stacked = adapter.stacked_encoder()
            for field in TENSORS:
                self._encoder[field] = self._parameter(getattr(stacked, field))

    def take_probes(self, new: Probes | None) -> None:
        """Use these as the adapter's own probes from now on; None: it has none.

        Raises:
            ProbesError: If they are for a model of other sizes.
        """
        own = self.probes
        if own is not None and new is not None and own.content_hash == new.content_hash:
            return
        if new is not None:
            ModelShape.from_hf(self.base.config).check_probes(new)
        self.probes = new
        self.probe_queries = None if new is None else new.queries.to(self.device)

    def _parameter(self, value: Tensor) -> nn.Parameter:
        # A copy: several models may start from one adapter.
        return nn.Parameter(value.detach().to(self.device, torch.float32, copy=True))

    def _modulate(self, index: int, asked: Tensor) -> Tensor:
        """Multiply `A x: [B, n, G]` by the state of the layer with this index: `[B, n, r]`."""
        assert self.states is not None and self.config is not None, "run the model by `replay`"
        config = self.config
        return reference.modulate(asked, self.states[index], config.read, config.features)

    def _checkpoint_layers(self) -> None:
        # transformers' own checkpointing drops the KV cache; ours may be written twice.
        for layer in self.base.model.layers:
            self._layer_forwards.append((layer, layer.forward))
            layer.forward = checkpointed(layer.forward)

    def detach(self) -> None:
        """Give the base model back as it was, but with its parameters frozen."""
        if self._tuner is not None:
            self._tuner.unload()
            self._tuner, self._lora = None, {}
        for layer, forward in self._layer_forwards:
            layer.forward = forward
        self._layer_forwards.clear()

    # -- weights ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.base.parameters()).device
        return device

    @property
    def encoder(self) -> LayerEncoder:
        """The encoders of all layers stacked, `[L, ...]`, the parameters themselves.

        Only a model with a PTE adapter has them.
        """
        assert self.config is not None
        tensors = {name: self._encoder[name] for name in TENSORS}
        return LayerEncoder(**tensors, features=self.config.features)

    def named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what training may change: A and B by module, and the stacked encoder."""
        for name, linear in self._lora.items():
            yield f"{name}.lora_A", linear.lora_A[_NAME].weight
            yield f"{name}.lora_B", linear.lora_B[_NAME].weight
        for field in TENSORS if self.config is not None else ():
            yield f"encoder.{field}", self._encoder[field]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what `named_trainable` yields, in the same order, without names."""
        return [parameter for _, parameter in self.named_trainable()]

    @torch.no_grad()
    def adapter(self) -> Adapter:
        """Return a copy of the adapter with its current weights, on the CPU.

        Raises:
            ValueError: if the model has no adapter.
        """
        if not self._lora:
            raise ValueError("the model has no adapter")

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True)

        return Adapter(
            peft=dict(self._peft),
            pte=self.config,
            lora_a={n: copy(m.lora_A[_NAME].weight) for n, m in self._lora.items()},
            lora_b={n: copy(m.lora_B[_NAME].weight) for n, m in self._lora.items()},
            encoders={
                layer: self.encoder.map(lambda tensor, i=i: copy(tensor[i]))  # type: ignore[misc]
                for i, layer in enumerate(self.layers)
            },
            probes=self.probes,
        )

    @torch.no_grad()
    def load_adapter_weights(self, adapter: Adapter) -> None:
        """Take over the weights of an adapter of the same form, and its probes.

        Raises:
            ValueError: if its modules, layers, method or scale differ, or its probes do not fit;
                nothing is changed then.
        """
        self._check_form(adapter)
        self.take_probes(adapter.probes)
        for name, linear in self._lora.items():
            linear.lora_A[_NAME].weight.copy_(adapter.lora_a[name])
            linear.lora_B[_NAME].weight.copy_(adapter.lora_b[name])
        if self.config is not None:
            stacked = adapter.stacked_encoder()
            for field in TENSORS:
                self._encoder[field].copy_(getattr(stacked, field))

    def _check_form(self, adapter: Adapter) -> None:
        """Refuse weights that mean something else in this model.

        Raises:
            ValueError: naming what differs, and how.
        """
        if not self._lora:
            raise ValueError("the model has no adapter")
        if set(self._lora) - set(adapter.lora_a) or self.layers != adapter.layers:
            raise ValueError("the adapter has other modules or layers than the model's")
        own, other = self._form, adapter.form
        differ = [
            f"{name} is {other.get(name)}, the model's is {own.get(name)}"
            for name in sorted(own.keys() | other.keys())
            if own.get(name) != other.get(name)
        ]
        if differ:
            raise ValueError(f"the adapter has another form than the model's: {'; '.join(differ)}")

    def save_pretrained(self, path: str | Path) -> None:
        """Write the adapter as a server loads it (see `adapter.format`)."""
        self.adapter().save(path)

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Switch the adapter off inside the block: what leaves the window is then forgotten.

        Its probes are off too.
        """
        layers, self.layers = self.layers, []
        queries, self.probe_queries = self.probe_queries, None
        for linear in self._lora.values():
            linear.enable_adapters(False)
        try:
            yield
        finally:
            self.layers, self.probe_queries = layers, queries
            for linear in self._lora.values():
                linear.enable_adapters(True)
