"""The card of a dataset of annotated rows, README.md with YAML in front, made of the manifest of its shard folder.

In: a manifest, and what remit verify measured. Out: text. What nobody but the author knows, licence and language above all, is left
to be filled in.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from shards.corpus_file import CorpusFile
from shards.entropy import entropy_columns
from shards.manifest import Manifest
from shards.schema import PREDICT, logprobs_column, sample_column, topk_columns

FILES_SHOWN = 20
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
TO_FILL = "# license: to be filled in\n# language: to be filled in\n"
"""Comments: the hub refuses a card with a licence or language that it does not know."""


def dataset_card(
    manifest: Manifest,
    names: Sequence[str] | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    data_files: str = "data/*.parquet",
    title: str = "Annotated rows",
    tokenizer_folder: str = "tokenizer",
) -> str:
    """README.md of a dataset repository.

    names: references whose columns are there; default all. measured: figures of remit verify --model --json, one for each
    reference that was checked. data_files: glob of the files of the split `train`, relative to the
    repository; tokenizer_folder: where in it the tokenizer's files are. Text that comes
    from elsewhere, names of files and models, is escaped.
    """
    names = tuple(manifest.references) if names is None else tuple(names)
    head: dict[str, Any] = {
        "task_categories": ["text-generation"],
        "tags": ["remit", "token-ids", "log-probabilities"],
        "size_categories": [next((word for bound, word in SIZES if manifest.rows < bound), "n>1B")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}],
    }
    sections = [
        f"# {title}",
        f"{manifest.rows:,} rows of at most {manifest.seq_len:,} token ids, {manifest.tokens:,} tokens in all"
        + (f", each with its log-probability under {_words(names)}." if names else ".")
        + " Made with remit, which scores a corpus once so that training need not.",
        _filled_in(),
        "## Columns",
        _table(("column", "type", "meaning"), _columns(manifest, names)),
        "## References",
        _references(manifest, names, measured) if names else "None: the rows have token ids alone.",
        "## Tokenizer",
        _tokenizer(manifest, tokenizer_folder),
        "## Sources",
        _sources(manifest),
    ]
    return f"---\n{TO_FILL}{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _filled_in() -> str:
    return (
        "**Licence.** Not known to the program that wrote this card: fill in `license` and `language` at its top, and "
        "name the licences of the sources below and the terms of the models that scored them."
    )


def _columns(manifest: Manifest, names: Sequence[str]) -> list[tuple[str, str, str]]:
    meanings = {
        "input_ids": "token ids of a row",
        "doc_lengths": "tokens of each document piece in the row, in order",
        "doc_ids": "number of each piece's document in its source",
        "source": "number of the source, as below",
        PREDICT: "whether training predicts the token",
    }
    for name in names:
        top_ids, top_logprobs = topk_columns(name)
        reference = manifest.references[name]
        meanings[logprobs_column(name)] = (
            "natural log of the reference's probability of the token at the same place, given what precedes it in its "
            f"{'row' if reference['context'] == 'packed' else 'document'}; null where nothing does"
        )
        meanings |= {top_ids: "most probable tokens at each place", top_logprobs: "their log-probabilities"}
        meanings[sample_column(name)] = "tokens drawn from the reference's distribution at each place"
        for column in entropy_columns(name, reference):
            meanings[column] = "entropy of the reference's prediction at each place, in nats" if "entropy" in column else (
                "log partition sum of the reference's prediction at each place"
            )  # fmt: skip
    return [
        (f"`{field.name}`", f"`{_type_name(str(field.type))}`", meanings[field.name])
        for field in manifest.schema
        if field.name in meanings
    ]


def _type_name(arrow: str) -> str:
    """An Arrow type without the names of its items: list<int32>."""
    for word in ("item: ", "element: ", " not null"):
        arrow = arrow.replace(word, "")
    return arrow


def _references(manifest: Manifest, names: Sequence[str], measured: Sequence[Mapping[str, Any]]) -> str:
    by_name = {figures["reference"]: figures for figures in measured}
    lines, notes = [], []
    for name in names:
        reference, step = manifest.references[name], manifest.references[name].get("logprob_step", 0)
        engine = " ".join(str(reference[key]) for key in ("engine", "engine_version") if reference.get(key))
        rounded = f"multiples of {step:g} nat, so at most {step / 2:g} off" if step else "not rounded"
        lines.append((
            f"`{name}`", _code(reference.get("model", "?")), _code(reference.get("revision") or "-"),
            _code((reference.get("weights_sha256") or "-")[:12]), str(reference.get("dtype", "?")), escape(engine or "?"),
            reference["context"], rounded, _error(by_name.get(name)),
        ))  # fmt: skip
        if name not in by_name:
            notes.append(name)
    headers = (
        "name",
        "model",
        "revision",
        "weights, sha256",
        "dtype",
        "engine",
        "context",
        "stored as",
        "measured error",
    )
    text = _table(headers, lines)
    if by_name:
        text += (
            "\n\nThe measured error is that of the stored log-probs against a float32 forward of the same model by transformers, over "
            "rows drawn at random."
        )
    if notes:
        text += f"\n\nNot measured: {_words(notes)}. `remit verify SHARDS --model MODEL --json FILE` measures it."
    return text


def _error(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "not measured"
    share = figures.get("weights_changed")
    return (
        f"mean {figures['mean']:.4f}, largest {figures['max']:.4f} nat over {figures['tokens']:,} tokens of "
        f"{figures['rows']:,} rows" + ("" if share is None else f"; {share:.2%} of the weights move by more than 0.02")
    )


def _tokenizer(manifest: Manifest, folder: str) -> str:
    tokenizer = manifest.tokenizer
    lines = [
        ("ids", f"0..{tokenizer['vocab_size'] - 1}"),
        ("fingerprint", _code(tokenizer.get("fingerprint", "?")[:16])),
        ("a document ends with", f"{_code(tokenizer.get('eos_token', 'EOS'))} ({tokenizer['eos_token_id']})"),
    ]
    if tokenizer.get("model"):
        origin = f"{tokenizer['model']}@{tokenizer['revision']}" if tokenizer.get("revision") else tokenizer["model"]
        lines.insert(0, ("model", _code(origin)))
    if tokenizer.get("bos_token_id") is not None:
        lines.append(("a document begins with", f"{_code(tokenizer['bos_token'])} ({tokenizer['bos_token_id']})"))
    return _table(("", ""), lines) + f"\n\nIts files are in `{folder}/`."


def _sources(manifest: Manifest) -> str:
    shown = manifest.corpus[:FILES_SHOWN]
    lines = [(str(index), _code(file.path), _digest(file), f"{file.documents_packed:,}", f"{file.rows:,}", f"{file.tokens:,}")
        for index, file in enumerate(shown)]  # fmt: skip
    text = _table(("source", "file or dataset", "sha256", "documents", "rows", "tokens"), lines)
    if len(manifest.corpus) > len(shown):
        text += f"\n\nand {len(manifest.corpus) - len(shown):,} more, as the manifest lists them."
    counts = ", ".join(f"{kind} {count:,}" for kind, count in manifest.documents.items())
    text += f"\n\nDocuments: {counts}."
    for selection in manifest.selections:
        text += (
            f"\n\nRows were selected by {escape(str(selection.get('method')))}: {selection['rows_kept']:,} of "
            f"{selection['rows_read']:,} kept."
        )
    if manifest.conversations:
        text += f"\n\nDocuments are conversations: {_code(json.dumps(manifest.conversations, ensure_ascii=False))}."
    return text + f"\n\nThe manifest of the shards has sha256 `{manifest.checksum}`."


def _digest(file: CorpusFile) -> str:
    return _code(file.sha256[:12]) if file.sha256 else "-"


def _words(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line, also in a cell of a table."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for character in "\\`*_[]#|~":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: object) -> str:
    """Text from elsewhere as code; where it has what would end that, escaped instead."""
    plain = str(text)
    return (
        f"`{plain}`"
        if plain.isprintable() and plain.strip() == plain != "" and not set("`|") & {*plain}
        else escape(plain)
    )
