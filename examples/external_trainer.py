"""The least a trainer needs of a `pte-vllm serve`: rollouts in, a new adapter out, again and again.

    pte-vllm adapter init MODEL ADAPTER
    pte-vllm serve MODEL --pte-window 1024 --enable-lora --max-lora-rank 32 --port 8000
    python examples/external_trainer.py --adapter ADAPTER --server http://127.0.0.1:8000

The update is a random step: put yours in its place. `pte_vllm.train.replay.functional` has
log-probs that it can differentiate; examples/trl_grpo.py shows them at work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from pte_vllm.adapter.format import Adapter
from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.rollout import Rollout


def update(adapter: Adapter, rollouts: list[Rollout], size: float) -> Adapter:
    """The next adapter; a real one would look at what the rollouts earned."""
    steps = {name: size * torch.randn_like(b) for name, b in adapter.lora_b.items()}
    return replace(adapter, lora_b={name: b + steps[name] for name, b in adapter.lora_b.items()})


def train(options: argparse.Namespace) -> list[tuple[int, float]]:
    """Version and mean log-prob of every round."""
    adapter, history = Adapter.load(options.adapter), []
    with RolloutClient(options.server, api_key=options.key) as client:
        client.wait_ready()
        for _ in range(options.rounds):
            version = client.push(adapter, options.name)
            rollouts = list(
                client.rollouts(
                    [f"Count to {n}: " for n in (20, 30)],
                    n=options.samples,
                    adapter=options.name,
                    min_weight_version=version,  # what was just pushed, or newer
                    sampling={"max_tokens": options.max_tokens, "temperature": 1.0},
                )
            )
            mean = fmean(logprob for rollout in rollouts for logprob in rollout.logprobs)
            print(f"version {version}: {len(rollouts)} rollouts, mean log-prob {mean:.3f}")
            history.append((version, mean))
            adapter = update(adapter, rollouts, options.step_size)
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, help="directory of the adapter to start from")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="a pte-vllm serve")
    parser.add_argument("--key", help="its --api-key, or the key for changing adapters")
    parser.add_argument("--name", default="policy", help="under which versions are pushed")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--step-size", type=float, default=1e-3)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
