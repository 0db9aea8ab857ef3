"""Adapters as they ship: makes one of a random adapter, and says what a directory lacks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.hashes import CONFIG_FILE, FILES
from pte_vllm.adapter.shipping import ABOUT_FILE, CARD_FILE, MAX_BYTES, TRAVELLING, read_about
from pte_vllm.models.catalog import MODELS
from pte_vllm.models.location import model_hash

SECTIONS = ("Base model", "Plan", "Data", "Recipe", "Figures")
HUB = "someone/tiny"
_PATH = re.compile(r"(?<![\w./])/(?:home|root|work|tmp|Users|mnt|data)/\S*")


def ship(adapter: Path, directory: Path, model: Path) -> Path:
    """Make a directory as they lie in `shipped/`, of an adapter and the model that it is for."""
    directory.mkdir(parents=True)
    for name in FILES:
        if (adapter / name).exists():
            shutil.copyfile(adapter / name, directory / name)
    config = json.loads((directory / CONFIG_FILE).read_text())
    config["base_model_name_or_path"] = HUB
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    sha256 = model_hash(model)
    about: dict[str, Any] = {
        "about": "It remembers facts.",
        "base_model": {"hub": HUB, "sha256": sha256},
        "plan": {"window_tokens": 64, "keep_tokens": 32, "block_size": 32, "evict_ratio": 0.25},
    }
    (directory / ABOUT_FILE).write_text(json.dumps(about))
    head = f"---\nbase_model: {HUB}\nlibrary_name: peft\nlicense: apache-2.0\ntags: [lora]\n---\n"
    text = {
        "Base model": f"{HUB}, {sha256}",
        "Plan": "A window of 64 tokens, 32 kept, blocks of 32, evict ratio 0.25.",
        "Data": "Facts.",
        "Recipe": "    pte-vllm train distill facts.toml",
        "Figures": "Recall is .9: `pte-vllm train experiment recall`.",
    }
    sections = "".join(f"\n## {name}\n\n{words}\n" for name, words in text.items())
    (directory / CARD_FILE).write_text(f"{head}\n# Facts\n{sections}")
    return directory


def lacks(directory: Path) -> list[str]:
    """Return what a directory lacks that is to ship; nothing if it is good."""
    found: list[str] = []
    names = {path.name for path in directory.iterdir()}
    found += [f"{name} does not belong there" for name in sorted(names - set(TRAVELLING))]
    found += [f"{name} is missing" for name in (ABOUT_FILE, CARD_FILE) if name not in names]
    size = sum(path.stat().st_size for path in directory.iterdir())
    if size > MAX_BYTES:
        found.append(f"it has {size:,} bytes, and {MAX_BYTES:,} is the most")
    if found:
        return found
    about = read_about(directory)
    assert about is not None
    base, plan = about.base_model, about.plan
    adapter = Adapter.load(directory)
    if adapter.peft.get("base_model_name_or_path") != base.hub:
        found.append(f"{CONFIG_FILE}: base_model_name_or_path is not {base.hub}")
    if plan.block_size % 32:
        found.append(f"blocks of {plan.block_size} tokens: a CPU serves multiples of 32 only")
    if base.catalog is not None and MODELS[base.catalog].hub != base.hub:
        found.append(f"{base.catalog} in the catalog is {MODELS[base.catalog].hub}")
    if adapter.probes is not None and adapter.probes.model_hash != base.sha256:
        found.append("the probes were sampled from another model than shipped.json names")
    text = (directory / CARD_FILE).read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    about_card = card.data.to_dict()
    if about_card.get("base_model") != base.hub:
        found.append(f"the card's base_model is not {base.hub}")
    if about_card.get("library_name") != "peft":
        found.append("the card's library_name is not peft")
    found += [f"the card has no {name}" for name in ("license", "tags") if not about_card.get(name)]
    sections = {part.partition("\n")[0].strip(): part for part in card.text.split("\n## ")[1:]}
    found += [f"the card has no section {name}" for name in SECTIONS if name not in sections]
    if base.sha256 not in sections.get("Base model", ""):
        found.append("the card's hash of the base model is not that in shipped.json")
    numbers = re.findall(r"\d*\.?\d+", sections.get("Plan", "").replace(",", ""))
    wanted = (plan.window_tokens, plan.keep_tokens, plan.block_size, plan.evict_ratio)
    missing = [f"{value:g}" for value in wanted if value not in [float(n) for n in numbers]]
    found += [f"the card's plan does not say {value}" for value in missing]
    for name in ("Recipe", "Figures"):
        if "pte-vllm" not in sections.get(name, "") and "python" not in sections.get(name, ""):
            found.append(f"the card's section {name} names no command")
    for file in (CARD_FILE, ABOUT_FILE, CONFIG_FILE):
        if match := _PATH.search((directory / file).read_text(encoding="utf-8")):
            found.append(f"{file} names a path of one machine: {match[0]}")
    return found
