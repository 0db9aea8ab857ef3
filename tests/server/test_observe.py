"""A running server shows metrics, and a page in a real browser."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pte_vllm.adapter.hashes import content_hash
from tests.harness.engine import BLOCK
from tests.harness.kinds import ADMIN_KEY as ADMIN
from tests.harness.kinds import API_KEY as API
from tests.harness.models import random_tokens
from tests.harness.server import Server

ROOT = Path(__file__).parents[2]
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def server(
    shared: Callable[..., Server], tiny: Callable[[str], Path], adapters: Callable[..., Path]
) -> Server:
    model = tiny("qwen3")
    return shared("keys", {rule: adapters(model, rank=8, rule=rule) for rule in ("paper", "ridge")})


def _get(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=HEADERS, timeout=60)


def _metrics(server: Server) -> dict[str, float]:
    """Return samples by name, summed over their labels; buckets have their upper edge."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(_get(server, "/metrics").text):
        for sample in family.samples:
            name = sample.name
            if name.endswith("_bucket"):
                name += sample.labels["le"]
            found[name] = found.get(name, 0.0) + sample.value
    return found


def _push(server: Server, name: str, adapter: Path) -> httpx.Response:
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    sha256 = content_hash({part: hashlib.sha256(raw).hexdigest() for part, raw in files.items()})
    return httpx.put(
        f"{server.url}/pte/v1/adapters/{name}",
        files=files,
        data={"sha256": sha256},
        headers=HEADERS,
        timeout=120,
    )


def _post(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(server.url + path, json=body, headers=HEADERS, timeout=120)
    return [json.loads(line) for line in answer.raise_for_status().text.splitlines() if line]


def test_metrics_count_what_happened(server: Server, adapters: Callable[..., Path]) -> None:
    before = _metrics(server)
    assert before["pte_state_slots"] == 32 and before["pte_state_slots_in_use"] == 0
    rank_16 = adapters(server.model, rank=16, rule="paper")  # above --max-lora-rank: never loaded
    assert _push(server, "policy", server.adapters["paper"]).status_code == 201
    assert _push(server, "policy", server.adapters["ridge"]).status_code == 201
    assert _push(server, "policy", rank_16).status_code == 400
    prompts = [random_tokens(40, 500, seed) for seed in range(2)]
    records = _post(
        server,
        "/pte/v1/rollouts",
        {
            "token_ids": prompts,
            "adapter": "policy@1",
            "sampling": {"max_tokens": 300, "ignore_eos": True},
        },
    )
    tokens = [*records[0]["prompt_ids"], *records[0]["completion_ids"]]
    scored = {"token_ids": [tokens], "prompt_tokens": [40]}
    records += _post(server, "/pte/v1/score", {**scored, "adapter": "policy@2"})
    records += _post(server, "/pte/v1/score", scored)  # the base model: folds keep nothing
    _wait_for_rest(server)
    after = _metrics(server)
    risen = {name: after[name] - before.get(name, 0.0) for name in after}

    folds = sum(len(record["fold_events"]) for record in records)
    blocks = sum(e["blocks"][1] - e["blocks"][0] for r in records for e in r["fold_events"])
    assert folds > 15 and risen["pte_folds_total"] == folds
    assert risen["pte_freed_blocks_total"] == blocks
    assert risen["pte_folded_tokens_total"] == blocks * BLOCK
    with_state = folds - len(records[-1]["fold_events"])
    layers = 3
    assert risen["pte_fold_rho_ratio_count"] == risen["pte_fold_rho_ratio_bucket+Inf"]
    assert risen["pte_fold_rho_ratio_count"] == with_state * layers
    assert 0 < risen["pte_fold_rho_ratio_sum"] < 10 * with_state * layers
    assert risen["pte_rollout_seconds_count"] == risen["pte_score_seconds_count"] == 2
    assert after["pte_rollouts_in_flight"] == after["pte_scores_in_flight"] == 0
    assert after["pte_state_slots_in_use"] == 0
    assert (after["pte_adapters"], after["pte_adapter_versions"]) == (1, 2)
    assert risen["pte_adapter_load_seconds_count"] == 2


def _wait_for_rest(server: Server) -> None:
    """Wait until nothing runs; the worker hears of the last request one step later."""
    for _ in range(100):
        report = _get(server, "/pte/v1/requests").json()
        if not report["running"] and report["free_blocks"] == report["usable_blocks"]:
            break
        threading.Event().wait(0.1)
    threading.Event().wait(1.1)  # a scrape within a second of the last shows the same totals


def test_rollouts_in_flight_are_seen_and_do_not_leak(server: Server) -> None:
    body = {
        "token_ids": [random_tokens(40, 500, 3)],
        "n": 4,
        "adapter": "paper",
        "sampling": {"max_tokens": 3000, "ignore_eos": True},
    }
    url = f"{server.url}/pte/v1/rollouts"
    with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=60):
        _until(lambda: _metrics(server)["pte_state_slots_in_use"] == 4)
        assert _metrics(server)["pte_rollouts_in_flight"] == 4
    # The client has left.
    _until(lambda: _metrics(server)["pte_rollouts_in_flight"] == 0)
    _until(lambda: _metrics(server)["pte_state_slots_in_use"] == 0)


