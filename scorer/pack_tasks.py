"""The Ray tasks of remit pack: tokenise a corpus file into a staging file, copy a part out of staging files.

A staging file holds the rows of one corpus file (`source-00000.arrow`); its record (`source-00000.json`)
is written last and says what it was made from, so that a rerun can take it or make it again.
Light to import: no torch, no transformers, because every worker process pays for it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from scorer.ahead import ahead
from scorer.conversations import ChatTemplate
from scorer.corpus import BadFile, read_documents
from scorer.decompress import window_of_each
from scorer.encode import encode_documents, may_mask
from scorer.kept_fields import KeptFields, staged_name
from scorer.roundtrip import DocumentSample
from scorer.sources import Source
from scorer.staged_rows import StagedRows
from scorer.tokens.documents import Found, one_by_one
from scorer.tokens.read import holds_tokens, may_have_mask
from scorer.tokens.stage import fields_of, ready_blocks
from shards.crash import crash_point
from shards.folder import ShardFolder
from shards.lease import check_fence
from shards.manifest import CorpusFile
from shards.part import encode_json, read_record, sha256_file, write_part
from shards.schema import PREDICT, list_array, list_lengths
from shards.store import Store


@lru_cache(maxsize=2)
def _encoder(tokenizer_json: str, special_tokens: str) -> Tokenizer:
    encoder = Tokenizer.from_str(tokenizer_json)
    encoder.no_truncation()  # a tokenizer.json may carry both, and documents must stay whole
    encoder.no_padding()
    encoder.encode_special_tokens = special_tokens == "text"
    return encoder


def _until_bad_file(batches: Iterator[Any], left_out: list[str]) -> Iterator[Any]:
    """`batches` up to where the file turns out to be bad, with the reason added to `left_out`."""
    try:
        yield from batches
    except BadFile as error:
        left_out.append(error.reason)


def _ids(encoder: Tokenizer) -> int:
    """One more than the largest id."""
    return max(encoder.get_vocab(with_added_tokens=True).values()) + 1


def stage_source(
    source: Source,
    index: int,
    staging: Store,
    tokenizer_json: str,
    settings: dict,
    threads: int,
    out: Store | None = None,
    lease: tuple[int, str] = (0, ""),
) -> Iterator[dict]:
    """Ray task: tokenise one source into staging/source-00000.arrow; yields its progress, at last its record.

    It ends with LeaseLost soon after its driver gave the folder `out` back, or lost it. It is not cancelled:
    Ray 2.60 ends the driver's process where a task is done while its cancellation is on its way.
    """
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's, read when it first encodes
    final, record_name = f"source-{index:05d}.arrow", f"source-{index:05d}.json"
    size, version, sha256, beside = source.size(), source.version(), source.sha256(), source.sha256_beside()
    key: dict[str, Any] = {"path": source.name, "size": size, "sha256": sha256}
    key |= {"beside": beside} if beside else {}
    recorded = {
        name: value for name, value in settings.items() if name != "added_tokens"
    }  # of the tokenizer that it names
    if staging.size(record_name) is not None:
        record = json.loads(staging.read(record_name))
        same = record["key"] == key and record["settings"] == recorded and staging.size(final) is not None
        fields_sha256, fields_name = record.get("fields_sha256"), staged_name(index)
        if fields_sha256 and same:
            same = staging.size(fields_name) is not None and staging.sha256(fields_name) == fields_sha256
        if same and staging.sha256(final) == record["staged_sha256"]:
            yield {"bytes": size or 0, "tokens": record["file"]["tokens"], "record": record}
            return
        staging.delete(record_name)

    description = settings["tokenizer"]
    encoder, eos = _encoder(tokenizer_json, description["special_tokens"]), description["eos_token_id"]
    bos = description.get("bos_token_id")
    fields, has_tokens = fields_of(settings), holds_tokens(source, settings.get("tokens_field"))
    found, window = Found(), window_of_each(threads)
    masked = may_have_mask(source) if has_tokens else may_mask(settings)
    chat = None if settings.get("chat") is None else ChatTemplate(settings["chat"])
    staged = StagedRows(settings, index, bos, masked, _ids(encoder))
    cutter = staged.cutter
    sample = DocumentSample(index)
    left_out = list[str]()
    without_eos = 0
    checked = monotonic()
    temporary = staging.temporary(final)

    def readable(batches: Iterator[Any]) -> Iterator[Any]:
        return _until_bad_file(batches, left_out) if settings.get("on_bad_file") == "reject" else batches

    def may_go_on() -> None:
        if out is not None:
            check_fence(out, *lease)

    def is_time() -> bool:
        nonlocal checked
        if monotonic() - checked <= 1:
            return False
        checked = monotonic()
        return True

    side = KeptFields(staging.temporary(staged_name(index)), fields.kept)
    try:
        with (
            staging.space_errors(final, 4 * (size or 0)),
            pa.ipc.new_file(temporary, cutter.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
        ):
            blocks = ready_blocks(source, settings, encoder, found, window) if has_tokens else iter(())
            for block, position in readable(blocks):
                if block.predict is None:
                    staged.write(writer, cutter.add_many(block.doc_ids, block.ids, block.lengths))
                else:
                    for doc_id, found_document in one_by_one(block, bos):
                        staged.write(writer, cutter.add(doc_id, found_document))
                side.add(block.doc_ids.tolist(), block.fields or [])
                if is_time():
                    may_go_on()
                yield {"bytes": position, "tokens": staged.tokens}
            texts = iter(()) if has_tokens else read_documents(source, fields, window)
            stops = settings["on_bad_document"] == "stop"
            encoded = encode_documents(readable(texts), encoder, chat, eos, bos, stops, source, found)
            for batch in ahead(encoded):  # the tokenizer's threads would stand still while rows are cut and written
                for (doc_id, text, document), kept in zip(batch.documents, batch.kept):
                    if text:  # nothing comes back of an empty one
                        sample.offer(doc_id, text)
                    if len(document.ids):
                        side.add([doc_id], [kept])
                        without_eos += int(document.ids[-1]) != eos
                        staged.write(writer, cutter.add(doc_id, document))
                if is_time():
                    may_go_on()
                yield {"bytes": batch.position, "tokens": staged.tokens}
            staged.write(writer, cutter.finish())
        changed_beside = beside and source.sha256_beside() != beside
        if changed_beside or source.version() != version or (not version and source.sha256() != sha256):
            raise ValueError(f"{source.where}: changed while it was read; run again when nothing writes to it")
        if left_out:  # what came before the fault goes too
            found, sample, without_eos = Found(), DocumentSample(index), 0
            side.clear()
            staged.clear()
            pa.ipc.new_file(temporary, cutter.schema).close()
        with pa.OSFile(str(temporary)) as file:
            changed = sample.changed(file, encoder, bos, as_found=chat is not None)
        kinds = side.close()
        unknown = settings.get("unknown_id")
        # by pack, where it is one of these
        added = {eos: 0 if chat else found.packed, bos: cutter.bos_tokens}.get(unknown, 0)
        record = {
            "key": key,
            "settings": recorded,
            "staged_sha256": sha256_file(temporary),
            "fields_sha256": sha256_file(side.path) if fields.kept else None,
            "field_kinds": kinds,
            "file": asdict(
                CorpusFile(
                    **key | {f"documents_{kind}": count for kind, count in found.counts().items()},
                    rows=staged.rows,
                    tokens=staged.tokens,
                    bos_tokens=cutter.bos_tokens,
                    unknown_tokens=0 if unknown is None else staged.times(unknown) - added,
                    documents_sampled=len(sample.texts),
                    documents_changed=len(changed),
                    left_out="".join(left_out),
                    documents_with_bos=found.with_bos if has_tokens else None,
                    eos_added=found.eos_added if has_tokens else None,
                    predicted_tokens=staged.predicted_tokens,
                    without_eos=without_eos or None,
                )
            ),
            "rejected": found.rejected,
            "changed": changed[0] if changed else None,
            "row_lengths": staged.lengths(),
            "added_tokens": {
                token: staged.times(its) for token, its in settings.get("added_tokens", {}).items() if staged.times(its)
            },
            "occurs": staged.occurring(),
        }
        crash_point("staging.written")
        may_go_on()
        if fields.kept:
            staging.put(side.path, staged_name(index))
        staging.put(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        side.path.unlink(missing_ok=True)
        raise
    staging.replace(record_name, encode_json(record))
    yield {"bytes": size or 0, "tokens": staged.tokens, "record": record}


@lru_cache(maxsize=2)
def _folder(out: str, checksum: str) -> ShardFolder:
    """The folder whose manifest has this checksum; one of many parts takes a second to read."""
    return ShardFolder(out)


def _move_full_batches(
    rest: list[pa.RecordBatch], batches: list[pa.RecordBatch], rows_per_batch: int
) -> list[pa.RecordBatch]:
    """Append what `rest` has of full batches to `batches`; returns what is left, less than a batch."""
    while sum(batch.num_rows for batch in rest) >= rows_per_batch:
        table = pa.Table.from_batches(rest)
        batches += table.slice(0, rows_per_batch).combine_chunks().to_batches()
        rest = table.slice(rows_per_batch).to_batches()
    return rest


def _with_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A staged batch with the columns of the folder: its file may have one that says that all is to be predicted, or lack
    the one that other files need."""
    if PREDICT in schema.names and PREDICT not in batch.schema.names:
        lengths = list_lengths(batch.column("input_ids"))
        ones = pa.array(np.ones(int(lengths.sum()), dtype=bool))
        batch = batch.append_column(PREDICT, list_array(ones, lengths))
    return pa.record_batch([batch.column(name) for name in schema.names], schema=schema)


