"""Settings of remit pack, checked once. Light to import, so that --help answers at once."""

import json
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from scorer.fields import Fields
from shards.output_folder import require_new_folder
from shards.ranges import require_at_least, require_not_negative

OF_THE_TEMPLATE = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "strftime_now",
    "conversations",
    "chat_template",
)
TOKENS_PER_BATCH = 1 << 18  # of an Arrow record batch: what a reader decompresses at once


def parse_template_args(entries: list[str]) -> dict[str, Any]:
    """{key: value} of KEY=VALUE entries; a value is JSON where it can be read as such, else a string."""
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not (key.isidentifier() and equals):
            raise ValueError(
                f"--chat-template-args has {entry!r}, expected KEY=VALUE, for instance enable_thinking=false"
            )
        if key in found or key in OF_THE_TEMPLATE or key.startswith(("return_", "continue_")):
            what = "twice, expected each key once" if key in found else "which is not to be set"
            raise ValueError(f"--chat-template-args has {key} {what}")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return found


@dataclass(frozen=True)
class PackConfig:
    """Tokenise a corpus and cut it into rows of seq_len tokens."""

    corpus: list[str]
    """Files, globs or folders (.jsonl, .ndjson or .json with an object a line, also with .gz, .zst, .bz2 or .xz behind
    it; .parquet; .arrow; token ids as OLMo-core's .npy, Megatron's .bin with .idx, datatrove's .ds with .ds.index; in
    any case); or datasets: of the Hugging Face hub as NAME[@REVISION][:CONFIG[:SPLIT]], of a local
    folder as FOLDER:[CONFIG][:SPLIT]. The split is train unless named."""
    tokenizer: str
    """Folder of the model's fast tokenizer, or NAME or NAME@REVISION of the hub."""
    out: str
    """Shard folder to write."""
    seq_len: int = 4096
    """Tokens per row."""
    text_field: str = "text"
    """Field or column that holds the text."""
    template: str | None = None
    r"""Text of several fields instead: '{question}\n{answer}'. {{ and }} are braces, a dot leads into an object
    ({meta.title}), \n, \t and \\ are a line break, a tab and a backslash."""
    tokens_field: str | None = None
    """Column of token ids, such as input_ids, to take instead of text; of tables, datasets and JSON lines."""
    tokens_dtype: Literal["auto", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"] = "auto"
    """Of the ids in .npy, .bin and .ds; auto: what the file or its index says, else the smallest that the tokenizer's ids
    fit in."""
    on_missing_eos: Literal["auto", "append", "stop"] = "auto"
    """A document of token ids without EOS at its end: put one there and count it, or stop; auto: stop where nothing but EOS
    says where documents end (.npy without .csv.gz)."""
    keep_fields: str | None = None
    """Fields or columns to keep beside the rows, by document: url,score. remit inspect shows them."""
    messages_field: str | None = None
    """Field or column that holds a conversation, as a list of messages with role and content, in the place of a text; the
    tokenizer's chat template makes its text."""
    tools_field: str = "tools"
    """With --messages-field: field or column with the tools of a conversation, where it has any."""
    train_on: Literal["all", "assistant"] = "all"
    """With --messages-field: what training predicts of a conversation; assistant: what the chat template puts between
    {% generation %} and {% endgeneration %}."""
    chat_template: str | None = None
    """With --messages-field: file with a chat template in the place of the tokenizer's own, or the name of one of several
    that it has."""
    chat_template_args: list[str] = field(default_factory=list)
    """KEY=VALUE pairs that the chat template gets beside the messages, for instance enable_thinking=false."""
    chat_template_date: str | None = None
    """Day, as 2025-01-31, for a chat template that puts today's date into the text."""
    packing: Literal["concat", "best-fit"] = "concat"
    """concat: documents end to end, cut wherever a row is full. best-fit: each row begins with a document, documents that
    fit into a row are not cut, and rows may be short."""
    tokens_per_shard: int = 1 << 22
    """Tokens per part; a part is what is lost at most when a scoring engine dies."""
    num_workers: int | None = None
    """Corpus files tokenised at once; default: one per CPU of the Ray cluster."""
    special_tokens: Literal["parse", "text"] = "parse"
    """Text that spells a special token, such as the end of text: parse it to its id as transformers does, or
    encode it as ordinary text."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin each document, and each row that begins inside one, with the tokenizer's BOS; auto: where the tokenizer's own
    call puts it in front of a text, as of Gemma, Llama 3 and Mistral; of token ids where the documents begin with it."""
    on_bad_document: Literal["stop", "reject"] = "stop"
    """A document that is not valid JSON, lacks the field or is not Unicode: stop, or leave it out and count it."""
    on_bad_file: Literal["stop", "reject"] = "stop"
    """A file that is cut off, damaged or not what its suffix says: stop, or leave it out whole and record why."""
    grace_seconds: float = 60.0
    """After SIGTERM or SIGINT: how long what runs may take to end."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks and what the workers print."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(
                f"--seq-len is {self.seq_len}, expected at least 2: one-token rows have nothing to predict"
            )
        if self.tokens_per_shard < self.seq_len:
            raise ValueError(
                f"--tokens-per-shard is {self.tokens_per_shard}, expected at least --seq-len ({self.seq_len})"
            )
        require_not_negative(self, "grace_seconds")
        require_at_least(self, 1, "num_workers")
        if self.template is not None and (self.text_field != "text" or self.tokens_field is not None):
            other = "--tokens-field" if self.tokens_field is not None else "--text-field"
            raise ValueError(f"--template and {other} are both given, expected one of them")
        if self.tokens_field is not None and self.text_field != "text":
            raise ValueError("--tokens-field and --text-field are both given, expected one: ids or text")
        if self.tokens_field == "":
            raise ValueError("--tokens-field is empty, expected the name of a column")
        for name in ("", *self.kept_fields[:-1]):
            if self.keep_fields is not None and self.kept_fields.count(name) > (name != ""):
                raise ValueError(
                    f"--keep-fields is {self.keep_fields!r}, expected names with commas between, each once"
                )
        _ = self.fields.names
        for name in {"_source", "_doc_id"} & set(self.kept_fields):
            raise ValueError(f"--keep-fields has {name!r}, which names a column of the table itself; leave it out")
        if not self.corpus:
            raise ValueError("--corpus is empty, expected at least one file, folder or dataset name")
        for entry in self.corpus:
            require_new_folder(self.out, "remit pack", corpus=entry)
        self._check_conversations()

    def _check_conversations(self) -> None:
        if self.messages_field is None:
            for name in ("tools_field", "train_on", "chat_template", "chat_template_args", "chat_template_date"):
                if getattr(self, name) not in ("tools", "all", None, []):
                    option = f"--{name.replace('_', '-')}"
                    raise ValueError(
                        f"{option}: is about conversations; name the field that holds them with --messages-field"
                    )
            return
        for name in ("template", "tokens_field"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} and --messages-field are both given, expected one of them"
                )
        if self.text_field != "text":
            raise ValueError(
                "--text-field and --messages-field: expected one of them, documents are texts or conversations"
            )
        if self.special_tokens == "text":
            raise ValueError(
                "--special-tokens text: the chat template writes special tokens as text, which must become their ids; leave it "
                "at parse with --messages-field"
            )
        if self.chat_template_date is not None:
            try:
                date.fromisoformat(self.chat_template_date)
            except ValueError:
                raise ValueError(
                    f"--chat-template-date is {self.chat_template_date!r}, expected a day as 2025-01-31"
                ) from None
        _ = self.template_arguments

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        return parse_template_args(self.chat_template_args)

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """Names of --keep-fields."""
        return () if self.keep_fields is None else tuple(name.strip() for name in self.keep_fields.split(","))

    @property
    def fields(self) -> Fields:
        """What to read of a record."""
        name = self.tokens_field or self.messages_field or self.text_field
        return Fields(name, self.template, self.kept_fields)

    @property
    def rows_per_part(self) -> int:
        return self.tokens_per_shard // self.seq_len

    @property
    def rows_per_batch(self) -> int:
        return max(1, min(self.rows_per_part, TOKENS_PER_BATCH // self.seq_len))
