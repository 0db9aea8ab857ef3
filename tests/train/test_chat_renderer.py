"""The renderer of our worker: what follows an answer, by any template, on the tokens sampled."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from renderers.configs import CustomRendererConfig

from pte_vllm.train.environments.process import PROGRAM
from tests.harness.kinds import CHAT_TEMPLATE
from tests.harness.models import byte_tokenizer

sys.path.append(str(PROGRAM.parent))
from pte_template import TemplateRenderer  # noqa: E402

TURNS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "And then?"}],
    [{"role": "tool", "content": "5", "tool_call_id": "a", "name": "add"}],
    [
        {"role": "tool", "content": "5", "tool_call_id": "a", "name": "add"},
        {"role": "tool", "content": "7", "tool_call_id": "b", "name": "add"},
        {"role": "user", "content": "Good."},
    ],
]


def _renderer(template: str = CHAT_TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return TemplateRenderer(tokenizer, TemplateRenderer.config_class())


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_turn_is_what_the_template_writes(turns: list[dict[str, Any]], ended: bool) -> None:
    """An answer that was cut off is closed as the template closes one."""
    renderer = _renderer()
    asked = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = renderer.render(asked, add_generation_prompt=True).token_ids
    said = renderer._encode("I add." + "</s>" * ended)
    bridged = renderer.bridge_to_next_turn(prompt, said, turns)
    chat = [*asked, {"role": "assistant", "content": "I add."}, *turns]
    assert bridged.token_ids == renderer.render_ids(chat, add_generation_prompt=True)
    assert len(bridged.message_indices) == len(bridged.token_ids)
    text = renderer._tokenizer
    for number, span in enumerate(bridged.message_token_spans()):
        assert turns[number]["content"] in text.decode(bridged.token_ids[span[0] : span[1]])


def test_tokens_of_an_answer_stay_as_they_were_sampled() -> None:
    """Text would bring others: half of a character is written as a replacement."""
    renderer = _renderer()
    prompt, said = renderer._encode("<s>assistant\n"), [renderer._encode("é")[0], 1]
    bridged = renderer.bridge_to_next_turn(prompt, said, TURNS[0])
    assert bridged.token_ids[: len(prompt) + 2] == prompt + said
    assert renderer._encode(renderer._tokenizer.decode(said)) != said


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHAT_TEMPLATE, [{"role": "assistant", "content": "hm"}]),
        (CHAT_TEMPLATE, []),
        ("{{ messages[-1]['content'] }}", TURNS[0]),  # which drops what was said
        ("{{ raise_exception('no') }}", TURNS[0]),
    ],
)
def test_what_cannot_go_on_is_written_anew(template: str, messages: list[dict[str, Any]]) -> None:
    assert _renderer(template).bridge_to_next_turn([5], [6], messages) is None


def test_the_library_finds_it() -> None:
    path = "pte_template.TemplateRenderer"
    config = CustomRendererConfig(import_path=path, tool_parser="qwen3")
    assert config.model_extra == {"tool_parser": "qwen3"}
    with pytest.raises(ValueError, match="no attribute"):
        CustomRendererConfig(import_path="pte_template.Nothing")