def write_part_from_staging(
    out: str, part: str, staging: Store, slices: list[tuple[str, int, int]], checksum: str, lease: tuple[int, str]
) -> None:
    """Ray task: copy the rows of one part (file, first row, number of rows) out of the staging files."""
    folder = _folder(out, checksum)
    if read_record(folder.store, part) is not None:  # by a worker that died right after
        return
    rows_per_batch = folder.manifest.rows_per_batch
    batches: list[pa.RecordBatch] = []
    rest: list[pa.RecordBatch] = []
    for name, first, count in slices:
        with staging.open(name) as file:
            reader = pa.ipc.open_file(file)
            # every staged batch but the last has rows_per_batch rows
            low, high = first // rows_per_batch, (first + count - 1) // rows_per_batch
            for index in range(low, high + 1):
                start = max(0, first - index * rows_per_batch)
                stop = first + count - index * rows_per_batch
                batch = reader.get_batch(index).slice(start, stop - start)
                rest.append(_with_columns(batch, folder.schema))
                rest = _move_full_batches(rest, batches, rows_per_batch)
    batches += pa.Table.from_batches(rest, folder.schema).combine_chunks().to_batches()
    metadata = folder.part_metadata(part)
    write_part(
        folder.store, part, folder.schema, metadata, batches, may_publish=lambda: check_fence(folder.store, *lease)
    )
