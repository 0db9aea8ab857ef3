"""A renderer that writes any model's chat template, and keeps the tokens of the turns before.

`renderers` knows some models by name. For all others its default writes a whole chat anew for each
turn, from what the answers said as text, and their tokens may come out otherwise than they were
sampled. This one keeps what was sampled, and writes only what is new after it.

    [environment.renderer]
    tool_parser = "qwen3"    # reads calls of tools; see `renderers.parsers`
"""

from typing import Any

from renderers.base import RenderedTokens, extract_message_tool_names
from renderers.configs import DefaultRendererConfig
from renderers.default import DefaultRenderer

_ANSWER = "<<<answer>>>"
"""Stands for the last answer, where the template is asked what follows one."""


class TemplateRenderer(DefaultRenderer):
    """Writes chats by the tokenizer's own template."""

    config_class = DefaultRendererConfig

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Any],
        *,
        tools: list[Any] | None = None,
    ) -> RenderedTokens | None:
        """Return the tokens so far and those of new messages; None where the template forbids it.

        Indices of messages count within `new_messages`; all other tokens have -1.
        """
        if not previous_prompt_ids or not new_messages:
            return None
        if any(message.get("role") == "assistant" for message in new_messages):
            return None
        try:
            parts = [self._after(new_messages[:count], tools) for count in range(len(new_messages))]
            parts.append(self._after(new_messages, tools))
            whole = self._after(new_messages, tools, ask=True)
        except Exception:  # a template may refuse roles or their order
            return None
        if None in parts or whole is None:
            return None
        before = [*previous_prompt_ids, *previous_completion_ids]
        ids = self._encode(whole)
        ended = bool(previous_completion_ids) and previous_completion_ids[-1] == ids[0]
        skipped = int(ended and ids[0] in self.get_stop_token_ids())
        indices = [-1] * len(self._encode(parts[0] or ""))
        for number, part in enumerate(parts[1:]):
            indices += [number] * (len(self._encode(part or "")) - len(indices))
        indices += [-1] * (len(ids) - len(indices))
        return RenderedTokens(
            token_ids=before + ids[skipped:],
            message_indices=[-1] * len(before) + indices[skipped : len(ids)],
            message_roles=[message.get("role") or "" for message in new_messages],
            message_tool_names=extract_message_tool_names(new_messages),
        )

    def _after(
        self, messages: list[Any], tools: list[Any] | None, *, ask: bool = False
    ) -> str | None:
        """Return what the template writes after an answer that these messages follow."""
        chat = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
            *messages,
        ]
        options: dict[str, Any] = {**(self.config.model_extra or {}), "tokenize": False}
        if tools is not None:
            options["tools"] = tools
        text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=ask, **options)
        return text.partition(_ANSWER)[2] if text.count(_ANSWER) == 1 else None

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
