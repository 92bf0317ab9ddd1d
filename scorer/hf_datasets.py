"""Datasets that `datasets` streams: of the Hugging Face hub, or a local folder with its configs and splits.

In: an entry of --corpus. Out: its shards, one for each data file, so that they are read at once and kept one by one;
the rows of a shard. Nothing is downloaded whole, no loading script is run.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from scorer.fields import Fields, remedy_of
from scorer.listing import absolute
from shards.store_errors import NOT_THE_FILES

if TYPE_CHECKING:
    from scorer.conversations import ConversationFields

HUB = "hf://"
MAX_HUB_SHARDS = 1024  # opening one takes some requests, of which the hub allows so many in five minutes
ROWS_AT_ONCE = 64  # of a parquet file
REMEDY = "correct the dataset, or run the same command again where it was the network"


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count` of a split. path: hub id or absolute folder; revision: commit of the hub, else None.

    config: '' for the only one, or the default.
    """

    path: str
    revision: str | None
    config: str
    split: str
    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        where = f"{HUB}{self.path}@{self.revision}" if self.revision else Path(self.path).name
        number = f"#{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""
        return f"{where}:{self.config}:{self.split}{number}"


def find_shards(entry: str) -> list[tuple[Shard, str | None]]:
    """The shards of `[hf://]NAME[@REVISION][:CONFIG[:SPLIT]]` or `FOLDER:[CONFIG][:SPLIT]`, in order, with the path of
    the data file where it is a local one.

    A hub dataset without REVISION is pinned to the commit that the hub has now. Raises ValueError where the hub or
    `datasets` does not know it.
    """
    path, _, rest = entry.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    revision = None
    if entry.startswith(HUB) or not Path(path).is_dir():
        path, _, asked = path.partition("@")
        revision = _commit(entry, path, asked or None)
    else:
        path = absolute(path)
    whole = Shard(path, revision, config, split or "train")
    try:
        builder, stream = open_stream(whole)
    except Exception as error:
        raise ValueError(
            f"{entry}: cannot be opened as a dataset ({_reason(error)}); expected NAME:CONFIG:SPLIT of the hub or "
            "FOLDER:CONFIG:SPLIT, CONFIG may be empty"
        ) from None
    count = min(stream.num_shards, MAX_HUB_SHARDS) if revision else stream.num_shards
    shards = [replace(whole, index=index, count=count) for index in range(count)]
    files = [str(file) for file in (builder.config.data_files or {}).get(whole.split, [])]
    if revision:
        return [(shard, None) for shard in shards]
    if len(files) != count:  # without files, nothing would tell a change of the corpus
        raise ValueError(
            f"{entry}: `datasets` makes {count} shards of {len(files)} files, expected as many; name the files"
        )
    return [(shard, file if Path(file).is_file() else None) for shard, file in zip(shards, files)]


def _commit(entry: str, name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:
        raise ValueError(
            f"{entry}: neither a local file nor a dataset that the Hugging Face hub answers for "
            f"({_reason(error)[:120]}); check --corpus"
        ) from None
    assert commit
    return commit


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class JsonFiles:
    """Stands for the stream of a dataset of JSON files, of which `datasets` would give a type to every field: one that
    is a text here and a number there is an error to it, whether anybody wants the field or not."""

    files: list[str]

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def of_shard(self, shard: Shard) -> list[str]:
        """The files of one of `shard.count` shards."""
        each, more = divmod(len(self.files), shard.count)
        first = each * shard.index + min(shard.index, more)
        return self.files[first : first + each + (shard.index < more)]


def open_stream(shard: Shard) -> tuple[Any, Any]:
    """The builder and the stream of the shard's whole split: an IterableDataset, or JsonFiles."""
    import datasets

    builder = datasets.load_dataset_builder(shard.path, shard.config or None, revision=shard.revision)
    if builder.name == "json" and builder.config.field is None and builder.config.encoding == "utf-8":
        splits = builder.config.data_files
        if shard.split not in splits:
            raise ValueError(f"Bad split: {shard.split}. Available splits: {list(splits)}")
        return builder, JsonFiles([str(file) for file in splits[shard.split]])
    return builder, builder.as_streaming_dataset(split=shard.split)


def json_files(shard: Shard) -> list[str] | None:
    """Paths or hf:// URLs of a shard's files of JSON, None where it is of another kind."""
    try:
        _, stream = open_stream(shard)
    except Exception as error:
        raise ValueError(f"{shard.name}: cannot be opened ({_reason(error)}); {REMEDY}") from None
    return stream.of_shard(shard) if isinstance(stream, JsonFiles) else None


def read_rows(shard: Shard, fields: "Fields | ConversationFields", file: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a shard, with the fields that they have of those wanted; ValueError where they cannot be read to the end,
    OSError where that is not for what is in the file.

    file: the one to read, of a shard of JSON files.
    """
    number = 0
    try:
        stream, columns = _open_rows(shard, fields, file)
        missing = fields.missing(columns)
        if not missing:
            for row in stream:
                yield row
                number += 1
    except Exception as error:
        raise _unread(shard, number, error) from None
    _require_columns(shard, missing, columns, fields)


def read_columns(shard: Shard, fields: "Fields | ConversationFields", rows: int) -> Iterator[pa.Table]:
    """The rows of a shard as tables of up to `rows` rows, with the columns that are wanted; errors as of read_rows."""
    number = 0
    try:
        stream, columns = _open_rows(shard, fields, None)
        missing = fields.missing(columns)
        if not missing:
            for table in stream.with_format("arrow").iter(batch_size=rows):
                yield table.select(fields.columns(columns))
                number += len(table)
    except Exception as error:
        raise _unread(shard, number, error) from None
    _require_columns(shard, missing, columns, fields)


def _unread(shard: Shard, number: int, error: Exception) -> Exception:
    """What to raise where a shard cannot be read beyond row `number`: ValueError, unless the error, or one that led to it,
    is a disk's or a store's."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and (one.errno or isinstance(one, NOT_THE_FILES)):
            return OSError(
                one.errno or errno.EIO,
                f"{shard.name}: cannot be read beyond row {number} ({_reason(error)}); this says nothing of what is in the file: see "
                "that it can be read here, then run the same command again",
            )
        one = one.__cause__ or one.__context__
    return ValueError(f"{shard.name}: cannot be read beyond row {number} ({_reason(error)}); {REMEDY}")


def _open_rows(shard: Shard, fields: "Fields | ConversationFields", file: str | None) -> tuple[Any, list[str]]:
    """The stream of a shard's rows, and the names of its columns."""
    import pyarrow.dataset

    builder, stream = open_stream(shard)
    if file is not None:
        builder.config.data_files = {shard.split: [file]}
        stream = builder.as_streaming_dataset(split=shard.split)
    columns = list(stream.features or fields.columns(()))
    if builder.name == "parquet" and not fields.missing(columns):
        # as it comes, a whole file is asked for at once, with all its columns
        builder.config.columns, builder.config.batch_size = fields.columns(columns), ROWS_AT_ONCE
        options = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
        builder.config.fragment_scan_options = options
        stream = builder.as_streaming_dataset(split=shard.split)
    if shard.count > 1 and file is None:
        stream = stream.shard(num_shards=shard.count, index=shard.index)
    return stream, columns


def _require_columns(
    shard: Shard, missing: list[str], columns: list[str], fields: "Fields | ConversationFields"
) -> None:
    if missing:
        option = "--keep-fields" if missing[0] not in fields.names else remedy_of(fields.option, columns)
        raise ValueError(f"{shard.name}: has no column {missing[0]!r}, only {', '.join(columns)[:80]}; set {option}")
