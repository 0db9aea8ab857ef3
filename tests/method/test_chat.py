"""Where questions lie in the tokens of a chat, by templates as models have them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pte_vllm.method.chat import ChatMarks
from tests.harness.models import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # Qwen2.5 writes what tools return as a user's message.
    "chatml with tools": CHATML.replace(
        "{{ m['role'] }}\n{{ m['content'] }}",
        "{{ 'user' if m['role'] == 'tool' else m['role'] }}\n"
        "{% if m['role'] == 'tool' %}<tool_response>\n{% endif %}{{ m['content'] }}",
    ),
    # Llama 3: the header has special tokens around the role, and messages are stripped.
    "llama": (
        "{% for m in messages %}<|start|>{{ m['role'] }}<|header|>\n\n{{ m['content'] | trim }}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}"
    ),
    # DeepSeek-R1: a token for each role, and thinking that only the newest answer has.
    "deepseek": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}<|Assistant|>"
        "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|header|>", "<|User|>", "<|Assistant|>")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " First?\n"},
    {"role": "assistant", "content": "<think>hm</think>One."},
    {"role": "tool", "content": "user: 42"},
    {"role": "user", "content": "Second, as the user said?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Third?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return found


def _ids(tokenizer: Any, chat: list[dict[str, str]], template: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_questions_reach_from_their_header_to_that_of_the_answer(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = TEMPLATES[name]
    marks = ChatMarks.of(tokenizer, template)
    assert marks is not None
    ids = _ids(tokenizer, CHAT, template)
    texts = [tokenizer.decode(ids[first:end]) for first, end in marks.questions(ids)]
    assert len(texts) == 3
    for text, content in zip(texts, ("First?", "Second, as the user said?", "Third?"), strict=True):
        assert text.count(content) == 1 and text.startswith("<|")
        assert "assistant" in text.lower() and "One." not in text and "42" not in text
    assert marks.questions(ids)[-1][1] == len(ids)
    assert marks.questions([]) == marks.questions(tokenizer.encode("user: no header")) == ()


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_of_a_user_in_a_row_are_one_question(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = TEMPLATES[name]
    marks = ChatMarks.of(tokenizer, template)
    assert marks is not None
    chat = [*CHAT[:2], {"role": "user", "content": "more"}, *CHAT[2:]]
    ids = _ids(tokenizer, chat, template)
    texts = [tokenizer.decode(ids[first:end]) for first, end in marks.questions(ids)]
    assert len(texts) == 3 and "First?" in texts[0] and "more" in texts[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_turn_is_one_question(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """So the first turn's plan is that of the turns that come after it."""
    template = TEMPLATES[name]
    marks = ChatMarks.of(tokenizer, template)
    assert marks is not None
    ids = _ids(tokenizer, CHAT[:2], template)
    ((_, end),) = marks.questions(ids)
    assert end == len(ids)
    later = _ids(tokenizer, CHAT, template)
    if name != "deepseek":  # whose template drops `<think>` from earlier answers
        assert marks.questions(later)[0][1] == end


def test_headers_without_special_tokens_are_no_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    """A user could write them."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert ChatMarks.of(tokenizer, template) is None
    assert ChatMarks.of(tokenizer, "{{ raise_exception('no') }}") is None
    tokenizer_without = byte_tokenizer()
    tokenizer_without.chat_template = None
    assert ChatMarks.of(tokenizer_without) is None


def test_a_real_tokenizer(smollm2: Any) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(smollm2)
    marks = ChatMarks.of(real)
    assert marks is not None
    text = real.apply_chat_template(CHAT[:3] + CHAT[4:], tokenize=False, add_generation_prompt=True)
    ids = real.encode(text, add_special_tokens=False)
    found = [real.decode(ids[first:end]) for first, end in marks.questions(ids)]
    assert found[1:] == [
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        for content in ("Second, as the user said?", "Third?")
    ]
