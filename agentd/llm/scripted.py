"""The built-in provider that is not a model: it answers with sentences taken from the prompt, always the same for the same prompt.

For tests and for a first run without a key. It never pretends: its answers begin with a label, its model is called `scripted`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agentd.llm.prices import Usage

LABEL = "[scripted provider, not a model]"
SENTENCES = 3
CHARACTERS_PER_TOKEN = 4

_SENTENCE = re.compile(r"[^.!?\n]{30,400}[.!?]")


def text_of(content: object) -> str:
    """The text of a message's content, in either of its two shapes."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def answer(body: Mapping[str, Any]) -> tuple[str, Usage]:
    """The answer to a chat completion request, and what it would have counted as."""
    messages = [message for message in body.get("messages", []) if isinstance(message, dict)]
    prompt = "\n".join(text_of(message.get("content")) for message in messages)
    last = next(
        (text_of(message.get("content")) for message in reversed(messages) if message.get("role") == "user"), ""
    )
    sentences = [" ".join(found.split()) for found in _SENTENCE.findall(last)]
    step = max(1, len(sentences) // SENTENCES)
    chosen = sentences[::step][:SENTENCES] or [" ".join(last.split())[:200]]
    text = f"{LABEL} " + " ".join(chosen)
    return text, Usage(
        input_tokens=-(-len(prompt) // CHARACTERS_PER_TOKEN), output_tokens=-(-len(text) // CHARACTERS_PER_TOKEN)
    )


def pieces(text: str) -> list[str]:
    """The answer as a stream would bring it: word by word."""
    return re.findall(r"\S+\s*", text)
