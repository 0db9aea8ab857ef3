"""Probes are queries of the model's own thoughts, drawn evenly, and sampled once for a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pte_vllm.adapter.make_probes import make_probes
from pte_vllm.adapter.probe_cache import calibrated
from pte_vllm.adapter.probe_options import ProbeOptions, read_prompts
from pte_vllm.adapter.probe_prompts import PROMPTS
from pte_vllm.adapter.probe_sampling import Thought, draw_probes, sample_thoughts, visit_queries
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.cli.main import main
from pte_vllm.models.location import model_hash
from tests.harness.models import TINY, random_tokens

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYERS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 2, 32  # of the tiny models
QUICK = ("--num-thoughts", "3", "--max-tokens", "12", "--probes", "20", "--batch-size", "2")
Tiny = Callable[[str], Path]


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _thoughts(*sizes: tuple[int, int]) -> list[Thought]:
    """Random tokens, by the sizes of prompt and thought."""
    return [
        Thought(token_ids=torch.tensor(random_tokens(p + t, seed=i)), prompt_tokens=p)
        for i, (p, t) in enumerate(sizes)
    ]


def _hooked_queries(model: Any, token_ids: Tensor) -> Tensor:
    """Queries `[layers, tokens, query heads, D]` as q_norm or q_proj gives them, before RoPE."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.reshape(len(token_ids), KV_HEADS * GROUP, HEAD_DIM))

    attentions = [layer.self_attn for layer in model.model.layers]
    handles = [
        (getattr(a, "q_norm", None) or a.q_proj).register_forward_hook(keep) for a in attentions
    ]
    with torch.no_grad():
        model(token_ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def _places(probes: Tensor, queries: Tensor) -> Tensor:
    """Return which of `queries: [N, D]` each of `probes: [n, D]` is."""
    distances = torch.cdist(probes, queries, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, found = distances.min(-1)
    assert nearest.max() < 1e-3 * queries.norm(dim=-1).mean()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_queries_are_those_before_rope(architecture: str, tiny: Tiny) -> None:
    model, token_ids = _load(tiny(architecture)), torch.tensor(random_tokens(70))
    before, found = model.config._attn_implementation, {}
    visit_queries(model, token_ids, found.__setitem__)
    assert sorted(found) == list(range(LAYERS))
    wanted = _hooked_queries(model, token_ids)
    torch.testing.assert_close(torch.stack([found[i] for i in range(LAYERS)]), wanted)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probes_are_queries_of_the_thoughts_alone(architecture: str, tiny: Tiny) -> None:
    """All of them are drawn, each once: none of a prompt, and none of another head's."""
    model, thoughts = _load(tiny(architecture)), _thoughts((9, 5), (3, 1), (4, 0), (6, 11))
    total = GROUP * 17
    probes = draw_probes(model, thoughts, total, seed=0)
    assert probes.shape == (LAYERS, KV_HEADS, total, HEAD_DIM) and probes.dtype == torch.float32
    whole = [_hooked_queries(model, thought.token_ids) for thought in thoughts]
    queries = torch.cat([w[:, t.prompt_tokens :] for w, t in zip(whole, thoughts, strict=True)], 1)
    orders = set()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            own = queries[layer, :, head * GROUP : (head + 1) * GROUP].flatten(0, 1)
            order = _places(probes[layer, head], own).tolist()
            assert sorted(order) == list(range(total))
            orders.add(tuple(order))
    assert len(orders) == LAYERS * KV_HEADS  # each head draws for itself, in random order


def test_fewer_probes_are_drawn_evenly(tiny: Tiny) -> None:
    model, thoughts = _load(tiny("llama")), _thoughts((4, 30), (4, 10))
    probes = [draw_probes(model, thoughts, 8, seed=seed) for seed in range(25)]
    queries = torch.cat([_hooked_queries(model, t.token_ids)[:, 4:] for t in thoughts], 1)
    own = queries[1, :, :GROUP].flatten(0, 1)
    drawn = torch.cat([_places(p[1, 0], own) for p in probes])
    assert drawn.view(25, 8).sort(-1).values.diff().min() > 0  # no probe twice
    assert len(drawn.unique()) > 60  # of 80
    assert 120 < int((drawn < 60).sum()) < 180  # 150 of 200 of the longer thought


def test_too_few_thoughts(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="--probes: the thoughts have 12 queries .* than 13"):
        draw_probes(_load(tiny("llama")), _thoughts((5, 6)), 13, seed=0)


def test_queries_that_overflow_are_refused(tiny: Tiny) -> None:
    model = _load(tiny("llama"))
    model.model.layers[1].self_attn.q_proj.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match="--dtype: some queries are not finite"):
        draw_probes(model, _thoughts((5, 6)), 4, seed=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thoughts_are_the_models_own(architecture: str, tiny: Tiny) -> None:
    """Near temperature 0 they are its most probable tokens, however prompts are batched."""
    model = _load(tiny(architecture))
    prompts, told = [random_tokens(n, seed=n) for n in (3, 17, 8)], []
    thoughts = sample_thoughts(
        model,
        prompts,
        max_tokens=10,
        temperature=1e-4,
        batch_size=2,
        end_ids=(),
        seed=0,
        progress=told.append,
    )
    assert sum(told) == 30
    for prompt, thought in zip(prompts, thoughts, strict=True):
        assert thought.num_tokens == 10 and thought.prompt_tokens == len(prompt)
        token_ids = thought.token_ids.tolist()
        assert token_ids[: len(prompt)] == prompt
        with torch.no_grad():
            best = model(thought.token_ids[None]).logits[0].argmax(-1).tolist()
        assert token_ids[len(prompt) :] == best[len(prompt) - 1 : -1]


def test_a_thought_ends_before_its_end_token(tiny: Tiny) -> None:
    model, prompts = _load(tiny("llama")), [random_tokens(5), random_tokens(9, seed=1)]

    def sample(end_ids: tuple[int, ...]) -> tuple[list[Thought], int]:
        told: list[int] = []
        thoughts = sample_thoughts(
            model,
            prompts,
            max_tokens=20,
            temperature=1.0,
            batch_size=2,
            end_ids=end_ids,
            seed=3,
            progress=told.append,
        )
        return thoughts, sum(told)

    (whole, other), _ = sample(())
    end = int(whole.token_ids[whole.prompt_tokens + 7])
    first = whole.token_ids[whole.prompt_tokens :].tolist().index(end)
    (cut, same), told = sample((end,))
    assert cut.num_tokens == first and told == 40
    assert torch.equal(cut.token_ids, whole.token_ids[: len(cut.token_ids)])
    assert torch.equal(same.token_ids, other.token_ids[: len(same.token_ids)])


def test_the_command_writes_a_file(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny("qwen3"), tmp_path / "new" / "probes.safetensors"
    assert main(["adapter", "calibrate", str(model), str(out), *QUICK]) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format_version": "1", "model_hash": model_hash(model)}
    probes = Probes.load(out)
    assert probes.queries.shape == (LAYERS, KV_HEADS, 20, HEAD_DIM)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    said = capsys.readouterr().err
    assert f"sampling 3 thoughts of up to 12 tokens from {model}" in said
    assert f"wrote {out}: 0.0 MiB, from " in said
    assert "tokens sampled: 36 of 36" in said and "thoughts read: 3 of 3" in said


def test_seeds_and_prompts(tiny: Tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "probes"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n\nAnd why not?\n")

    def sampled(prompts_file: Path | None = None, **options: int) -> str:
        about = ProbeOptions(num_thoughts=2, max_tokens=8, num_probes=6, **options)
        file = None if prompts_file is None else str(prompts_file)
        made = make_probes(str(model), out, about, prompts_file=file)
        assert Probes.load(out).content_hash == made.content_hash
        return made.content_hash

    first = sampled()
    assert sampled(seed=0) == first
    assert len({first, sampled(seed=1), sampled(prompts)}) == 3


def test_prompts_are_chat_messages_where_there_is_a_template(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n")
    about = ProbeOptions(num_thoughts=1, max_tokens=8, num_probes=16)

    def sampled() -> Tensor:
        made = make_probes(str(model), tmp_path / "out", about, prompts_file=str(prompts))
        return made.queries

    def thought_to(text: str) -> Tensor:
        network, tokenizer = _load(model), AutoTokenizer.from_pretrained(model)
        thoughts = sample_thoughts(
            network,
            [tokenizer(text)["input_ids"]],
            max_tokens=8,
            temperature=about.temperature,
            batch_size=1,
            end_ids=[1],
            seed=0,
        )
        return draw_probes(network, thoughts, 16, seed=0)

    torch.testing.assert_close(sampled(), thought_to("user: Why?\n"))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (model / name).exists():
            text = (model / name).read_text()
            (model / name).unlink()
            if name.endswith("json"):
                config = json.loads(text)
                config.pop("chat_template", None)
                (model / name).write_text(json.dumps(config))
    torch.testing.assert_close(sampled(), thought_to("Why?"))


def test_prompts_of_the_package() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 32
    chosen = ProbeOptions(num_thoughts=100).choose(PROMPTS)
    assert set(chosen[: len(PROMPTS)]) == set(PROMPTS) and len(chosen) == 100
    assert chosen[:5] != ProbeOptions(num_thoughts=5, seed=1).choose(PROMPTS)


def test_files_of_prompts(tmp_path: Path) -> None:
    lines, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text('One?\n\n{"prompt": 2}\n')
    assert read_prompts(lines) == ["One?", '{"prompt": 2}']
    records.write_text('{"prompt": "One?\\nOr two?", "id": 3}\n\n{"prompt": "Zwölf?"}\n')
    assert read_prompts(records) == ["One?\nOr two?", "Zwölf?"]
    for text, message in (
        ("\n", "holds no prompt"),
        ('{"prompt": "a"}\n{', "a.jsonl:2 is not JSON"),
        ('{"question": "a"}', 'a.jsonl:1 has no text in a field "prompt"'),
        ('{"prompt": " "}', 'a.jsonl:1 has no text in a field "prompt"'),
        ("[]", 'a.jsonl:1 has no text in a field "prompt"'),
    ):
        records.write_text(text)
        with pytest.raises(ValueError, match=f"--prompts: .*{message}"):
            read_prompts(records)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--probes 0", "--probes must be at least 1, got 0"),
        ("--temperature 0", "--temperature must be above 0, got 0"),
        ("--temperature nan", "--temperature must be above 0, got nan"),
        ("--prompts nowhere", "--prompts: the file nowhere does not exist"),
        ("--num-thoughts 2 --max-tokens 3", "at most 12 queries for each KV head, fewer than 128"),
        ("--max-tokens 40000", "--max-tokens: the longest prompt has "),
        pytest.param(
            "--device cuda",
            "--device cuda: PyTorch sees no GPU here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_flags_that_do_not_fit(
    flags: str, message: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["adapter", "calibrate", str(tiny("llama")), str(out), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_files_that_are_there_stay(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probes"
    out.write_text("mine")
    words = ["adapter", "calibrate", str(tiny("llama"))]
    assert main([*words, str(out)]) == 2
    assert "exists already: name another file, or give --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*words, str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err
    assert main([*words, str(out), *QUICK, "--overwrite"]) == 0
    assert Probes.load(out).queries.shape[2] == 20


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("Glm", "layer 0 has an unsupported RoPE layout"),
        ("SmolLM3", "layer 3 has no RoPE that could be undone; tokens are kept in all layers"),
        ("GPTNeoX", "gpt_neox is not built like Llama: no rotary_emb"),
    ],
)
def test_models_whose_rope_cannot_be_undone(
    architecture: str,
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    config = getattr(transformers, f"{architecture}Config")(
        **TINY, hidden_size=128, num_hidden_layers=4
    )
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(model)
    assert main(["adapter", "calibrate", str(model), str(out), *QUICK]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"MODEL: {model} can have no probes: " in said and message in said
    assert not out.exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of our own; returns where probes lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pte-vllm" / "probes"


def test_a_model_is_calibrated_once(
    cache: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = calibrated(str(model), options=QUICK)
    assert file == cache / f"{model_hash(model)}-1.safetensors"
    assert Probes.load(file).model_hash == model_hash(model)
    said = capfd.readouterr()
    assert "sampling them, once" in said.err and "wrote" in said.err and not said.out
    made = file.stat()
    moved = model.rename(tmp_path / "elsewhere")
    assert calibrated(str(moved), options=("--no-such-flag",)) == file
    assert file.stat().st_ino == made.st_ino and not capfd.readouterr().err
    file.write_bytes(file.read_bytes()[:100])  # a broken file is made again
    assert calibrated(str(moved), options=QUICK) == file
    assert Probes.load(file).queries.shape[2] == 20


def test_two_at_once_sample_once(cache: Path, tiny: Tiny) -> None:
    code = (
        "import sys; from pte_vllm.adapter.probe_cache import calibrated; "
        "print(calibrated(sys.argv[1], options=sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, str(tiny("qwen2")), *QUICK]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    files = {out.strip() for out, _ in said}
    assert len(files) == 1 and Probes.load(files.pop()).queries.shape[2] == 20
    assert sum("sampling them, once" in err for _, err in said) == 1
    assert len(list(cache.glob("*.safetensors"))) == 1 and not list(cache.glob(".*"))


def test_failures_of_the_sampling_are_told(
    cache: Path, tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProbesError, match="--model: sampling the probes of .* exit status 2"):
        calibrated(str(tiny("llama")), flag="--model", options=("--probes", "0"))
    assert "--probes must be at least 1" in capfd.readouterr().err
    assert not list(cache.glob("*.safetensors"))
    with pytest.raises(FileNotFoundError, match="--model: the model directory ./no does not exist"):
        calibrated("./no", flag="--model")
    with pytest.raises(FileNotFoundError, match="--model: the model no-such/model cannot be had"):
        calibrated("no-such/model", flag="--model")


def test_a_stop_leaves_no_file(cache: Path, tiny: Tiny) -> None:
    """Ctrl-C reaches both processes; a file that takes minutes is not there half."""
    code = (
        # A test run in the background ignores the signal, and so would what it starts.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pte_vllm.adapter.probe_cache import calibrated\n"
        "try: calibrated(sys.argv[1], options=['--num-thoughts', '64', '--max-tokens', '20000'])\n"
        "except KeyboardInterrupt: sys.exit(77)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny("llama"))],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("sampling 64 thoughts"):
            break
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 77, process.stderr.read()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_hash_of_a_model(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "a")
    first = model_hash(model)
    assert first == model_hash(tiny("llama")) != model_hash(tiny("qwen2"))
    (model / "README.md").write_text("not a part of the model")
    assert model_hash(model) == first
    found, weights = {first}, model / "model.safetensors"
    tensors = load_file(weights)

    def changed() -> bool:
        found.add(model_hash(model))
        return len(found) == changed_before + 1

    changed_before = 1
    save_file({name: 1.001 * t for name, t in tensors.items()}, weights)  # same size and header
    assert changed()
    changed_before += 1
    save_file(dict(list(tensors.items())[1:]), weights)
    assert changed()
    changed_before += 1
    weights.rename(model / "model-00001-of-00001.safetensors")
    assert changed()
    changed_before += 1
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert changed()


def test_parts_of_a_model_have_no_hash(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "a")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="only a part of a model: model-2.safetensors"):
        model_hash(model)
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert model_hash(model) != model_hash(tiny("llama"))
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="only a part of a model: weights missing"):
        model_hash(model)
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        model_hash(model)
