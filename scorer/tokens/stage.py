"""How a task of remit pack reads a source of token ids, by the settings of the pack.

In: a source and the settings. Out: its documents, ready for the rows.
"""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from scorer.conversations import ConversationFields
from scorer.fields import Fields
from scorer.sources import Source
from scorer.tokens.documents import Found, Ready, Rules, make_ready
from scorer.tokens.read import Reading, is_token_file, marks_ends, read_tokens


def fields_of(settings: dict) -> Fields | ConversationFields:
    """What is read of a record."""
    kept = tuple(settings.get("keep_fields", ()))
    if settings.get("chat") is not None:
        messages, tools = settings["conversation_fields"]
        return ConversationFields(messages, tools, kept)
    name = settings.get("tokens_field") or settings["text_field"]
    return Fields(name, settings.get("template"), kept)


def missing_eos_of(source: Source, option: str) -> str:
    """What becomes of a document without EOS: as --on-missing-eos says, with auto made append or stop where the format of a
    file tells which; rows of a table tell only by themselves."""
    if option != "auto" or not is_token_file(source):
        return option
    return "append" if marks_ends(source) else "stop"


def ready_blocks(
    source: Source, settings: dict, encoder: Tokenizer, found: Found, window: int
) -> Iterator[tuple[Ready, int]]:
    """The documents of a source of token ids that are packed, and how many bytes of it were read."""
    description = settings["tokenizer"]
    ids = np.array(sorted(encoder.get_vocab(with_added_tokens=True).values()))
    vocabulary, unknown = int(ids[-1]) + 1, np.setdiff1d(np.arange(ids[-1]), ids)
    eos, bos = description["eos_token_id"], description["bos_token_id"]
    rules = Rules(
        source.where, vocabulary, unknown, eos, bos, settings["own_bos"], settings["bos"],
        missing_eos_of(source, settings["on_missing_eos"]), settings["on_bad_document"], is_token_file(source),
    )  # fmt: skip
    reading = Reading(
        settings.get("tokens_field"), settings["tokens_dtype"], vocabulary, eos, tuple(settings.get("keep_fields", ()))
    )
    for block in read_tokens(source, reading, window):
        yield make_ready(block, rules, found), block.position
