"""`pte-vllm adapter calibrate`: what it writes, what it asks the model, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pte_vllm.adapter.make_probes import make_probes, rounded
from pte_vllm.adapter.probe_options import ProbeOptions, read_prompts, read_thoughts
from pte_vllm.adapter.probe_prompts import PROMPTS
from pte_vllm.adapter.probe_sampling import draw_probes, sample_thoughts
from pte_vllm.adapter.probes import Probes, ProbesError
from pte_vllm.cli.main import main
from pte_vllm.models.location import model_hash
from tests.harness.models import TINY, random_tokens

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 2, 32  # of the tiny models
QUICK = ("--num-thoughts", "3", "--max-tokens", "12", "--probes", "20", "--batch-size", "2")
Tiny = Callable[[str], Path]


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


def test_probes_are_trained_where_thoughts_are_long_enough(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny("llama")), tmp_path / "probes"

    def made(steps: int, max_tokens: int) -> tuple[Tensor, str]:
        about = ProbeOptions(
            num_thoughts=4, max_tokens=max_tokens, num_probes=6, train_steps=steps, temperature=9.0
        )
        queries = make_probes(model, out, about).queries
        return queries, capsys.readouterr().err

    sampled, _ = made(0, 180)
    trained, said = made(4, 180)
    assert sampled.shape == trained.shape and not torch.equal(sampled, trained)
    assert "probes: training: 4 of 4" in said and "before training" in said
    thoughts = tmp_path / "thoughts.jsonl"
    ids = random_tokens(190, seed=1)
    thoughts.write_text(json.dumps({"prompt_ids": ids[:20], "completion_ids": ids[20:]}) + "\n")
    about = ProbeOptions(
        num_thoughts=4, max_tokens=180, num_probes=6, train_steps=4, temperature=9.0
    )
    more = make_probes(model, out, about, thoughts_file=str(thoughts)).queries
    assert "probes: reading: 5 of 5" in capsys.readouterr().err
    assert not torch.equal(more, trained)
    short, said = made(4, 20)
    assert torch.equal(short, made(0, 20)[0])
    assert "the probes stay as sampled: 0 answers are long enough" in said


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
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
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


def test_thoughts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [-1.0]}\n\n')
    assert read_thoughts(file) == [([1, 2, 3], 2)]
    for text, message in (
        ("\n", "holds none"),
        ("{", "a.jsonl:1 is no record"),
        ('{"prompt_ids": [1]}', "a.jsonl:1 is no record"),
        ("[]", "a.jsonl:1 is no record"),
        ('{"prompt_ids": ["a"], "completion_ids": []}', "a.jsonl:1 has ids that are no token ids"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"--thoughts: .*{message}"):
            read_thoughts(file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--probes 0", "--probes must be at least 1, got 0"),
        ("--temperature 0", "--temperature must be above 0, got 0"),
        ("--temperature nan", "--temperature must be above 0, got nan"),
        ("--prompts nowhere", "--prompts: the file nowhere does not exist"),
        ("--thoughts nowhere --train-steps 4", "--thoughts: the file nowhere does not exist"),
        ("--thoughts x", "--thoughts are trained on: they need --train-steps"),
        ("--train-steps -1", "--train-steps must not be negative, got -1"),
        ("--num-thoughts 2 --max-tokens 3", "at most 12 queries for each KV head, fewer than 512"),
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
    assert main([*words, str(out / "below a file"), *QUICK]) == 2  # before anything is sampled
    said = capsys.readouterr().err
    assert "OUT: " in said and "cannot be written" in said and "sampling" not in said
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


def test_sixteen_bits_are_written_where_they_lose_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """`--store` rounds; what is loaded and saved again stays small, and has the same hash."""
    model, out = tiny("llama"), tmp_path / "probes.safetensors"
    sizes, hashes = {}, {}
    for store in ("float32", "bfloat16", "float16"):
        about = ProbeOptions(num_thoughts=2, max_tokens=8, num_probes=6, store=store)
        hashes[store] = make_probes(str(model), out, about).content_hash
        sizes[store] = out.stat().st_size
        loaded = Probes.load(out)
        assert loaded.queries.dtype == torch.float32 and loaded.content_hash == hashes[store]
        loaded.save(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == out.read_bytes()
    numbers = 4 * LAYERS * KV_HEADS * 6 * HEAD_DIM
    for store in ("float16", "bfloat16"):
        assert sizes["float32"] - sizes[store] == pytest.approx(numbers / 2, abs=16)
    assert len(set(hashes.values())) == 3


def test_what_16_bits_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = torch.full((1, 1, 1, 1), 1e5)
    with pytest.raises(ValueError, match="--store float16 cannot hold these probes; bfloat16 can"):
        rounded(large, "float16")
    assert rounded(large, "bfloat16").isfinite().all()
    file = tmp_path / "integers"
    whole = {"probes": torch.ones(1, 1, 1, 1, dtype=torch.int64)}
    save_file(whole, file, {"format_version": "1"})
    with pytest.raises(ProbesError, match="probes of torch.int64 are not supported"):
        Probes.load(file)
