"""What the options of remit pack say of conversations, made whole: which chat template, with which arguments.

In: the options, and the tokenizer's folder. Out: JSON for the tasks that render (scorer/conversations.py) and for the
manifest. Refused here, before a document is read: a tokenizer without a chat template, a template that is none or draws at
random, and one whose marks of what the assistant writes are missing or misplaced, if that alone is to be predicted.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from scorer.config import PackConfig
from scorer.conversations import ChatTemplate, Conversation, Rendered
from scorer.tokenizer import PackTokenizer, transformers_tokenizer

PROBES = ([("user", "a")], [("user", "a"), ("assistant", "b")], [("system", "a"), ("user", "b"), ("assistant", "c")])
"""Conversations of which a template takes one at least."""


def chat_settings(config: PackConfig) -> dict[str, Any] | None:
    """templates, arguments, date, train_on of a pack of conversations; None for one of other documents."""
    if config.messages_field is None:
        return None
    theirs, failure = transformers_tokenizer(Path(config.tokenizer))
    if theirs is None:
        raise ValueError(
            f"{config.tokenizer}: transformers cannot load the tokenizer ({failure}), whose special tokens the chat template needs"
        )
    templates = _templates(config, theirs.chat_template)
    for name, template in templates.items():
        _require_template(config, name, template)
    return {
        "templates": templates,
        "arguments": {**theirs.special_tokens_map, **config.template_arguments},
        "date": config.chat_template_date,
        "train_on": config.train_on,
    }


def _templates(config: PackConfig, own: Any) -> dict[str, str]:
    """The templates to use, by name: default, and tool_use where the tokenizer has one."""
    known = own if isinstance(own, dict) else {"default": own} if own else {}
    asked = config.chat_template
    if asked is not None and asked in known:
        return {"default": known[asked]}
    if asked is not None:
        try:
            return {"default": Path(asked).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--chat-template {asked}: cannot be read ({error}); expected a file with a Jinja template"
                + (f", or a template of the tokenizer, one of: {', '.join(known)}" if known else "")
            ) from None
    if "default" not in known:
        has = f"templates called {', '.join(known)} and no default" if known else "no chat template"
        raise ValueError(f"{config.tokenizer}: its tokenizer has {has}; name one with --chat-template")
    return {name: template for name, template in known.items() if name in ("default", "tool_use")}


def _require_template(config: PackConfig, name: str, template: str) -> None:
    """ValueError for what is no template, or lacks the marks that are needed."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from scorer.chat_marks import marks_within, what_draws  # jinja2 costs those nothing who have no conversations

    where = _where(config)
    which = f"chat template ({name})" if name != "default" else "chat template"
    try:
        parsed = _compile_jinja_template(template).environment.parse(template)
    except Exception as error:
        raise ValueError(f"{where}: its {which} is not valid Jinja ({error}); correct it") from None
    if drawn := what_draws(parsed):
        raise ValueError(f"{where}: its {which} uses {drawn}, so the same corpus would give other rows; take that out")
    if config.train_on != "assistant":
        return
    marks = marks_within(parsed)
    if within := next((found for found in marks if found), None):
        raise ValueError(
            f"{where}: its {which} has {{% generation %}} inside {within}, whose text is put together before it is "
            "written, so that other characters would be marked; put the marks around the macro's call, or around what is written"
        )
    if not marks:
        raise ValueError(
            f"{where}: its {which} does not mark what the assistant writes, which --train-on assistant needs; put "
            "{% generation %} and {% endgeneration %} around it in a copy of the template, and give that with --chat-template FILE"
        )


def template_bos(config: PackConfig, settings: dict[str, Any], tokenizer: PackTokenizer) -> bool:
    """Whether the chat template begins a conversation with the tokenizer's BOS, by the first of PROBES that it takes.

    ValueError for a template that asks for a date which the options do not name.
    """
    chat = ChatTemplate(settings)
    conversations = [
        Conversation(_where(config), [{"role": role, "content": text} for role, text in probe]) for probe in PROBES
    ]
    found = next((made for made in map(chat.render, conversations) if isinstance(made, Rendered)), None)
    if tokenizer.beginning_id is None:
        return False
    if found is None:
        return any(re.search(r"\bbos_token\b", template) for template in settings["templates"].values())
    return found.text.startswith(tokenizer.encoder.id_to_token(tokenizer.beginning_id) or "")


def _where(config: PackConfig) -> str:
    """Where the template comes from, for messages."""
    return config.tokenizer if config.chat_template is None else f"--chat-template {config.chat_template}"


def chat_entry(config: PackConfig, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of conversations, under `conversations`; empty for other documents."""
    if settings is None:
        return {}
    digest = hashlib.sha256(json.dumps(settings["templates"], sort_keys=True, ensure_ascii=False).encode())
    one = settings["templates"]["default"] if len(settings["templates"]) == 1 else None
    entry: dict[str, Any] = {
        "messages_field": config.messages_field,
        "tools_field": config.tools_field,
        "train_on": config.train_on,
        # of the template itself, where there is one
        "chat_template_sha256": digest.hexdigest() if one is None else hashlib.sha256(one.encode()).hexdigest(),
    }
    entry |= {"chat_template_args": config.template_arguments} if config.template_arguments else {}
    return entry | ({"chat_template_date": config.chat_template_date} if config.chat_template_date else {})
