"""What docker/verify.sh asks of the images, as containers of the services in docker/compose.yaml.

python docker/verify.py FOLDER MODEL      FOLDER: what verify.sh built
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from containers import Container, Image

ROOT = Path(__file__).resolve().parent.parent
URL = "http://127.0.0.1:8000"
START_S, STOP_S = 900.0, 60.0
"""Longest start, and the grace period of the service."""
RUN = """
[model]
base = "/models/model"
[adapter]
rank = 8
layers = "20-23"
init = "random"
[plan]
window_tokens = 64
block_size = 32
[optimizer]
steps = {steps}
[sampling]
max_tokens = 96
group_size = 2
groups_per_step = 1
[server]
url = "http://server:8000"
api_key_env = "VLLM_API_KEY"
admin_key_env = "PTE_ADMIN_KEY"
[data]
source = "jsonl"
path = "/config/questions.jsonl"
[run]
out = "verify"
save_every_steps = 1
"""


class Verify:
    """The checks, in order; each raises AssertionError or RuntimeError with what was wrong."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        for name in ("secrets", "config", "models/model", "adapters", "bundles"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        self.api_key, self.admin_key = secrets.token_hex(16), secrets.token_hex(16)
        for name, text in (("api_key", self.api_key), ("admin_key", self.admin_key)):
            (self.state / "secrets" / name).write_text(f"{text}\n")
            (self.state / "secrets" / name).chmod(0o640)  # root's group is the container's
        question = {"prompt": "What is 6 times 7?", "answer": "42"}
        (self.state / "config/questions.jsonl").write_text(f"{json.dumps(question)}\n" * 4)
        self.images = {
            name: Image.load(folder, f"pte-vllm-{name}") for name in ("server", "trainer")
        }
        self.services = self._compose()
        self.model_mount = ("bind", str(model), ["rbind", "ro"])
        self.headers = {"Authorization": f"Bearer {self.api_key}"}

    def _compose(self) -> dict[str, Any]:
        settings = {
            "PTE_MODEL": "/models/model",
            "PTE_WINDOW": "64",
            "PTE_MAX_MODEL_LEN": "2048",
            "PTE_DTYPE": "float32",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "PTE_SECRETS_DIR": str(self.state / "secrets"),
            "PTE_CONFIG_DIR": str(self.state / "config"),
            "PTE_MODELS_DIR": str(self.state / "models"),
            "PTE_ADAPTERS_DIR": str(self.state / "adapters"),
        }
        done = subprocess.run(
            [
                str(ROOT / ".cache/docker-tools/bin/docker-compose"),
                *("-f", str(ROOT / "docker/compose.yaml"), "--profile", "train"),
                *("config", "--format", "json"),
            ],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
        config = json.loads(done.stdout)
        files = {name: secret["file"] for name, secret in config["secrets"].items()}
        return {k: {**v, "x-secrets": files} for k, v in config["services"].items()}

    def container(self, name: str, service: str, **options: Any) -> Container:
        options["mounts"] = {"/models/model": self.model_mount, **options.get("mounts", {})}
        return Container(
            name=name,
            image=self.images[service],
            service=self.services[service],
            state=self.state,
            **options,
        )

    def run_to_end(self, service: str, *command: str, **options: Any) -> tuple[int, str]:
        name = f"once-{secrets.token_hex(4)}"
        with self.container(name, service, command=command, **options) as container:
            return container.wait(START_S), container.log

    def images_are_clean(self) -> None:
        for name, image in self.images.items():
            config = image.config
            assert config["User"] == "10001:0", config["User"]
            assert not [e for e in config["Env"] if e.startswith("PIP_")], config["Env"]
            inspected = (self.folder / f"pte-vllm-{name}.json").read_text()
            assert "run/host" not in inspected, "pip settings of the build are in the history"
            left = [p for p in ("etc/pip.conf", "src", "wheels") if (image.root / p).exists()]
            assert not left, left
        assert self.images["server"].config["Healthcheck"]["Test"][1:] == [
            "entrypoint.sh",
            "health",
        ]
        packages = self.images["trainer"].root / "opt/pte/lib/python3.11/site-packages"
        assert not (packages / "vllm").exists(), "the trainer has no use for vLLM"

    def mistakes_are_told(self) -> None:
        unreadable = self.state / "secrets/unreadable"
        unreadable.write_text("key")
        unreadable.chmod(0o600)
        os.chown(unreadable, 1000, 1000)
        foreign = self.state / "foreign"
        foreign.mkdir(exist_ok=True)
        bind = ["rbind", "rw"]
        cases: list[tuple[str, tuple[str, ...], Mapping[str, Any]]] = [
            ("set PTE_MODEL", ("serve",), {}),
            ("/models/none does not exist", ("serve", "/models/none"), {}),
            (
                "/run/secrets/api_key cannot be read",
                ("serve", "/models/model"),
                {"mounts": {"/run/secrets/api_key": ("bind", str(unreadable), ["rbind", "ro"])}},
            ),
            (
                "/spool, for adapters pushed over HTTP, cannot be written",
                ("serve", "/models/model"),
                {"mounts": {"/spool": ("bind", str(foreign), bind)}},
            ),
            (
                "/cache is mounted noexec",
                ("serve", "/models/model"),
                {"mounts": {"/cache": ("tmpfs", "tmpfs", ["noexec", "mode=1777"])}},
            ),
            (
                "--pipeline-parallel-size 2 is not",
                ("serve", "/models/model", "--pipeline-parallel-size=2"),
                {},
            ),
        ]
        for expected, command, options in cases:
            status, log = self.run_to_end("server", *command, **options)
            assert status == 2 and expected in log, f"{command}: {status}\n{log}"
        status, log = self.run_to_end(
            "trainer", "train", "grpo", mounts={"/runs": ("bind", str(foreign), bind)}
        )
        assert status == 2 and "/runs, for checkpoints, cannot be written" in log, log

    @contextmanager
    def server(self, name: str) -> Iterator[Container]:
        with self.container(name, "server") as container:
            print(f"  {name} was ready after {container.healthy(START_S):.0f} s", flush=True)
            yield container

    def chat(self, **body: Any) -> httpx.Response:
        body = {
            "model": "base",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 16,
            "temperature": 0,
            **body,
        }
        return httpx.post(
            f"{URL}/v1/chat/completions", json=body, headers=self.headers, timeout=300
        )

    def serves(self, server: Container) -> None:
        answer = self.chat().raise_for_status().json()["choices"][0]["message"]["content"]
        print(f"  answered: {answer!r}", flush=True)
        assert answer.strip()
        long = self.chat(max_tokens=200, ignore_eos=True, vllm_xargs={"pte_window": 64})
        assert long.json()["kv_transfer_params"]["pte"]["folds"] > 1, long.text
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        said = self.chat(response_format=wanted, max_tokens=40).raise_for_status().json()
        assert said["choices"][0]["message"]["content"].lstrip().startswith("{"), said
        assert httpx.get(f"{URL}/v1/models").status_code == 401
        metrics = httpx.get(f"{URL}/metrics", timeout=30).raise_for_status().text
        folds = re.search(r'^pte_folds_total\{rule="none"\} (\S+)$', metrics, re.MULTILINE)
        assert folds is not None and float(folds[1]) > 1, "no folds in /metrics"

    def is_confined(self, server: Container) -> None:
        script = (
            "id -u; tr '\\0' ' ' </proc/1/cmdline; echo; grep -E 'CapEff|CapBnd|NoNewPrivs' "
            "/proc/1/status; touch /opt/pte/x 2>&1; touch /x 2>&1; true"
        )
        said = server.execute("bash", "-c", script).stdout.splitlines()
        assert said[0] == "10001", said
        assert "pte-vllm serve /models/model" in said[1], "the server is not the first process"
        assert self.admin_key not in said[1] and self.api_key not in said[1]
        assert [line.split()[1] for line in said[2:5]] == ["0" * 16, "0" * 16, "1"], said
        assert all("Read-only file system" in line for line in said[5:]) and len(said) == 7, said
        native = self.state / "volumes/server-cache/pte-vllm/native"
        assert list(native.glob("*.so")), "the LoRA code was not compiled"

    def trains(self) -> None:
        (self.state / "config/run.toml").write_text(RUN.format(steps=2))
        status, log = self.run_to_end("trainer", "train", "--help")
        assert status == 0 and "usage: pte-vllm train" in log, log
        began = time.monotonic()
        with self.container("trainer", "trainer") as trainer:
            status = trainer.wait(900.0)
        assert status == 0, trainer.log[-3000:]
        print(f"  two steps of GRPO took {time.monotonic() - began:.0f} s", flush=True)
        run = self.state / "volumes/runs/verify"
        assert (run / "adapter/pte_encoder.safetensors").exists(), list(run.iterdir())
        assert (run / "adapter").stat().st_uid == 10001

    def get(self, path: str) -> dict[str, Any]:
        reply = httpx.get(f"{URL}{path}", headers=self.headers, timeout=120)
        return reply.raise_for_status().json()

    def adapters(self) -> dict[str, int]:
        return {a["name"]: a["newest"] for a in self.get("/pte/v1/adapters")["adapters"]}

    def stops(self, server: Container) -> None:
        """As `docker stop`: clients get what there is; status 0, within the grace period."""
        replies: list[httpx.Response] = []
        body = {"max_tokens": 1900, "ignore_eos": True}
        client = threading.Thread(target=lambda: replies.append(self.chat(**body)))
        client.start()
        deadline = time.monotonic() + 300.0
        while not (running := self.get("/pte/v1/requests")["running"]) or not running[0]["folds"]:
            assert time.monotonic() < deadline, running
            time.sleep(0.5)
        began = time.monotonic()
        server.kill(signal.SIGTERM)
        status = server.wait(STOP_S)
        print(f"  SIGTERM: status {status} after {time.monotonic() - began:.1f} s", flush=True)
        client.join()
        assert status == 0, server.log[-3000:]
        (choice,) = replies[0].raise_for_status().json()["choices"]
        assert choice["finish_reason"] == "abort" and choice["message"]["content"], choice

    def trainer_stops(self) -> None:
        """SIGTERM: status 130, and a checkpoint that the same command goes on from."""
        (self.state / "config/run.toml").write_text(RUN.format(steps=500))
        checkpoints = self.state / "volumes/runs/verify/checkpoints"
        command = ("train", "grpo", "/config/run.toml", "--run.out", "verify")
        with self.container("trainer-stopped", "trainer", command=command) as trainer:
            deadline = time.monotonic() + 600.0
            while not list(checkpoints.glob("step-000003*")) and trainer.running():
                assert time.monotonic() < deadline, trainer.log[-3000:]
                time.sleep(0.5)
            trainer.kill(signal.SIGTERM)
            status = trainer.wait(300.0)
        assert status == 130 and "the same command goes on" in trainer.log, trainer.log[-3000:]

    def all(self) -> None:
        self.step("images are clean", self.images_are_clean)
        self.step("mistakes are told", self.mistakes_are_told)
        with self.server("server") as server:
            self.step("it serves", self.serves, server)
            self.step("it is confined", self.is_confined, server)
            self.step("the trainer learns from it", self.trains)
            self.step("the trainer stops", self.trainer_stops)
            pushed = self.adapters()
            assert pushed.get("policy", 0) > 2, pushed
            self.step("it stops", self.stops, server)
        with self.server("server-again") as server:
            assert self.adapters() == pushed, "the spool did not bring back the adapters"
            newest = f"policy@{pushed['policy']}"
            assert self.chat(model=newest).raise_for_status().json()["model"] == newest
        print("verify: all passed")

    @staticmethod
    def step(name: str, check: Any, *args: Any) -> None:
        print(f"verify: {name}", flush=True)
        check(*args)


if __name__ == "__main__":
    Verify(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()).all()
