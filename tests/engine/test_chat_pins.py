"""What a request pins, in numbers, from what it says and from the questions in its prompt."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pte_vllm.engine.chat_pins import with_pins
from pte_vllm.engine.earlier import EarlierRequest
from pte_vllm.method.options import EngineConfig
from pte_vllm.method.requests import RequestOptions
from tests.harness.models import byte_tokenizer

ASKED = "<s>user\nfirst</s>\n<s>assistant\n"
LATER = "one</s>\n<s>user\nnext</s>\n<s>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return found


def pins(
    tokenizer: Any, text: str, earlier: str | None = None, **options: Any
) -> tuple[int | None, Any]:
    """Return the pinned tokens and spans; `earlier` is the prompt that is continued."""
    engine = EngineConfig(window_tokens=64)
    before = None
    if earlier is not None:
        ids = tokenizer.encode(earlier, add_special_tokens=False)
        plan = RequestOptions().plan(engine, num_prompt_tokens=len(ids), block_size=16)
        before = EarlierRequest.of(RequestOptions(), plan=plan, adapter=None, choices=1, prompt=ids)
    found = with_pins(
        RequestOptions(**options),
        engine,
        tokenizer=tokenizer,
        prompt=tokenizer.encode(text, add_special_tokens=False),
        earlier=before,
    )
    assert found.pin is None
    return found.pin_tokens, found.pin_spans


def test_what_is_said_and_what_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    first, total = count(ASKED), count(ASKED + LATER)
    question = (count(ASKED + "one</s>\n"), total)
    chat = ASKED + LATER
    assert pins(tokenizer, ASKED) == (None, ())  # the whole prompt, as without a chat
    assert pins(tokenizer, chat) == (first, (question,))
    assert pins(tokenizer, chat, pin="prompt") == (total, ())
    assert pins(tokenizer, chat, pin_tokens=5) == (5, ())
    assert pins(tokenizer, chat, pin_spans=((first, first + 2),)) == (first, ((first, first + 2),))
    assert pins(tokenizer, chat, evict="random") == (None, ())
    # A continuation goes on with what was pinned; what it repeats changes nothing.
    assert pins(tokenizer, chat, ASKED) == (None, (question,))
    assert pins(tokenizer, chat, ASKED, pin_tokens=first) == (first, (question,))
    with pytest.raises(ValueError, match="pte_pin is prompt"):
        pins(tokenizer, chat, ASKED, pin="prompt")
