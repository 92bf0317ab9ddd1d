"""Conversations of a corpus: fields with messages and tools, and their text by a chat template.

In: a record, a JSON object or a row of a table. Out: a Conversation; the chat template makes its text and says which
characters the assistant wrote. The template runs in the sandbox of transformers, whose apply_chat_template gives the same
text; the tokens and the mask are made of it in scorer/chat_mask.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from scorer.corpus import BadDocument, TableRow
from scorer.fields import Fields

REJECT = "pass --on-bad-document reject to leave such documents out"
SPEAKS = ("tool_calls", "function_call", "tool_plan", "reasoning_content", "reasoning", "thinking")
"""What a message may have in the place of content."""


@dataclass(frozen=True)
class Conversation:
    """where: file and line, for messages; messages: each an object with a role; tools: JSON schemas, None where it has none."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def characters(self) -> int:
        """Of its contents, about."""
        return sum(len(str(message.get("content"))) for message in self.messages)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. spans: first character and one past the last of what the assistant wrote, None where it is
    not asked for."""

    text: str
    spans: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class ConversationFields:
    """Which fields of a record hold its messages and, where it has any, its tools."""

    messages: str
    tools: str = "tools"
    kept: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The fields without which there is no document."""
        return (self.messages,)

    @property
    def option(self) -> str:
        """What a user sets where a field is missing."""
        return "--messages-field"

    def columns(self, present: Iterable[str]) -> list[str]:
        """Which of the columns that are there to read."""
        there = set(present)
        tools = [self.tools] if self.tools in there else []
        return list(dict.fromkeys([self.messages, *tools, *Fields(self.messages, kept=self.kept).columns(there)]))

    def missing(self, present: Iterable[str]) -> list[str]:
        """The columns that are not among those that are there."""
        return Fields(self.messages, kept=self.kept).missing(present)

    def text_of(self, where: str, record: Mapping[str, Any]) -> Conversation | BadDocument:
        """The conversation of a record, or what is wrong with it."""
        if self.messages not in record:
            return BadDocument(
                f"{where}: has no field {self.messages!r}, only {', '.join(map(str, record))[:80]}; set --messages-field, or "
                f"{REJECT}"
            )
        try:
            messages = _list(self.messages, record[self.messages])
            tools = None if record.get(self.tools) is None else _list(self.tools, record[self.tools])
            for number, message in enumerate(messages):
                _require_message(number, message)
        except ValueError as error:
            return BadDocument(f"{where}: {error}; correct the document, or {REJECT}")
        if isinstance(record, TableRow):  # a struct has all keys of the column in every row
            messages, tools = without_nulls(messages), without_nulls(tools)
        return Conversation(where, messages, tools)

    def kept_of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """The kept fields of a record, None for one that it has not got."""
        return Fields(kept=self.kept).kept_of(record)


def _list(field: str, value: Any) -> list[Any]:
    """The list in a field, which some tables hold as JSON; ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"field {field!r} is a string and no JSON ({error}): {value[:40]!r}") from None
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} is {type(value).__name__} {str(value)[:40]!r}, expected a list")
    return value


def _require_message(number: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} is {type(message).__name__} {str(message)[:40]!r}, expected an object with role"
        )
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} has no role, only {', '.join(message)[:60]}; expected role and content")
    content = message.get("content")
    if content in (None, []) and not _speaks(message):  # many templates would write None, others nothing
        has = "no content" if "content" not in message else f"{'null' if content is None else '[]'} for content"
        raise ValueError(
            f"message {number} has {has}, only {', '.join(message)[:60]}; expected a text, or one of {', '.join(SPEAKS)}"
        )
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"message {number} has a part of type text without a text: {str(part)[:60]}")


def _speaks(message: dict[str, Any]) -> list[str]:
    """What a message has in the place of content."""
    return [name for name in SPEAKS if message.get(name)]


def without_nulls(value: Any) -> Any:
    """JSON without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


class ClockAsked(ValueError):
    """A chat template that asks which day it is."""


class ChatTemplate:
    """Makes the text of conversations. settings: as chat_settings of scorer/chat_settings.py gives them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._templates, self._arguments = settings["templates"], settings["arguments"]
        self._date, self._assistant = settings["date"], settings["train_on"] == "assistant"

    def template_of(self, tools: list[Any] | None) -> str:
        """The template that transformers takes: one called tool_use, where there is one, for conversations with tools."""
        return self._templates["tool_use" if tools is not None and "tool_use" in self._templates else "default"]

    def render(self, conversation: Conversation) -> Rendered | BadDocument:
        """The text of a conversation, none of an empty one; a BadDocument where the template refuses it."""
        if not conversation.messages:
            return Rendered("", [] if self._assistant else None)
        try:
            text, spans = self._render(conversation.messages, conversation.tools)
            text.encode()
            self._require_told(conversation, text)
        except ClockAsked as error:
            raise ClockAsked(f"{conversation.where}: {error}") from None
        except UnicodeEncodeError as error:
            fault = f"its text has an unpaired surrogate at character {error.start}, expected valid Unicode"
        except Exception as error:  # a template raises anything: its own refusals, and errors of types
            fault = f"the chat template refuses it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        else:
            return Rendered(text, spans)
        return BadDocument(f"{conversation.where}: {fault}; correct the document, or {REJECT}")

    def _require_told(self, conversation: Conversation, text: str) -> None:
        """ValueError where a message is left out of the text, or stands there as Python writes None or a list."""
        messages, template = conversation.messages, self.template_of(conversation.tools)
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list | dict) and content and str(content) in text:
                raise ValueError(
                    f"it writes the content of message {number} as Python shows a {type(content).__name__}: {str(content)[:40]}"
                )
            spoken = _speaks(message)
            if content in (None, []) and not any(re.search(rf"\b{name}\b", template) for name in spoken):
                raise ValueError(
                    f"message {number} has {', '.join(spoken)} and no content, and it writes none of these"
                )
        if any("content" in message and message["content"] in (None, []) for message in messages):
            without = [{**one, "content": ""} if one.get("content") in (None, []) else one for one in messages]
            if text != (told := self._render(without, conversation.tools)[0]):
                for shown in ("None", "[]"):
                    if text.count(shown) > told.count(shown):
                        raise ValueError(f"it writes {shown} for a message whose content is null or empty")

    def _render(self, messages: list[Any], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template  # only workers with conversations pay

        found: Any = render_jinja_template(  # which says that it is a str
            conversations=[messages],
            tools=tools,
            chat_template=self.template_of(tools),
            return_assistant_tokens_mask=self._assistant,
            **{"strftime_now": self._now, **self._arguments},
        )
        texts, spans = found
        return texts[0], spans[0] if self._assistant else None

    def _now(self, form: str) -> str:
        if self._date is None:
            raise ClockAsked(
                "the chat template asks for today's date, so the same corpus would give other rows tomorrow; name a day with "
                "--chat-template-date, for instance 2025-01-31"
            )
        return date.fromisoformat(self._date).strftime(form)
