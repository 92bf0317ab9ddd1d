"""The plan of remit pack: which rows stand in which part, made of what was staged; and is it the plan of a folder?

In: the records of the staged corpus files. Out: the manifest.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from scorer.best_fit import decode_lengths
from scorer.config import PackConfig
from scorer.known import hashes_now
from scorer.sources import Source
from scorer.tokenizer import PackTokenizer
from scorer.vocabulary import hashes
from shards.folder import ShardFolder
from shards.manifest import CorpusFile, Manifest, PartPlan, part_name
from shards.output_folder import instead_of, refuse_other
from shards.packing import METHOD, Window

OPTIONS = {
    "seq_len": "--seq-len",
    "tokens_per_shard": "--tokens-per-shard",
    "tokenizer.special_tokens": "--special-tokens",
    "keep_fields": "--keep-fields",
    "template": "--template",
    "tokens_field": "--tokens-field",
    "tokens_dtype": "--tokens-dtype",
    "packing": "--packing",
    "conversations": "--messages-field",
    "conversations.messages_field": "--messages-field",
    "conversations.tools_field": "--tools-field",
    "conversations.chat_template_args": "--chat-template-args",
    "conversations.chat_template_date": "--chat-template-date",
    "conversations.train_on": "--train-on",
    "conversations.chat_template_sha256": "--chat-template",
}
"""What a user calls fields of a pack."""
NOTED_SHARE = 0.01  # of unknown tokens, of documents that do not come back


def reading(config: PackConfig) -> dict[str, str]:
    """What the manifest says of how records were read, where it is not one field of text."""
    asked = {"template": config.template, "tokens_field": config.tokens_field}
    if config.tokens_dtype != "auto":
        asked["tokens_dtype"] = config.tokens_dtype
    return {name: value for name, value in asked.items() if value is not None}


def plan_parts(
    config: PackConfig, staged: list[dict], tokenizer: dict, conversations: dict[str, Any] | None = None
) -> Manifest:
    """Cut the rows of all sources, end to end, into parts of rows_per_part. conversations: as the manifest has it."""
    files = tuple(CorpusFile(**record["file"]) for record in staged)
    if not any(file.rows for file in files):
        read = sum(file.documents_read for file in files)
        rejected = sum(file.documents_rejected for file in files)
        causes = (why for record in staged for why in (*record["rejected"], record["file"]["left_out"]) if why)
        example = next(causes, "")
        raise ValueError(
            f"the corpus is empty: {len(files)} file(s), {read} documents read, none with text ({rejected} rejected"
            + (f", for instance {example}" if example else "")
            + "); check --corpus and --text-field"
        )
    parts = _best_fit_parts(config, staged) if config.packing == METHOD else _full_parts(config, files)
    if not any(file.predicted_tokens for file in files):
        raise ValueError(
            f"none of {sum(file.tokens for file in files):,} tokens is to be predicted; look whether the conversations have answers "
            "of the assistant, and the chat template its {% generation %} marks around them"
        )
    predict = any(file.predicted_tokens != file.tokens for file in files)
    if not predict:
        files = tuple(replace(file, predicted_tokens=None) for file in files)
    return Manifest(
        config.seq_len, config.rows_per_part, config.rows_per_batch, tokenizer, files, parts,
        predict=predict, packing=packing_entry(config), conversations=conversations or {},
    )  # fmt: skip


def packing_entry(config: PackConfig) -> dict[str, Any]:
    """What the manifest says of how documents share rows; empty where they are laid end to end."""
    return Window().entry() if config.packing == METHOD else {}


def _best_fit_parts(config: PackConfig, staged: list[dict]) -> tuple[PartPlan, ...]:
    """Parts whose rows may be short."""
    lengths = np.concatenate([decode_lengths(record["row_lengths"]) for record in staged])
    firsts = range(0, len(lengths), config.rows_per_part)
    pieces = [lengths[first : first + config.rows_per_part] for first in firsts]
    return tuple(PartPlan(part_name(index), len(rows), int(rows.sum())) for index, rows in enumerate(pieces))


def _full_parts(config: PackConfig, files: tuple[CorpusFile, ...]) -> tuple[PartPlan, ...]:
    """Rows are full but for the last one of each file, so a part's tokens follow from its rows alone."""
    last_row = np.cumsum([file.rows for file in files]) - 1
    short_by = np.cumsum([file.rows * config.seq_len - file.tokens for file in files])
    num_rows = int(last_row[-1]) + 1
    parts: list[PartPlan] = []
    for first in range(0, num_rows, config.rows_per_part):
        rows = min(config.rows_per_part, num_rows - first)
        low, high = np.searchsorted(last_row, [first, first + rows])
        missing = short_by[high - 1] - (short_by[low - 1] if low else 0) if high > low else 0
        parts.append(PartPlan(part_name(len(parts)), rows, int(rows * config.seq_len - missing)))
    return tuple(parts)


