"""A model, the flags it would be served with, and an adapter: whether they work with folding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pte_vllm.adapter.serve_line import allowed_lora_rank
from pte_vllm.doctor.checks import Check, Checks, broken, ok, warning
from pte_vllm.engine.refusals import PARTLY, UnsupportedError, check_vllm_config, refused_flags
from pte_vllm.method.options import EngineConfig

_V2 = "VLLM_USE_V2_MODEL_RUNNER"


class Subject:
    """Hold what `pte-vllm doctor MODEL --adapter DIR` is about, and check it.

    Args:
        model: name or directory; None checks neither model nor flags.
        adapter: directory; None checks none.
        engine: PTE's options of the server.
        vllm_args: vLLM's flags of the server.
    """

    def __init__(
        self, model: str | None, adapter: str | None, engine: EngineConfig, vllm_args: Sequence[str]
    ) -> None:
        self._model, self._adapter = model, adapter
        self._engine, self._vllm_args = engine, list(vllm_args)
        self._config: Any = None

    def checks(self) -> list[Checks]:
        chosen: list[Checks] = [self.features]
        if self._model is not None:
            chosen.append(self.model)
        if self._adapter is not None:
            chosen.append(self.adapter)
        return chosen

    def features(self) -> Iterator[Check]:
        """Say what works and what is refused, whatever the model."""
        works = (
            "--tensor-parallel-size",
            *(f"{flag} ({what})" for flag, what in PARTLY.items()),
        )
        yield ok("works with folding", f"seen on a CPU: {', '.join(works)}")
        flags = (flag for flag in refused_flags() if flag.startswith("--") and flag not in PARTLY)
        yield ok("refused with folding", " ".join(flags))

    def model(self) -> Iterator[Check]:
        """Resolve model and flags as a server would, without loading weights."""
        from pte_vllm.serve import parse_vllm_args, resolve_config

        try:
            args, chosen = parse_vllm_args(str(self._model), self._engine, self._vllm_args)
            config = resolve_config(args)
            check_vllm_config(config, self._engine)
        except SystemExit:  # after a message on stderr
            what = f"vLLM refuses the flags {' '.join(self._vllm_args)}"
            yield broken("model and flags", what, "mend what it names")
            return
        except UnsupportedError as error:
            yield broken("model and flags", error, "leave the flag out, or choose another model")
            return
        except (ValueError, OSError) as error:
            yield broken("model and flags", " ".join(str(error).split()), "mend what it names")
            return
        self._config = config
        if chosen:
            yield ok("chosen for this CPU", "; ".join(chosen))
        found, text = config.model_config, config.model_config.hf_text_config
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if kinds or found.get_sliding_window() is not None:
            what = ", ".join(sorted(kinds)) or f"a sliding window of {found.get_sliding_window()}"
            yield broken(
                "model",
                f"{self._model} has layers with {what}",
                "choose a model with full attention in every layer",
            )
            return
        layers = found.get_num_layers(config.parallel_config)
        yield ok(
            "model",
            f"{found.architecture}, {layers} layers, {found.get_total_num_kv_heads()} KV heads of "
            f"{found.get_head_size()}, {str(found.dtype).removeprefix('torch.')}, "
            f"at most {found.max_model_len} tokens",
        )
        plan = self._engine.plan(pin_tokens=0, block_size=config.cache_config.block_size)
        window = f"window of {plan.window_tokens} tokens, {plan.evict_blocks} blocks a fold"
        yield ok("plan", window if plan.bounded else "full attention (--pte-window 0)")

    def adapter(self) -> Iterator[Check]:
        """Check what `pte-vllm adapter inspect` does, and the flags that the adapter needs."""
        from pte_vllm.adapter.files import AdapterError
        from pte_vllm.adapter.format import ModelShape
        from pte_vllm.adapter.inspect import describe

        config = self._config
        shape = None
        if config is not None:
            shape = ModelShape.from_hf(config.model_config.hf_config.get_text_config())
        try:
            about = describe(self._adapter or "", shape)
        except (AdapterError, OSError) as error:
            yield broken("adapter", error, "make it anew, or name the model it was made for")
            return
        fits = "fits the model" if about["checked_against_model"] else "not checked against a model"
        rule = f", rule {about['rule']}" if "rule" in about else ""
        yield ok("adapter", f"{about['kind']}, rank {about['rank']}{rule}, {fits}")
        rank = max(about["rank"], about.get("global_tokens", 0))
        lora = config.lora_config if config is not None else None
        if config is not None and (lora is None or lora.max_lora_rank < rank):
            allowed = "LoRA is off" if lora is None else f"--max-lora-rank is {lora.max_lora_rank}"
            yield warning(
                "adapter and flags",
                f"{allowed}, the adapter has rank {rank}",
                f"serve with --enable-lora --max-lora-rank {allowed_lora_rank(rank)}",
            )


def model_runner(environ_value: str | None) -> Checks:
    """Make a check of vLLM's choice of a model runner, as the environment had it."""

    def model_runner() -> Iterator[Check]:
        if environ_value not in (None, "0"):
            yield warning(
                _V2,
                f"{environ_value}: `pte-vllm serve` sets it to 0, `vllm serve` does not",
                "unset it",
            )
        else:
            yield ok(_V2, environ_value or "unset; `pte-vllm serve` sets it to 0")

    return model_runner
