"""Conversations: as text, for tokenizers without a chat template; and out of texts of the form "Human: Assistant:"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spo_train.errors import RowError
from spo_train.protocol import Message

HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def human_assistant_messages(prompt: str) -> list[Message] | None:
    """Return the messages of a prompt of the form "Human: ... Assistant:"; None if it has another form."""
    before, *turns = HH_TURN.split(prompt)
    speakers, texts = turns[::2], turns[1::2]
    if len(speakers) < 2 or before.strip() or speakers[-1] != "Assistant" or texts[-1].strip():
        return None
    return [
        {"role": HH_ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(speakers[:-1], texts[:-1], strict=True)
    ]


def prompt_as_lines(messages: Sequence[Message]) -> str:
    """Return messages as lines `role: content`, and the beginning of the assistant's line after them."""
    return "".join(f"{message['role']}: {_content(message)}\n" for message in messages) + "assistant:"


def reply_as_line(message: Message) -> str:
    """Return the rest of the assistant's line that `prompt_as_lines` begins."""
    return " " + _content(message)


def _content(message: Message) -> str:
    others = message.keys() - {"role", "content"}
    if others:
        raise RowError(f"a message has {', '.join(sorted(others))}, for which the tokenizer has no chat template")
    return message["content"]