def _until(done: Callable[[], bool]) -> None:
    for _ in range(100):
        if done():
            return
        threading.Event().wait(0.3)
    raise AssertionError("it never came true")


def test_dashboard_queries_what_is_exported(server: Server) -> None:
    dashboard = json.loads((ROOT / "docker/grafana/pte-dashboard.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    asked = set(re.findall(r"(?:vllm:|pte_)\w+", " ".join(expressions)))
    exported = {re.sub(r"_bucket.*", "_bucket", name) for name in _metrics(server)}
    assert len(asked) > 20
    assert asked <= exported, f"nobody exports {sorted(asked - exported)}"
    ours = {name for name in exported if name.startswith("pte_")}
    drawn = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in asked}
    left = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in ours} - drawn
    assert not left, f"no panel draws {sorted(left)}"


def test_openai_example(server: Server) -> None:
    command = [sys.executable, str(ROOT / "examples/openai_client.py"), "--url", server.url]
    command += [
        "--model",
        "paper",
        "--max-tokens",
        "600",
        "--min-tokens",
        "600",
        "--window",
        str(2 * BLOCK),
    ]
    env = {**os.environ, "OPENAI_API_KEY": API}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = re.findall(
        r"(\d+) tokens, (\d+) folds: (\d+) KV blocks at most, (\d+) with full attention", run.stdout
    )
    print(run.stdout)
    assert len(found) == 3, run.stdout
    full, default, small = [tuple(map(int, numbers)) for numbers in found]
    assert full[1] == 0 and full[2] == full[3]
    assert small[1] > default[1] > 0
    assert small[2] < default[2] < default[3]


class Looking:
    """Open the page in a browser while three requests run on the server."""

    def __init__(self, server: Server, page: Any) -> None:
        self.server = server
        self.page = page
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        # A browser notes every 401 and 404 there; those are the page's own business.
        if message.type in ("error", "warning") and "status of 40" not in message.text:
            self.complaints.append(message.text)

    def generate(self, model: str, num_tokens: int, **options: object) -> None:
        client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=API, max_retries=0)
        client.completions.create(
            model=model,
            prompt=random_tokens(50, 500, num_tokens),
            max_tokens=num_tokens,
            extra_body={"ignore_eos": True, "vllm_xargs": options},
        )


@pytest.fixture(scope="module")
def looking(server: Server, browser: Any) -> Looking:
    if not _get(server, "/pte/v1/adapters/policy").is_success:
        adapter = server.adapters["ridge"]
        assert _push(server, "policy", adapter).status_code == 201
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page.set_default_timeout(60_000)
    return Looking(server, page)


def test_page_asks_for_the_key(looking: Looking) -> None:
    page = looking.page
    reply = page.goto(f"{looking.server.url}/pte")
    assert reply.ok and "script-src 'sha256-" in reply.headers["content-security-policy"]
    for key, what in (
        ("wrong", page.get_by_text("The server refused that key.")),
        (API, page.locator("#facts dd").first),
    ):
        page.locator("#ask").wait_for()
        page.fill("#key", key)
        page.keyboard.press("Enter")
        what.wait_for()
    assert page.locator("#facts").inner_text().count("128 tokens") == 1  # the window
    assert page.locator("#adapters tbody tr", has_text="policy").count() >= 1
    assert page.evaluate("localStorage.length") == 0  # the key goes with the tab
    assert API not in page.content()


