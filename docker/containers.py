"""Services of docker/compose.yaml as containers of runc, where there is no docker engine.

Takes from a service what decides whether an image works in it: command, environment, user, mounts,
secrets, tmpfs, limits, a read-only root, capabilities. Networks, restarts and `init` are docker's
own; all containers here share one network. Named volumes are directories.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
_KERNEL = ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image that is mounted."""

    root: Path
    config: Json
    """As docker keeps it: Env, User, Entrypoint, Cmd, WorkingDir, Healthcheck."""

    @classmethod
    def load(cls, folder: Path, name: str) -> Image:
        """From FOLDER/NAME, its root, and FOLDER/NAME.json, what `buildah inspect` says of it."""
        inspected = json.loads((folder / f"{name}.json").read_text())
        return cls(root=(folder / name).resolve(), config=inspected["Docker"]["config"])


@dataclass(kw_only=True)
class Container:
    """One container; a context manager that kills what is left and removes it.

    Args:
        name: of the container; unique.
        image: what it runs.
        service: of `docker-compose config --format json`.
        state: directory for bundle, log and named volumes; the volumes outlive the container.
        command: instead of the service's.
        environment: in addition; None takes a variable away.
        mounts: replaces the service's mounts at these paths: (type, source, options).
    """

    name: str
    image: Image
    service: Json
    state: Path
    command: Sequence[str] | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    mounts: Mapping[str, tuple[str, str, list[str]]] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def log(self) -> str:
        return (self.state / f"{self.name}.log").read_text(errors="replace")

    def __enter__(self) -> Container:
        bundle = self.state / "bundles" / self.name
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(self._spec(bundle), indent=1))
        with (self.state / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["runc", "run", "--bundle", str(bundle), self.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self.kill(signal.SIGKILL)
            self._process.wait()

    def kill(self, number: int) -> None:
        """Send a signal to the container's first process, as `docker stop` does."""
        subprocess.run(["runc", "kill", self.name, str(int(number))], check=True)

    def wait(self, timeout_s: float) -> int:
        """Exit status of the container."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker exec`, with the container's own user and environment."""
        user = [] if not self._user()[1] else ["--user", "{}:{}".format(*self._user())]
        return subprocess.run(
            ["runc", "exec", *user, self.name, *command], capture_output=True, text=True
        )

    def healthy(self, timeout_s: float) -> float:
        """Seconds until the health check of the service passed.

        Raises:
            RuntimeError: with the end of the log, if the container ends first or the time is up.
        """
        began, test = time.monotonic(), self.service["healthcheck"]["test"]
        assert test[0] == "CMD", test
        while time.monotonic() - began < timeout_s and self.running():
            if self.execute(*test[1:]).returncode == 0:
                return time.monotonic() - began
            time.sleep(0.5)
        raise RuntimeError(f"{self.name} did not become healthy; its log ends:\n{self.log[-3000:]}")

    def _user(self) -> tuple[int, int]:
        user, _, group = str(self.service.get("user") or self.image.config["User"]).partition(":")
        return int(user), int(group or 0)

    def _spec(self, bundle: Path) -> Json:
        subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
        spec = json.loads((bundle / "config.json").read_text())
        service, config, process = self.service, self.image.config, spec["process"]
        (bundle / "config.json").unlink()
        environment = dict(entry.split("=", 1) for entry in config["Env"])
        environment |= service.get("environment") or {}
        environment |= self.environment
        command = self.command or service.get("command") or config["Cmd"]
        uid, gid = self._user()
        process.update(
            terminal=False,
            user={"uid": uid, "gid": gid},
            args=[*(service.get("entrypoint") or config["Entrypoint"]), *command],
            env=[f"{k}={v}" for k, v in environment.items() if v is not None],
            cwd=service.get("working_dir") or config["WorkingDir"] or "/",
            noNewPrivileges="no-new-privileges:true" in service.get("security_opt", ()),
            rlimits=[_limit(*limit) for limit in service.get("ulimits", {}).items()],
        )
        assert service.get("cap_drop") == ["ALL"], "give it docker's default capabilities here"
        process["capabilities"] = {kind: [] for kind in process["capabilities"]}
        spec["root"] = {"path": str(self.image.root), "readonly": service.get("read_only", False)}
        spec["hostname"] = self.name
        spec["linux"]["namespaces"] = [{"type": t} for t in ("pid", "mount", "ipc", "uts")]
        spec["linux"].pop("resources", None)  # runs without cgroups, too
        kernel = [m for m in spec["mounts"] if m["destination"] in _KERNEL]
        for mount in kernel:
            if mount["destination"] == "/dev/shm" and "shm_size" in service:
                size = f"size={service['shm_size']}"
                mount["options"] = [size if o.startswith("size=") else o for o in mount["options"]]
        spec["mounts"] = kernel + self._mounts()
        return spec

    def _mounts(self) -> list[Json]:
        found: dict[str, tuple[str, str, list[str]]] = {}
        for volume in self.service.get("volumes", ()):
            target = volume["target"]
            source = Path(volume["source"])
            if volume["type"] == "volume":
                source = self.state / "volumes" / volume["source"]
                self._make_volume(source, target)
            options = ["rbind", "ro" if volume.get("read_only") else "rw"]
            found[target] = ("bind", str(source), options)
        for secret in self.service.get("secrets", ()):
            target = secret["target"]
            path = Path(self.service["x-secrets"][secret["source"]])
            found[target] = ("bind", str(path), ["rbind", "ro"])
        for entry in self.service.get("tmpfs", ()):
            target, _, options = entry.partition(":")
            # docker's own defaults, noexec among them
            given = [o for o in options.split(",") if o] or ["mode=1777"]
            found[target] = ("tmpfs", "tmpfs", ["nosuid", "nodev", "noexec", *given])
        found["/sys"] = ("bind", "/sys", ["rbind", "ro"])  # vLLM looks at CPUs and NUMA nodes
        hosts = self.state / "hosts"
        hosts.write_text("127.0.0.1 localhost server trainer prometheus grafana\n")
        found["/etc/hosts"] = ("bind", str(hosts), ["rbind", "ro"])
        found |= self.mounts
        return [
            {"destination": target, "type": kind, "source": source, "options": options}
            for target, (kind, source, options) in found.items()
        ]

    def _make_volume(self, source: Path, target: str) -> None:
        """A new volume begins as the image's directory, owner and mode included, as in docker."""
        if source.exists():
            return
        source.mkdir(parents=True)
        below = self.image.root / target.lstrip("/")
        if below.exists():
            shutil.copytree(below, source, symlinks=True, dirs_exist_ok=True)
            status = below.stat()
            os.chown(source, status.st_uid, status.st_gid)
            source.chmod(status.st_mode)


def _limit(name: str, value: int) -> Json:
    """One of `ulimits`; no more than this machine lets root set."""
    kind = f"RLIMIT_{name.upper()}"
    allowed = resource.getrlimit(getattr(resource, kind))[1] % 2**64  # -1: without limit
    value = min(value % 2**64, allowed)
    return {"type": kind, "soft": value, "hard": value}
