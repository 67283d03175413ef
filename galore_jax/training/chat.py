# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations as a model reads them: the chat template of its folder, and which part of the text are answers.

A template is a Jinja program that writes messages with the marks between them.  Answer i of a conversation is what the template
adds to the text of the messages before it, the mark that asks for an answer included, when message i follows.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

# What transformers marks answers with, which is no part of Jinja; its whitespace control is kept.
_GENERATION = re.compile(r"({%-?\s*)(end)?generation(\s*-?%})")


class Segment(NamedTuple):
    """A part of a conversation's text, and whether there is loss on it."""

    text: str
    learnt: bool


class ChatTemplate:
    """A chat template.

    Args:
      source: in Jinja.
      name: of the file, for messages.
      tokens: the names of special tokens, such as ``{"eos_token": "</s>"}``.

    >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    >>> chat = [{"role": "me", "content": "hi"}, {"role": "bot", "content": "hello"}]
    >>> ChatTemplate(source, "a", {}).render(chat[:1], ask=True)
    '<me>hi<bot>'
    """

    def __init__(self, source: str, name: str, tokens: dict[str, str]):
        self._source, self._name, self._tokens = source, name, tokens

    @functools.cached_property
    def _template(self) -> Any:
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ValueError(f"{self._name} needs a library: pip install jinja2") from error

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        plain = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", self._source)
        try:
            return environment.from_string(plain, globals={"raise_exception": raise_exception})
        except jinja2.TemplateError as error:
            raise ValueError(f"{self._name} is not a chat template ({error}); get the model's own.") from error

    def render(self, messages: list[dict[str, Any]], *, ask: bool) -> str:
        """The text of messages; with ``ask`` it ends with the mark that asks for an answer.

        Raises:
          ValueError: the template does not take such messages.
        """
        template = self._template
        try:
            return template.render(messages=messages, add_generation_prompt=ask, **self._tokens)
        except Exception as error:  # whatever the program does
            raise ValueError(f"{self._name} cannot write the conversation ({error}).") from error

    def segments(self, messages: list[dict[str, Any]]) -> list[Segment]:
        """The text of a conversation, in parts with and without loss.

        An answer that the template writes otherwise when more messages follow, as without the thoughts before it, has no loss.
        """
        whole, place, parts = self.render(messages, ask=False), 0, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, until = self.render(messages[:i], ask=True), self.render(messages[: i + 1], ask=False)
            if len(before) >= place and until.startswith(before) and whole.startswith(until):
                parts += [Segment(whole[place : len(before)], False), Segment(whole[len(before) : len(until)], True)]
                place = len(until)
        parts.append(Segment(whole[place:], False))
        return [part for part in parts if part.text]


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a model's folder: ``chat_template.jinja``, or the field of ``tokenizer_config.json``; None without.

    Raises:
      ValueError: a file is damaged.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    fields: Any = {}
    if config.is_file():
        try:
            fields = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is damaged ({error}); restore it from a copy.") from error
    source, name = (fields.get("chat_template"), config) if isinstance(fields, dict) else (None, config)
    if isinstance(source, list):  # several, each with its name
        source = {one.get("name"): one.get("template") for one in source}.get("default")
    if file.is_file():
        source, name = file.read_text(encoding="utf-8"), file
    if not isinstance(source, str):
        return None
    tokens = {key: value for key, value in fields.items() if key.endswith("_token")} if fields else {}
    tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    return ChatTemplate(source, str(name), {key: value for key, value in tokens.items() if isinstance(value, str)})
