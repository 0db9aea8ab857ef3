"""Where a base model is: in a directory of this machine, or under a name on Hugging Face's hub.

Standard library only, so that commands can tell a mistyped path before anything slow is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_CONFIGS = ("config.json", "params.json")
"""Of Hugging Face and of Mistral."""
_FILES = (".gguf",)
"""Files that vLLM takes for a model, by the end of their names."""


def check_model(model: str, *, flag: str = "MODEL") -> None:
    """Refuse a path at which there is no model; a name that the hub may know passes.

    Args:
        model: what the user gave.
        flag: where the user gave it.

    Raises:
        FileNotFoundError, ValueError: naming the flag and the path.
    """
    if "://" in model:  # a store that vLLM reads
        return
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in _CONFIGS) and not _holds_file(path):
            raise ValueError(f"{flag}: the directory {model} holds no model: it has no config.json")
    elif path.exists():
        if not model.endswith(_FILES):
            raise ValueError(f"{flag}: {model} is a file; give the directory that it is in")
    elif not _HUB_NAME.fullmatch(model):
        raise FileNotFoundError(f"{flag}: the model directory {model} does not exist")


def _holds_file(path: Path) -> bool:
    return any(file.name.endswith(_FILES) for file in path.iterdir())
