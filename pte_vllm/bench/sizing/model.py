"""The sizes of a model that `pte-vllm plan` computes with. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pte_vllm.method.options import PTEConfig
from pte_vllm.method.weight import StateWeight, weigh_state


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the sizes depend on."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def load(cls, source: str) -> Model:
        """Read a `config.json`, or the one in a directory.

        Raises:
            ValueError: if it lacks a size, or is no dense decoder built like Llama or Qwen.
        """
        path = Path(source)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: {file} cannot be read: {error}") from error
        config = config.get("text_config", config)
        if "num_local_experts" in config or "num_experts" in config:
            raise ValueError("--model: mixtures of experts are not planned for")
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings")),
            )
        except KeyError as error:
            raise ValueError(f"--model: {file} lacks {error}") from error

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """In and out of each linear of a layer."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }

    @property
    def parameters(self) -> int:
        """Biases and norms aside."""
        layer = sum(a * b for a, b in self.linears.values())
        return self.layers * layer + self.vocabulary * self.hidden_size * (1 if self.tied else 2)

    def kv_bytes(self, itemsize: float) -> float:
        """Of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def state_weight(self, rank: int, rule: str, itemsize: float) -> StateWeight:
        """Of one sequence; a model whose numbers take at most two bytes is run in bfloat16."""
        config = PTEConfig(rank=rank, global_tokens=rank, rule=rule)
        return weigh_state(config, self.layers, "bfloat16" if itemsize <= 2 else "float32")

    def adapter_bytes(self, rank: int, itemsize: float) -> float:
        """Of one push: LoRA on all linears, and the encoder in fp32 (q_g, h_g, three W)."""
        lora = sum(rank * (a + b) for a, b in self.linears.values()) * itemsize
        return self.layers * (lora + 4 * 5 * rank * self.kv_heads * self.head_dim)
