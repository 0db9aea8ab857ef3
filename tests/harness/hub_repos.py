"""What the hub of the tests holds, and how the real one describes files and refuses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

OWNER, WRITE_TOKEN, READ_TOKEN = "someone", "hf_may_write", "hf_may_read"
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: the files of each commit, and what its branches point to."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Add a commit to a branch; returns its hash."""
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{parent}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[digest], self.branches[branch] = files, digest
        self.messages.append(message)
        return digest


def is_lfs(path: str) -> bool:
    """Say whether the hub wants a file by LFS, by its name."""
    return path.endswith((".safetensors", ".bin"))


def _blob_id(path: str, data: bytes) -> str:
    if is_lfs(path):  # git has the pointer
        data = f"oid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def about(path: str, data: bytes) -> dict[str, Any]:
    """Describe a file as the hub's API does."""
    found = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(path, data)}
    if is_lfs(path):
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return found


def refusal(status: int, code: str = "", message: str = "") -> Response:
    """Refuse as the hub does: the client reads these headers."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers=headers)
