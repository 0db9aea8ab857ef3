"""TRL's GRPOTrainer with Progressive Thought Encoding.

TRL keeps its data loading, rewards, advantages, loss and logging. Three things are replaced:

    log-probs   by a replay under the window, differentiable with the activations of one segment
    rollouts    by those of a `pte-vllm serve`, through TRL's rollout_func
    weight sync by pushing the adapter over HTTP as a new version; nothing is merged, and no NCCL

    pte-vllm adapter init MODEL ADAPTER
    pte-vllm serve MODEL --pte-window 1024 --enable-lora --max-lora-rank 32 --port 8000
    python examples/trl_grpo.py --model MODEL --adapter ADAPTER --server http://127.0.0.1:8000

Needs trl==1.16.0: what is overridden and relied on is private to TRL.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.functional import differentiable_log_probs
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.wire.client import RolloutClient


class PTEGRPOTrainer(GRPOTrainer):
    """GRPO whose policy has a window and a thought state, in sampler and learner alike.

    Args:
        model: base model and adapter; its device must be the one that TRL chooses.
        client: a client of a server of the same base model, which has room for adapters.
        adapter_name: the name under which versions are pushed.
        args: TRL's options; `use_vllm`, which would merge weights, must be off, and `beta` 0.

    Raises:
        ValueError: naming the option of `args` that does not fit.
    """

    def __init__(
        self,
        model: PTEModel,
        client: RolloutClient,
        *,
        adapter_name: str = "policy",
        args: GRPOConfig,
        **options: Any,
    ) -> None:
        for name, wanted in (("use_vllm", False), ("beta", 0.0), ("gradient_checkpointing", False)):
            if getattr(args, name) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {getattr(args, name)!r}")
        self.pte, self.client, self.adapter_name, self.version = model, client, adapter_name, 0
        served = client.info()["plan"]
        self.plan = FoldPlan(
            pin_tokens=0,  # of each sequence: its prompt
            **{name: served[name] for name in ("window_tokens", "evict_ratio", "block_size")},
        )
        # TRL trains what it finds in its model: there LoRA's A and B lie already, the encoder not.
        encoder = {n: p for n, p in model.named_trainable() if n.startswith("encoder.")}
        model.base.pte_encoder = nn.ParameterDict(
            {name.removeprefix("encoder."): parameter for name, parameter in encoder.items()}
        )
        super().__init__(model=model.base, args=args, rollout_func=roll_out, **options)
        # From here on TRL takes it that a vLLM server samples: it syncs weights before rollouts
        # and weighs each token by learner / sampler (args.vllm_importance_sampling_*).
        self.use_vllm = True
        self.vllm_generation = SimpleNamespace(sync_weights=self.push_adapter)
        self._last_loaded_step = -1

    def push_adapter(self) -> None:
        """Push the adapter as a version of its own, where TRL would merge it."""
        self.version = self.client.push(self.pte.adapter(), self.adapter_name)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Turn ids `[B, P + C]` into log-probs and entropies of answers, `[B, C]`, 0 on padding.

        Prompts are padded on the left to P, answers on the right to C = `logits_to_keep`.
        """
        found = [
            self._replay(ids, mask, logits_to_keep)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        logprobs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logprobs, entropies if compute_entropy else None, None

    def _replay(self, input_ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        num_prompt = mask[:, :-keep].sum(1)  # [B]
        sequences = [ids[own.bool()].tolist() for ids, own in zip(input_ids, mask, strict=True)]
        plans = [replace(self.plan, pin_tokens=n) for n in num_prompt.tolist()]
        wanted = [
            [t >= plan.pin_tokens for t in range(len(tokens))]
            for tokens, plan in zip(sequences, plans, strict=True)
        ]
        scores = differentiable_log_probs(
            self.pte, AlignedBatch.align(sequences, plans, wanted), temperature=self.temperature
        )
        answer = num_prompt[:, None] + torch.arange(keep, device=mask.device)  # [B, C]
        answer = answer.clamp(max=scores.logprobs.shape[1] - 1)
        logprobs, entropies = (s.gather(1, answer) * mask[:, -keep:] for s in scores)
        return logprobs, entropies


def roll_out(prompts: list[str], trainer: PTEGRPOTrainer) -> dict[str, list[Any]]:
    """TRL's rollout_func: one answer to each prompt; prompts of a group come several times."""
    token_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    records = trainer.client.rollouts(
        token_ids,
        adapter=f"{trainer.adapter_name}@{trainer.version}",
        sampling={
            "temperature": trainer.temperature,
            "max_tokens": trainer.max_completion_length,
        },
    )
    answers = sorted(records, key=lambda record: int(record.group_id))
    return {
        "prompt_ids": [list(answer.prompt_ids) for answer in answers],
        "completion_ids": [list(answer.completion_ids) for answer in answers],
        "logprobs": [list(answer.logprobs) for answer in answers],
    }


def digits(completions: list[str], **unused: Any) -> list[float]:
    """Give a reward that is easy to watch: the share of an answer's characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def train(options: argparse.Namespace) -> PTEGRPOTrainer:
    """Train for a few steps; the adapter is written to `options.out`."""
    cuda = torch.cuda.is_available()
    model = PTEModel.from_pretrained(
        options.model, options.adapter, device="cuda" if cuda else "cpu"
    )
    with RolloutClient(options.server) as client:
        client.wait_ready()
        trainer = PTEGRPOTrainer(
            model,
            client,
            args=GRPOConfig(
                output_dir=options.out,
                max_steps=options.steps,
                learning_rate=options.lr,
                per_device_train_batch_size=options.group_size,
                num_generations=options.group_size,
                max_completion_length=options.max_tokens,
                vllm_importance_sampling_mode="token_truncate",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=not cuda,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"Count to {n}: " for n in range(20, 60)]}),
            reward_funcs=digits,
            processing_class=AutoTokenizer.from_pretrained(options.model),
        )
        trainer.train()
        trainer.push_adapter()
    model.save_pretrained(options.out)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the base model")
    parser.add_argument("--adapter", required=True, help="directory of the adapter to start from")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="a pte-vllm serve")
    parser.add_argument("--out", default="out/trl", help="directory for the trained adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
