"""The frozen plan of a shard folder and where its numbers come from: `_manifest.json`.

Written before any part. Its first line holds the sha256 of all that follows, so a flipped bit is an error. The
provenance also stands in the schema metadata of every part, there with the corpus files that the part has rows
of, so that a part found alone still says what it is.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from shards.corpus_file import CorpusFile
from shards.entropy import entropy_columns, is_temperature
from shards.packing import Window
from shards.part import publish_json
from shards.record import checksum_of, with_checksum
from shards.schema import CONTEXTS, logprobs_column, row_schema
from shards.side_table import TYPES
from shards.store import Store, open_store

FORMAT = "remit-shards"
FORMAT_VERSION = 2
FORMAT_VERSIONS = (1, 2)
MANIFEST = "_manifest.json"
_PART_NAME = re.compile(r"part-\d{5,}\.arrow")


def part_name(index: int) -> str:
    """File name of part `index`; names sort in corpus order."""
    return f"part-{index:05d}.arrow"


@dataclass(frozen=True)
class PartPlan:
    """A part as planned: file name, rows, tokens."""

    name: str
    rows: int
    tokens: int

    def entry(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Manifest:
    """Plan and provenance of a shard folder.

    rows_per_part, rows_per_batch: rows of every part but the last, and of every record batch of a part
    but its last; so a reader knows the place of each row without opening the parts.
    tokenizer: fingerprint, vocab_size (largest id + 1), special_tokens ("parse" or "text"), eos_token and eos_token_id,
    which end each document; bos_token and bos_token_id, with which each document piece of a row begins, None where none
    was put there; files: sha256 of each file in _tokenizer/; added_tokens: how often each of
    those that occur does; model and revision where it came from the hub. Folders of earlier releases have fingerprint, eos_token_id, vocab_size, special_tokens.
    references: per name its model name, revision, weights_sha256, dtype, engine, engine_version,
    engine_distribution, device, head_dtype (these three are missing in older ones), tensor_parallel_size, context, logprob_step, top_k where its most probable tokens are stored, sample_k where tokens drawn from it are,
    top_k_below_entropy where they are only at an entropy of at most so many nats (top_k_quantile: how that was estimated), and
    entropy (true) where its entropy is, with entropy_temperature where it is at another temperature too.
    selections: by which rule rows of the packed corpus were kept, oldest first: method, rows_read, rows_unscored,
    rows_kept, source_manifest_sha256, and what else the method says (scorer/select.py).
    passed_over: files of the corpus folders that were not read, counted by suffix or what else they are.
    reading: what of a record was packed where it is not one field of text: template, or tokens_field; tokens_dtype.
    kept_fields: names and kinds of the fields that are kept beside the rows.
    format_version: 2 where commit records have the sums of what readers read, 1 where they have that of the whole part.
    packing: how documents share rows, as shards/packing.py has it; empty where they are laid end to end.
    conversations: how documents became text where they are conversations: messages_field, tools_field, train_on,
    chat_template_sha256, chat_template_args and chat_template_date where there are any; empty for other documents.
    predict: whether the rows have the column that says what is to be predicted; without it everything is.
    """

    seq_len: int
    rows_per_part: int
    rows_per_batch: int
    tokenizer: dict[str, Any]
    corpus: tuple[CorpusFile, ...]
    parts: tuple[PartPlan, ...]
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    selections: tuple[dict[str, Any], ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict)
    reading: dict[str, str] = field(default_factory=dict)
    kept_fields: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    predict: bool = False
    packing: dict[str, Any] = field(default_factory=dict)
    conversations: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def unused_positions(self) -> int:
        """How many more tokens the rows could have."""
        return self.rows * self.seq_len - self.tokens

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of every part, without metadata; references in the order of their names, as JSON has them."""
        return row_schema(
            sorted(self.references),
            {name: entry.get("top_k", 0) for name, entry in self.references.items()},
            {name: entropy_columns(name, entry) for name, entry in self.references.items()},
            self.predict,
            {name: entry.get("sample_k", 0) for name, entry in self.references.items()},
        )

    @cached_property
    def documents(self) -> dict[str, int]:
        """Document counts over the whole corpus: read = packed + empty + rejected."""
        kinds = ("read", "packed", "empty", "rejected")
        return {kind: sum(getattr(file, f"documents_{kind}") for file in self.corpus) for kind in kinds}

    def provenance(self) -> dict[str, Any]:
        """All but the list of parts, as a JSON object."""
        return {**self._common(), "corpus": [file.entry() for file in self.corpus]}

    def _common(self) -> dict[str, Any]:
        common = {
            "format": FORMAT,
            "format_version": self.format_version,
            "documents": self.documents,
            "num_parts": len(self.parts),
            "seq_len": self.seq_len,
            "rows_per_part": self.rows_per_part,
            "rows_per_batch": self.rows_per_batch,
            # what a tokenizer is before what its files are: a difference is named by the first field that has one
            "tokenizer": dict(sorted(self.tokenizer.items(), key=lambda item: item[0] != "fingerprint")),
            "references": self.references,
        }
        # only where there are any, so that other folders keep their bytes
        common |= {"selections": list(self.selections)} if self.selections else {}
        common |= {"predict": True} if self.predict else {}
        common |= {"packing": self.packing | {"unused_positions": self.unused_positions}} if self.packing else {}
        optional = {name: getattr(self, name) for name in ("conversations", "passed_over", "reading", "kept_fields")}
        return common | {name: value for name, value in optional.items() if value}

    def _text(self) -> str:
        """The JSON text from its second line on; corpus files and parts one a line."""
        head = json.dumps(self._common(), indent=1, ensure_ascii=False, sort_keys=True).removeprefix("{\n")
        lists = {"corpus": [file.entry() for file in self.corpus], "parts": [vars(part) for part in self.parts]}
        lines = [head.removesuffix("\n}")]
        for name, entries in lists.items():
            inner = ",\n".join("  " + json.dumps(entry, ensure_ascii=False, sort_keys=True) for entry in entries)
            lines.append(f' "{name}": [\n{inner}\n ]')
        return ",\n".join(lines) + "\n}\n"

    @cached_property
    def checksum(self) -> str:
        """sha256 of the manifest file from its second line on; every part carries it."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """Row at which each corpus file begins, and the number of rows: int64 [files + 1]."""
        return np.cumsum([0, *(file.rows for file in self.corpus)])

    def part_metadata(self, index: int) -> dict[str, Any]:
        """Schema metadata of part `index`: the provenance, with only those corpus files that it has rows of."""
        first = index * self.rows_per_part
        last = first + self.parts[index].rows - 1
        low, high = np.searchsorted(self._first_rows, [first, last], side="right") - 1
        files = [{"source": source, **self.corpus[source].entry()} for source in range(low, high + 1)]
        files = [file for file in files if file["rows"]]
        return {**self._common(), "corpus": files, "part": self.parts[index].name, "manifest_sha256": self.checksum}

    def write(self, folder: Store | Path | str) -> None:
        """Freeze this plan in `folder`. ValueError where another plan is frozen there already."""
        publish_json(open_store(folder), MANIFEST, with_checksum(self._text()), "manifest")

    @classmethod
    def read(cls, folder: Store | Path | str) -> "Manifest":
        """Read and check the manifest of `folder`; ValueError says what is wrong with it."""
        store = open_store(folder)
        if store.local and not store.local.is_dir():
            raise ValueError(f"{store.url}: no such folder; give the folder that remit pack or remit score wrote")
        path = store.where(MANIFEST)
        try:
            data = store.read(MANIFEST)
        except FileNotFoundError:
            raise ValueError(
                f"{store.url}: has no {MANIFEST}, so it is not a shard folder (or its writing never began); "
                "give the folder that remit pack or remit score wrote"
            ) from None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); restore it or write the folder again") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"{path}: format is not {FORMAT!r}; this is not a remit shard folder")
        if type(value.get("format_version")) is not int or value["format_version"] not in FORMAT_VERSIONS:
            raise ValueError(
                f"{path}: format version {value.get('format_version')!r}, this program reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; use the release of remit that wrote the folder"
            )
        try:
            manifest = cls(
                seq_len=value["seq_len"],
                rows_per_part=value["rows_per_part"],
                rows_per_batch=value["rows_per_batch"],
                tokenizer=dict(value["tokenizer"]),
                corpus=tuple(CorpusFile(**file) for file in value["corpus"]),
                parts=tuple(PartPlan(**part) for part in value["parts"]),
                references={name: dict(reference) for name, reference in value["references"].items()},
                selections=tuple(dict(selection) for selection in value.get("selections", [])),
                passed_over=dict(value.get("passed_over", {})),
                reading=dict(value.get("reading", {})),
                kept_fields=dict(value.get("kept_fields", {})),
                format_version=value["format_version"],
                predict=value.get("predict", False),
                packing={key: x for key, x in value.get("packing", {}).items() if key != "unused_positions"},
                conversations=dict(value.get("conversations", {})),
            )
            manifest._check()
            common = manifest._common()
            if {key: value[key] for key in common} != common:
                raise ValueError("its counts do not agree with each other")
            sha256 = checksum_of(data)
            if sha256 is None or {*value} != {*common, "checksum", "corpus", "parts"}:
                raise ValueError("its checksum does not fit its content")
            vars(manifest)["checksum"] = sha256  # not by writing 100,000 parts down again
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); restore it or write the folder again") from None
        return manifest

    def _check(self) -> None:
        for name in ("seq_len", "rows_per_part", "rows_per_batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive integer")
        if not isinstance(self.predict, bool):
            raise ValueError(f"predict is {self.predict!r}, expected true or false")
        if self.packing:
            Window.of(self.packing)
        for part in self.parts[:-1]:
            if part.rows != self.rows_per_part:
                raise ValueError(f"{part.name} has {part.rows} rows, expected rows_per_part = {self.rows_per_part}")
        names = [part.name for part in self.parts]
        for name in names:
            if not _PART_NAME.fullmatch(name):
                raise ValueError(f"part name {name!r} is not of the form part-00000.arrow")
        if len({*names}) != len(names):
            raise ValueError("part names repeat")
        for name in self.tokenizer.get("files", {}):
            if not name or name.startswith(".") or PurePosixPath(name).name != name or "\\" in name:
                raise ValueError(f"tokenizer file {name!r} is not a name in _tokenizer")
        for file in self.corpus:
            pure = PurePosixPath(file.path)
            if pure.is_absolute() or ".." in pure.parts:
                raise ValueError(f"corpus path {file.path!r} is not relative")
            if file.left_out and (file.documents_read or file.rows):
                raise ValueError(f"corpus file {file.path!r} was left out and has {file.documents_read} documents")
        for total in ("rows", "tokens"):
            planned, packed = getattr(self, total), sum(getattr(file, total) for file in self.corpus)
            if planned != packed:
                raise ValueError(f"{planned} {total} in parts, {packed} in corpus files")
        for name, reference in self.references.items():
            logprobs_column(name)
            if reference.get("context") not in CONTEXTS:
                raise ValueError(f"reference {name}: context is {reference.get('context')!r}")
            for key in ("top_k", "sample_k", "vocab_size"):
                value = reference.get(key, 0)
                if not isinstance(value, int) or not 0 <= value < 1 << 31:  # the size of an Arrow list is an int32
                    raise ValueError(f"reference {name}: {key} is {value!r}")
            if reference.get("sample_k") and not reference.get("vocab_size"):
                raise ValueError(f"reference {name}: sample_k is {reference['sample_k']!r} without a vocab_size")
            _check_entropy(name, reference)
            _check_below_entropy(name, reference)
        twice = [name for name in self.schema.names if self.schema.names.count(name) > 1]
        if twice:
            raise ValueError(f"two references have a column {twice[0]}")
        if unknown := sorted(set(self.kept_fields.values()) - set(TYPES)):
            raise ValueError(f"a kept field is of kind {unknown[0]!r}, expected one of {', '.join(TYPES)}")
        kept = [selection["rows_kept"] for selection in self.selections]
        read = [selection["rows_read"] for selection in self.selections]
        if kept != [*read[1:], self.rows][: len(kept)]:
            raise ValueError(f"selections kept {kept} rows, expected {[*read[1:], self.rows]}")


def _check_entropy(name: str, reference: dict[str, Any]) -> None:
    entropy, temperature = reference.get("entropy", False), reference.get("entropy_temperature")
    if not isinstance(entropy, bool) or (entropy and not reference.get("vocab_size")):
        raise ValueError(f"reference {name}: entropy is {entropy!r} with vocab_size {reference.get('vocab_size')!r}")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (entropy and is_number and is_temperature(temperature)):
        raise ValueError(f"reference {name}: entropy_temperature is {temperature!r}")


def _check_below_entropy(name: str, reference: dict[str, Any]) -> None:
    threshold = reference.get("top_k_below_entropy")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and threshold >= 0
    if threshold is not None and not (is_number and reference.get("entropy") and reference.get("top_k")):
        raise ValueError(f"reference {name}: top_k_below_entropy is {threshold!r}")
