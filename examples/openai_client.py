"""The OpenAI SDK against `pte-vllm serve`: chat and streaming, with PTE's options and without.

    pte-vllm serve MODEL --enable-lora --max-lora-rank 32 --lora-modules thoughts=ADAPTER
    python examples/openai_client.py --model thoughts

Prints what each answer held in the KV cache beside what full attention would hold. Needs `openai`
and `httpx` only. The key comes from --api-key or OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import httpx
from openai import OpenAI

QUESTION = "How many primes are there below 1000? Think it through step by step."


class Chat:
    """Answers from one server, and what the server says it held for them.

    Args:
        url: of the server, without `/v1`.
        model: name of an adapter, or of the base model.
        max_tokens: longest answer.
        min_tokens: shortest; an untrained adapter or a tiny model may stop at once.
        api_key: of the server; anything where it has none.
    """

    def __init__(
        self, url: str, model: str, *, max_tokens: int, min_tokens: int, api_key: str
    ) -> None:
        self.client = OpenAI(base_url=f"{url}/v1", api_key=api_key)
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=30
        )
        self.request = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_completion_tokens": max_tokens,
            "seed": 7,
        }
        self.min_tokens = min_tokens

    def _extra(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the OpenAI API does not name: vLLM's fields, and PTE's options within them."""
        return {"min_tokens": self.min_tokens, "vllm_xargs": dict(options)}

    def whole(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """Id and text of an answer that comes in one piece."""
        answer = self.client.chat.completions.create(
            **self.request, extra_body=self._extra(options)
        )
        return answer.id, answer.choices[0].message.content or ""

    def streamed(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The same, as it is written."""
        parts: list[str] = []
        answer_id = ""
        for chunk in self.client.chat.completions.create(
            **self.request, stream=True, extra_body=self._extra(options)
        ):
            answer_id = chunk.id
            if chunk.choices and (text := chunk.choices[0].delta.content):
                parts.append(text)
                print(text if len(parts) <= 12 else ".", end="", flush=True)
        print()
        return answer_id, "".join(parts)

    def memory(self, answer_id: str) -> dict[str, int]:
        """KV blocks of an answer; the server hears of its end one step after the client."""
        for _ in range(50):
            report = self.http.get("/pte/v1/requests").raise_for_status().json()
            for record in report["finished"]:
                if record["request_id"].startswith(answer_id):
                    full = math.ceil(record["num_tokens"] / report["block_size"])
                    return {**record, "full_blocks": full}
            time.sleep(0.1)
        raise TimeoutError(f"the server does not remember {answer_id}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True, help="an adapter's name, or the base model's")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--max-tokens", type=int, default=2000)
    parser.add_argument("--min-tokens", type=int, default=0)
    parser.add_argument("--window", type=int, default=512, help="tokens, for the third answer")
    options = parser.parse_args()
    chat = Chat(
        options.url.rstrip("/"),
        options.model,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        api_key=options.api_key,
    )
    runs = [
        ("full attention", chat.whole, {"pte_window": 0}),
        ("the server's window", chat.streamed, {}),
        (f"a window of {options.window}", chat.streamed, {"pte_window": options.window}),
    ]
    for title, ask, sent in runs:
        print(f"-- {title}")
        answer_id, text = ask(sent)
        used = chat.memory(answer_id)
        print(
            f"{len(text)} characters, {used['num_tokens']} tokens, {used['folds']} folds: "
            f"{used['peak_blocks']} KV blocks at most, {used['full_blocks']} with full attention"
        )


if __name__ == "__main__":
    main()