def say_what_changed(staged: list[dict], note: Callable[[str], None]) -> None:
    """Notes where more than 1 % of the sampled documents do not come back from their rows, or of the tokens are unknown."""
    files = [record["file"] for record in staged]
    sampled, changed, tokens, unknown = (
        sum(file[name] for file in files)
        for name in ("documents_sampled", "documents_changed", "tokens", "unknown_tokens")
    )
    if changed > NOTED_SHARE * sampled:
        path, (document, how) = next((r["file"]["path"], r["changed"]) for r in staged if r["changed"])
        note(
            f"{changed:,} of {sampled:,} sampled documents do not decode to what they were ({changed / sampled:.1%}), for "
            f"instance document {document} of {path}: {how}; the tokenizer changes or drops what it cannot spell"
        )
    if unknown > NOTED_SHARE * tokens:
        note(
            f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.1%}) are the unknown one: the tokenizer cannot spell "
            "this text"
        )


def say_what_was_added(staged: list[dict], note: Callable[[str], None]) -> None:
    """A note where documents of token ids had no EOS."""
    added = [(record["file"]["path"], record["file"]["eos_added"]) for record in staged if record["file"]["eos_added"]]
    if added:
        total = sum(count for _, count in added)
        documents, files = "document" if total == 1 else "documents", "file" if len(added) == 1 else "files"
        note(
            f"{total:,} {documents} of {len(added):,} {files} of token ids did not end in EOS, so pack put one there, for instance "
            f"{added[0][1]:,} of {added[0][0]}; --on-missing-eos stop refuses them"
        )


def refuse_other_plan(
    config: PackConfig,
    folder: ShardFolder,
    sources: list[Source],
    description: dict,
    tokenizer: PackTokenizer,
    conversations: dict[str, Any],
) -> None:
    """ValueError where `folder` was packed from something else than is asked for now."""
    manifest = folder.manifest
    packed = {name: value for name, value in manifest.tokenizer.items() if name in description}
    if "files" not in manifest.tokenizer:  # of an earlier release, which put no BOS
        description = {name: description[name] for name in [*packed, "bos_token_id"]}
        packed["bos_token_id"] = None
    else:  # what its fingerprint leaves out: normalisation, the splitting into words
        packed["tokenizer.json"] = manifest.tokenizer["files"].get("tokenizer.json")
        description = description | {"tokenizer.json": hashes(tokenizer.files)["tokenizer.json"]}
    corpus: list[dict] = [{"path": file.path, "size": file.size} for file in manifest.corpus]
    asked: list[dict] = [{"path": source.name, "size": source.size()} for source in sources]
    if corpus == asked:  # names and sizes alone do not tell
        hashes_then = [file.sha256 for file in manifest.corpus]
        for ours, theirs, now, then in zip(asked, corpus, hashes_now(config.out, sources, hashes_then), hashes_then):
            ours["sha256"], theirs["sha256"] = now, then
        for ours, theirs, source, file in zip(asked, corpus, sources, manifest.corpus):
            ours["beside"], theirs["beside"] = source.sha256_beside(), file.beside
    ours = {"seq_len": config.seq_len, "tokens_per_shard": config.tokens_per_shard}
    theirs = {"seq_len": manifest.seq_len, "tokens_per_shard": manifest.rows_per_part * manifest.seq_len}
    ours_read, theirs_read = reading(config), manifest.reading
    if (manifest.seq_len, manifest.rows_per_part) == (config.seq_len, config.rows_per_part):  # a part has whole rows
        ours = {"seq_len": config.seq_len, "rows_per_batch": config.rows_per_batch}
        theirs = {"seq_len": manifest.seq_len, "rows_per_batch": manifest.rows_per_batch}
    ours |= {"packing": config.packing, "conversations": conversations}
    theirs |= {"packing": manifest.packing.get("method", "concat"), "conversations": manifest.conversations}
    refuse_other(
        str(folder.path),
        "pack",
        {
            **ours,
            **ours_read,
            "keep_fields": sorted(config.kept_fields),
            "tokenizer": description,
            "corpus": asked,
            "references": [],
        },
        {
            **theirs,
            **theirs_read,
            "keep_fields": sorted(manifest.kept_fields),
            "tokenizer": packed,
            "corpus": corpus,
            "references": sorted(manifest.references),
        },
        instead_of(folder),
        OPTIONS,
    )
