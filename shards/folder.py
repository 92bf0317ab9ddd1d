"""Open a shard folder and read verified parts from it.

In: a folder that pack or score wrote. Out: the manifest, and tables whose bytes were hashed against the
commit record first, because Arrow reads a flipped bit back as data without an error.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.batch_reader import open_batches
from shards.contract import check
from shards.fingerprint import parse_tokenizer_json, vocabulary
from shards.manifest import MANIFEST, Manifest
from shards.record import COMMITS, REMEDY, SUMS, CommitRecord, read_record, record_name, summed_record
from shards.rows import PartRows, Rows, columns_to_read
from shards.scored import Scored
from shards.store import Store, open_store
from shards.tokens import decode_token_ids, differences, disagreement
from shards.whole_part import checked_part, require_size

TOKENIZER = "_tokenizer"
TOKEN_IDS = "token_ids.json"  # in that folder: which ids the rows have
RECORDS_AT_ONCE = 16  # of a store that answers slowly


def require_shards(folder: str) -> None:
    """The ValueError of ShardFolder at once where there is no shard folder; the manifest of one is not read."""
    store = open_store(folder)
    if store.size(MANIFEST) is None:
        Manifest.read(store)


class ShardFolder(Scored):
    """A shard folder with a valid manifest. ValueError from the constructor names what is wrong."""

    def __init__(self, folder: Store | Path | str) -> None:
        self.store = open_store(folder)
        self.manifest = Manifest.read(self.store)
        self._index = {plan.name: index for index, plan in enumerate(self.manifest.parts)}

    @property
    def path(self) -> str | Path:
        """Where the folder is: a path, or a URL."""
        return self.store.local or self.store.url

    def tokenizer_file(self, name: str) -> bytes:
        """A file of _tokenizer/; ValueError where it is missing or not the one of the manifest."""
        where, expected = self.store.where(f"{TOKENIZER}/{name}"), self.manifest.tokenizer.get("files", {}).get(name)
        try:
            data = self.store.read(f"{TOKENIZER}/{name}")
        except FileNotFoundError:
            raise ValueError(f"{where}: missing; copy it from the tokenizer that packed the rows") from None
        sha256 = hashlib.sha256(data).hexdigest()
        if expected is not None and sha256 != expected:
            raise ValueError(
                f"{where}: sha256 {sha256[:12]}.. differs from the manifest's {expected[:12]}..; copy it from a sound "
                "folder of the same rows"
            )
        return data

    def tokenizer_files(self) -> list[str]:
        """Names of the files in _tokenizer/ that belong there; ValueError where there are others."""
        found, known = self.store.names(TOKENIZER), self.manifest.tokenizer.get("files")
        if known is None:  # of an earlier release
            return found
        foreign = sorted(name for name in found if name not in known and not name.startswith("."))
        if foreign:
            raise ValueError(f"{self.store.where(f'{TOKENIZER}/{foreign[0]}')}: is not in the manifest; delete it")
        return sorted(known)

    def tokenizer_json(self) -> dict[str, Any]:
        """Parsed tokenizer.json of the tokenizer that packed the rows."""
        where = self.store.where(f"{TOKENIZER}/tokenizer.json")
        return parse_tokenizer_json(self.tokenizer_file("tokenizer.json"), where)

    def copy_tokenizer(self, to: Path | str) -> None:
        """Copy the files of the tokenizer that packed the rows into a model folder, each checked against its hash."""
        for name in self.tokenizer_files():
            if name != TOKEN_IDS:
                open_store(to).replace(name, self.tokenizer_file(name))

    def copy_tokenizer_to(self, other: Store) -> None:
        """Copy the tokenizer, with the list of ids that the rows have, into another shard folder."""
        for name in self.tokenizer_files():
            other.replace(f"{TOKENIZER}/{name}", self.tokenizer_file(name))

    @property
    def knows_token_ids(self) -> bool:
        """Whether the folder says which ids its rows have; those of earlier releases do not."""
        return TOKEN_IDS in self.manifest.tokenizer.get("files", {})

    def token_ids(self) -> np.ndarray:
        """bool [ids], True for each id that the packed corpus has; all of the tokenizer where that is not known."""
        if not self.knows_token_ids:
            return np.ones(self.manifest.tokenizer["vocab_size"], dtype=bool)
        return decode_token_ids(self.tokenizer_file(TOKEN_IDS), self.store.where(f"{TOKENIZER}/{TOKEN_IDS}"))

    def missing_parts(self) -> list[str]:
        """Planned parts that are not committed yet; lists the folder once, opens no record."""
        committed = set(self.store.names(COMMITS))
        return [plan.name for plan in self.manifest.parts if plan.name[:-6] + ".json" not in committed]

    def require_sizes(self) -> None:
        """ValueError unless each committed part has the size that its record says; reads the records.

        What two engines left that wrote one part at once, or whoever cut or lost a file since.
        """
        missing, sizes = {*self.missing_parts()}, self.store.sizes()
        parts = [plan.name for plan in self.manifest.parts if plan.name not in missing]

        def check_size(part: str) -> None:
            record = read_record(self.store, part)
            if record is not None and sizes.get(part) != record.size:  # not listed, or late
                require_size(self.store.size(part), record, self.store.where(part))

        with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
            for _ in pool.map(check_size, parts):
                pass

    def require_complete(self) -> None:
        """ValueError unless every planned part is committed and the tokenizer's files are there, unaltered, no links."""
        known = self.manifest.tokenizer.get("files", {})
        if "tokenizer.json" not in known:  # else its sum says that it is sound, and parsing 150,000 tokens takes longer
            self.tokenizer_json()
        for name in self.tokenizer_files():
            self.tokenizer_file(name)
        missing = self.missing_parts()
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(self.manifest.parts)} parts are not committed "
                f"(first: {missing[0]}); run the command that writes this folder again to finish it"
            )

    def require_tokenizer(
        self, tokenizer_json: dict, model: str, canonical: Callable[[dict], dict] = lambda value: value
    ) -> list[str]:
        """ValueError unless a model's tokenizer agrees with the one that packed the rows on every id that they have.

        tokenizer_json: the model's, parsed; canonical: brings a parsed tokenizer.json into the form that this one has.
        Returns the differences in tokens that no row has, in words.
        """
        ours, occurs_V = canonical(self.tokenizer_json()), self.token_ids()
        reason = disagreement(ours, tokenizer_json, occurs_V, self.manifest.tokenizer.get("added_tokens", {}))
        if reason:
            raise ValueError(
                f"{model}: its tokenizer is not the one that packed {self.path}: {reason}; pack again with this model's "
                "tokenizer, or copy the rows' tokenizer.json over the model's if the two are meant to be one"
            )
        return differences(ours, tokenizer_json, occurs_V)

    def require_embeddings(self, num_embeddings: int, model: str) -> None:
        """ValueError unless a model has an embedding row for every id that the rows have."""
        beyond = np.flatnonzero(self.token_ids()[num_embeddings:])
        if len(beyond):
            index = int(beyond[0]) + num_embeddings
            token = next((name for name, its in vocabulary(self.tokenizer_json())[0].items() if its == index), None)
            raise ValueError(
                f"{model}: has {num_embeddings} embedding rows, and the rows of {self.path} have token {token!r} (id "
                f"{index}) and {len(beyond) - 1} others beyond them; pack again with this model's tokenizer, or without "
                "the documents that spell these tokens"
            )

    def require_positions(self, max_position: int | None, model: str) -> None:
        """ValueError unless a model takes sequences of seq_len tokens; None means that it has no bound."""
        if max_position is not None and self.manifest.seq_len > max_position:
            raise ValueError(
                f"{model}: takes at most {max_position} tokens (max_position_embeddings), {self.path} has seq_len "
                f"{self.manifest.seq_len}; pack again with --seq-len {max_position} or less"
            )

    def part_metadata(self, part: str) -> dict[str, Any]:
        """What the schema metadata of a part must hold."""
        return self.manifest.part_metadata(self._index[part])

    @cached_property
    def _summed(self) -> set[str]:
        """The records in _sums/, which a folder of format 1 has after remit upgrade."""
        return {f"{SUMS}/{name}" for name in self.store.names(SUMS)} if self.manifest.format_version == 1 else set()

    def record_alone(self, part: str) -> CommitRecord:
        """Commit record of a part; ValueError where it is not committed, or not as planned."""
        record = read_record(self.store, part)
        if record is None:
            raise ValueError(f"{self.store.where(part)}: not committed; run the command that writes this folder again")
        plan, version = self.manifest.parts[self._index[part]], self.manifest.format_version
        if (record.rows, record.tokens) != (plan.rows, plan.tokens):
            raise ValueError(
                f"{self.store.where(part)}: its commit record has {record.rows} rows and {record.tokens} tokens, the "
                f"manifest plans {plan.rows} and {plan.tokens}; {REMEDY}"
            )
        if unknown := sorted({*record.quarantined} - {*self.manifest.references}):
            raise ValueError(
                f"{self.store.where(record_name(part))}: lists rows that {unknown[0]!r} could not score, which is no reference of "
                f"the manifest; {REMEDY}"
            )
        if bool(record.batches) != (version == 2):
            raise ValueError(
                f"{self.store.where(record_name(part))}: not of format {version} like its manifest; {REMEDY}"
            )
        return record

    def record(self, part: str) -> CommitRecord:
        """The same with the sums where the folder has them; ValueError, too, for a record of another folder."""
        record = self.record_alone(part)
        if record_name(part, SUMS) in self._summed:
            record = summed_record(self.store, record)
        if record.batches and record.manifest_sha256 != self.manifest.checksum:
            raise ValueError(f"{self.store.where(part)}: its commit record is not of a part of this manifest; {REMEDY}")
        return record

    def open_part(self, part: str, columns: list[str] | None = None) -> pa.ipc.RecordBatchFileReader:
        """Open a part once all its bytes are checked: the file where it is local, else the memory it is in.

        columns: only these are decompressed; None reads all. ValueError for missing, truncated or altered bytes, columns of
        another type, a part of another folder, and buffers that would decompress to more than the plan has tokens for.
        """
        data = checked_part(self.store, self.record(part), self.manifest, self.part_metadata(part))
        included = None if columns is None else [self.schema.get_field_index(column) for column in columns]
        # read, not mapped: pages that stay mapped count as memory of a process that goes through the whole corpus
        source = data if self.store.local is None else self.store.open(part)
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=included))

    def open_whole_rows(self, part: str) -> PartRows:
        """All rows of a part that is opened as open_part does."""
        reader = self.open_part(part)
        return PartRows(reader, self.manifest, self._index[part], self.store.where(part), self.record(part).quarantined)

    def open_rows(
        self, part: str, columns: Iterable[str] | None = None, record: CommitRecord | None = None
    ) -> PartRows:
        """The rows of a part, with the columns that a check of `columns` needs too; None reads all.

        Bytes of these columns alone are read and hashed, where rows are asked for, by any number of threads; a part without
        sums is hashed whole here. record: that of the part, where it is known. ValueError as of open_part, here or there.
        """
        manifest, record = self.manifest, record or self.record(part)
        names = None if columns is None else columns_to_read(columns, manifest)
        reader = open_batches(self.store, record, manifest, self.part_metadata(part), names)
        return PartRows(reader, manifest, self._index[part], self.store.where(part), record.quarantined)

    def batches(self, columns: Iterable[str] | None = None, parts: Iterable[str] | None = None) -> Iterator[Rows]:
        """The rows of all parts, or of `parts`, a record batch at a time, each verified and checked against the contract.

        columns: only these are read, and what checking them needs; None reads all. ValueError as of open_part and check.
        """
        for part in [plan.name for plan in self.manifest.parts] if parts is None else parts:
            rows = self.open_rows(part, columns)
            for number in range(len(rows)):
                yield check(rows.batch(number))

    def rows(self, numbers: Iterable[int], columns: Iterable[str] | None = None) -> Iterator[Rows]:
        """Each of the rows `numbers`, counted over all parts, verified and checked; as batches, one row at a time.

        A part, and a record batch of it, is read again wherever the numbers come back to it: ascending ones read each
        once. ValueError, too, for a number that the folder does not have.
        """
        size, of_batch = self.manifest.rows_per_part, self.manifest.rows_per_batch

        def known(number: int) -> int:
            if not 0 <= number < self.manifest.rows:
                raise ValueError(f"{self.path}: has rows 0..{self.manifest.rows - 1}, not row {number}")
            return int(number)

        for part, of_part in groupby(map(known, numbers), lambda number: number // size):
            reader = self.open_rows(self.manifest.parts[part].name, columns)
            for batch, places in groupby((number % size for number in of_part), lambda place: place // of_batch):
                checked = check(reader.batch(batch))
                yield from (checked.row(place % of_batch) for place in places)
