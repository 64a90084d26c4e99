"""Conversations as the chat template of a tokenizer writes them, with what the assistant says.

A template is a Jinja program that comes with a tokenizer. It is run in Jinja's sandbox, without a
clock, so that the same conversation is always the same text. Where each message stands in that text
is found by rendering the conversation once more with a mark in the place of the message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ddk_jax.data.sources import Turn
from ddk_jax.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"

_MARK = "\ue000ddk\ue001"
"""Characters of a private area, which no text has by accident."""


class Rendering(NamedTuple):
    """A conversation as text.

    Attributes:
        text: all of it.
        contents: where each message stands in it: start and end, in characters.
    """

    text: str
    contents: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        source: the Jinja program.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """Compile a template.

        Args:
            source: the Jinja program.
            tokens: texts of special tokens by name (`bos_token`, ...), which templates use.
            where: the file that it is from, for messages.

        Raises:
            DataError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        self.source = source
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"{where}: not a chat template ({error})") from error

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """The text of a conversation.

        Raises:
            ValueError: the template refuses the conversation, or leaves out or changes what a
                message says (white space at its ends apart).
        """
        text = self._render(turns)
        contents = []
        for i, turn in enumerate(turns):
            marked = self._render([*turns[:i], Turn(turn.role, _MARK), *turns[i + 1 :]])
            before, mark, after = marked.partition(_MARK)
            start, stop = len(before), len(text) - len(after)
            whole = text.startswith(before) and text.endswith(after) and start <= stop
            if not mark or not whole or text[start:stop].strip() != turn.content.strip():
                raise ValueError(f"the chat template changes message {i} ({turn.role})")
            contents.append((start, stop))
        return Rendering(text, tuple(contents))

    def _render(self, turns: Sequence[Turn]) -> str:
        messages = [turn._asdict() for turn in turns]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=False,
                tools=None,
                raise_exception=_refuse,
                **self._tokens,
            )
        except (TemplateError, TypeError, LookupError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


def read_template(tokenizer_file: Path) -> ChatTemplate:
    """The template in the files beside a `tokenizer.json`.

    Raises:
        DataError: there is none, or it is broken.
    """
    file = tokenizer_file.parent / TEMPLATE_FILE
    config_file = tokenizer_file.parent / "tokenizer_config.json"
    config: dict[str, Any] = {}
    try:
        if config_file.is_file():
            config = json.loads(config_file.read_text(encoding="utf-8"))
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise DataError(f"{tokenizer_file.parent}: cannot be read ({error})") from error
    if isinstance(source, list):  # several by name
        source = next((one["template"] for one in source if one["name"] == "default"), None)
    if not isinstance(source, str):
        raise DataError(
            f"{tokenizer_file.parent}: no chat template, which a source with `messages` needs: add "
            f"{TEMPLATE_FILE}"
        )
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return ChatTemplate(source, tokens, str(file if file.is_file() else config_file))


class _Generation(Extension):
    """`{% generation %}`, by which some templates say what the assistant writes.

    That is found here for all of them, so the tag stands for its content.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """As Jinja's own, but not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
