"""The file of probes: queries by which kept tokens are scored.

One file serves all requests of an engine, but for those of adapters that bring probes of their own.
It holds one tensor, `probes: [L, H, n, D]`: queries from before RoPE, after any norm of the
model's, n for each KV head of each layer. They are float32, but float16 or bfloat16 where that
holds every number exactly. Its metadata say what it was made for. `method.keep` says what they are
used for.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pte_vllm.models.permissions import allow_as_umask

FORMAT_VERSION = "1"
_TENSOR = "probes"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of a file; the first that loses nothing is taken."""


class ProbesError(ValueError):
    """The probes cannot be used; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The probes of one base model."""

    queries: Tensor
    """`[L, H, n, D]` float32, on the host."""
    model_hash: str
    """What `models.location.model_hash` says of the model that they were sampled from."""
    content_hash: str
    """SHA-256 of the numbers; it names what depends on them."""

    @classmethod
    def of(cls, queries: Tensor, model_hash: str) -> Probes:
        """Wrap queries `[L, H, n, D]`."""
        queries = queries.detach().float().cpu().contiguous()
        digest = hashlib.sha256(str(tuple(queries.shape)).encode())
        digest.update(queries.numpy().tobytes())
        return cls(queries=queries, model_hash=model_hash, content_hash=digest.hexdigest())

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Read a file of probes.

        Raises:
            ProbesError: If it is missing, of another format or dtype, or its numbers are not
                finite.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                names = list(file.keys())
                found = {name: file.get_tensor(name) for name in names if name == _TENSOR}
        except (OSError, SafetensorError) as error:
            raise ProbesError(f"{path}: these probes cannot be read: {error}") from error
        version = about.get("format_version")
        if version != FORMAT_VERSION:
            raise ProbesError(
                f"{path}: probes of format {version} are not supported, only {FORMAT_VERSION}"
            )
        queries = found.get(_TENSOR)
        if queries is None or queries.ndim != 4 or not queries.numel():
            raise ProbesError(f"{path}: there is no tensor {_TENSOR} of four dimensions")
        if queries.dtype not in _DTYPES:
            raise ProbesError(f"{path}: probes of {queries.dtype} are not supported")
        if not bool(torch.isfinite(queries).all()):
            raise ProbesError(f"{path}: some numbers are not finite")
        return cls.of(queries, about.get("model_hash", ""))

    def save(self, path: str | Path) -> None:
        """Write the file, which appears whole or not at all.

        The same probes give the same bytes, as an adapter's hash covers them.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")  # others may write it too
        about = {"format_version": FORMAT_VERSION, "model_hash": self.model_hash}
        part.write_bytes(_sorted(save({_TENSOR: _smallest(self.queries)}, about)))
        allow_as_umask(part)  # a server may run as another user
        part.replace(path)

    def check_fits(self, *, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Raise ProbesError unless the probes are for a model of these sizes."""
        layers, heads, _, dim = self.queries.shape
        if (layers, heads, dim) != (num_layers, num_kv_heads, head_dim):
            raise ProbesError(
                f"these probes are for {layers} layers of {heads} KV heads of size {dim}, and the "
                f"model has {num_layers} layers of {num_kv_heads} KV heads of size {head_dim}"
            )


def _smallest(queries: Tensor) -> Tensor:
    """Return the queries in the first dtype of `_DTYPES` that holds them exactly."""
    copies = (queries.to(dtype) for dtype in _DTYPES)
    return next(copy for copy in copies if torch.equal(copy.float(), queries))


def _sorted(data: bytes) -> bytes:
    """Write the header of a safetensors file in order: the library's order of metadata is any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return len(header).to_bytes(8, "little") + header + data[end:]