def test_page_draws_requests(looking: Looking, tmp_path: Path) -> None:
    page, server = looking.page, looking.server
    jobs = [("ridge", 1800, {}), ("paper", 1500, {"pte_window": 2 * BLOCK}), ("base", 1200, {})]
    threads = [threading.Thread(target=looking.generate, args=j[:2], kwargs=j[2]) for j in jobs]
    for thread in threads:
        thread.start()
    page.locator(".request .tag.running").nth(2).wait_for()
    for thread in threads:
        thread.join()
    page.locator(".request .tag.running").first.wait_for(state="detached")
    page.locator("#finished tbody tr td.mono").nth(2).wait_for()

    report = _get(server, "/pte/v1/requests").json()
    for record in report["finished"][-3:]:
        card = page.locator(f'.request[data-id="{record["request_id"]}"]')
        text = card.inner_text()
        assert record["adapter"] or "base model" in text
        assert f"{record['num_tokens']:,} tokens · {record['folds']} folds" in text
        assert f"{record['peak_blocks']} KV blocks at most" in text
        assert "L" in card.locator("path.held").get_attribute("d")  # a line, not a dot
        rows = page.locator("#finished tbody tr", has_text=record["request_id"])
        assert rows.count() == 1
    pictures = Path(os.environ.get("PTE_PICTURES", tmp_path))  # docs/images has the light one
    for scheme, picture in (("dark", tmp_path / "dark.png"), ("light", pictures / "page.png")):
        page.emulate_media(color_scheme=scheme)
        assert len(page.screenshot(path=picture, full_page=True)) > 20_000
    assert not looking.complaints


def test_page_draws_thought_states(looking: Looking) -> None:
    """Requests with a state get a heat map with a row per layer, and a bar of ρ per fold."""
    page, server = looking.page, looking.server
    report = _get(server, "/pte/v1/requests").json()
    with_state = [record for record in report["finished"][-3:] if record["rule"]]
    assert len(with_state) == 2
    for record in with_state:
        card = page.locator(f'.request[data-id="{record["request_id"]}"]')
        canvas = card.locator(".heat canvas")
        canvas.wait_for()
        assert canvas.get_attribute("data-layers") == "3"
        assert int(canvas.get_attribute("data-columns")) >= 1
        assert card.locator(".rho rect.bar").count() == record["folds"]


def test_page_shows_kept_tokens(looking: Looking, tmp_path: Path) -> None:
    """Positions for whoever has an API key, and texts for the admin key."""
    page, server = looking.page, looking.server
    looking.generate("base", 500, pte_keep=BLOCK, pte_keep_score="random")
    page.locator("#strip .kept").first.wait_for()
    (report,) = (
        r for r in _get(server, "/pte/v1/requests").json()["finished"] if "keep_tokens" in r
    )
    path = f"/pte/v1/thoughts/{report['request_id']}/kept"

    def check(query: str) -> dict[str, Any]:
        """Wait until the strip shows the tokens that the route tells."""
        told = _get(server, f"{path}?{query}").json()
        wanted = {
            ".kept": sum(1 for heads in told["after"] if heads),
            ".dropped": len(told["dropped"]),
        }
        _until(lambda: {kind: page.locator(f"#strip {kind}").count() for kind in wanted} == wanted)
        return told

    latest = check("")
    assert f"{latest['folds']} of {latest['folds']}" in page.locator("#kept-at").inner_text()
    assert page.locator("#strip .dropped").first.inner_text().strip() == str(latest["dropped"][0])
    page.select_option("#kept-layer", "1")
    check("layer=1")
    page.select_option("#kept-head", "1")
    check("layer=1&head=1")
    page.locator("#kept-fold").fill("3")
    check("fold=3&layer=1&head=1")
    page.select_option("#kept-layer", "all")
    page.select_option("#kept-head", "all")
    check("fold=3")
    page.click("#forget")
    page.locator("#ask").wait_for()
    page.fill("#key", ADMIN)
    page.keyboard.press("Enter")
    page.locator("#strip .kept").first.wait_for()
    tokens = _get(server, f"{path.removesuffix('kept')}tokens").json()
    first = page.locator("#strip .pinned").first
    assert first.inner_text().strip() == tokens["texts"][0].strip()
    page.locator("#kept").screenshot(path=tmp_path / "kept.png")
    assert not looking.complaints
