"""Open a shard folder and read verified parts from it.

In: a folder that pack or score wrote. Out: the manifest, and tables whose bytes were hashed against the
commit record first, because Arrow reads a flipped bit back as data without an error.
"""

import hashlib
from pathlib import Path

import pyarrow as pa

from shards.fingerprint import read_tokenizer_json, tokenizer_difference, tokenizer_fingerprint
from shards.manifest import Manifest
from shards.part import CommitRecord, read_record
from shards.schema import logprobs_column, row_schema

TOKENIZER = "_tokenizer"


class ShardFolder:
    """A shard folder with a valid manifest. ValueError from the constructor names what is wrong."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._plans = {plan.name: plan for plan in self.manifest.parts}

    @property
    def tokenizer_path(self) -> Path:
        """Copy of the tokenizer that packed the rows, a transformers tokenizer folder."""
        return self.path / TOKENIZER

    @property
    def schema(self) -> pa.Schema:
        """Expected schema of every part, without metadata."""
        return row_schema(tuple(self.manifest.references))

    def missing_parts(self) -> list[str]:
        """Planned parts that are not committed yet."""
        return [plan.name for plan in self.manifest.parts if read_record(self.path, plan.name) is None]

    def require_complete(self) -> None:
        """ValueError unless every planned part is committed."""
        missing = self.missing_parts()
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(self.manifest.parts)} parts are not committed "
                f"(first: {missing[0]}); run the command that writes this folder again to finish it"
            )

    def require_reference(self, name: str) -> dict:
        """Provenance of the reference `name`; ValueError lists what the folder has instead."""
        if name not in self.manifest.references:
            has = ", ".join(self.manifest.references) or "none"
            raise ValueError(
                f"{self.path}: has no log-probs of a reference named {name!r} (it has: {has}); "
                f"add them with remit score --name {name}, or choose another --reference"
            )
        return self.manifest.references[name]

    def require_logprobs_of(self, name: str, context: str) -> None:
        """ValueError unless the log-probs of `name` were scored in `context`."""
        scored = self.require_reference(name)["context"]
        if scored != context:
            raise ValueError(
                f"{self.path}: column {logprobs_column(name)} was scored in {scored} context, {context} asked for; "
                f"use --context {scored}, or score again with --context {context}"
            )

    def require_tokenizer(self, tokenizer_json: dict, model: str) -> None:
        """ValueError unless a model's parsed tokenizer.json has the content of the one that packed the rows."""
        fingerprint, packed = tokenizer_fingerprint(tokenizer_json), self.manifest.tokenizer["fingerprint"]
        if fingerprint != packed:
            ours = read_tokenizer_json(self.tokenizer_path)
            raise ValueError(
                f"{model}: its tokenizer {fingerprint[:12]}.. is not the one that packed {self.path}, {packed[:12]}..: "
                f"{tokenizer_difference(ours, tokenizer_json)}; pack again with this model's tokenizer"
            )

    def require_embeddings(self, num_embeddings: int, model: str) -> None:
        """ValueError unless a model has an embedding row for every id of the tokenizer."""
        if self.manifest.tokenizer["vocab_size"] > num_embeddings:
            raise ValueError(
                f"{model}: has {num_embeddings} embedding rows, the tokenizer of {self.path} has ids up to "
                f"{self.manifest.tokenizer['vocab_size'] - 1}; pack again with this model's tokenizer"
            )

    def require_positions(self, max_position: int | None, model: str) -> None:
        """ValueError unless a model takes sequences of seq_len tokens; None means that it has no bound."""
        if max_position is not None and self.manifest.seq_len > max_position:
            raise ValueError(
                f"{model}: takes at most {max_position} tokens (max_position_embeddings), {self.path} has seq_len "
                f"{self.manifest.seq_len}; pack again with --seq-len {max_position} or less"
            )

    def record(self, part: str) -> CommitRecord:
        """Commit record of a part; ValueError where it is not committed."""
        record = read_record(self.path, part)
        if record is None:
            raise ValueError(f"{self.path / part}: not committed; run the command that writes this folder again")
        plan = self._plans[part]
        if (record.rows, record.tokens) != (plan.rows, plan.tokens):
            raise ValueError(
                f"{self.path / part}: its commit record has {record.rows} rows and {record.tokens} tokens, the manifest "
                f"plans {plan.rows} and {plan.tokens}; delete both and run the command that writes this folder again"
            )
        return record

    def open_part(self, part: str, columns: list[str] | None = None) -> pa.ipc.RecordBatchFileReader:
        """Hash a part against its commit record, then open it over the same memory map.

        columns: only these are decompressed; None reads all. Raises ValueError for missing, truncated
        or altered bytes and for columns of another type.
        """
        path = self.path / part
        record = self.record(part)
        remedy = "delete the part and its commit record and run the command that writes this folder again"
        try:
            mapped = pa.memory_map(str(path)).read_buffer()
        except FileNotFoundError:
            raise ValueError(f"{path}: is committed but missing; {remedy}") from None
        if mapped.size != record.size:
            raise ValueError(f"{path}: {mapped.size} bytes, its commit record says {record.size}; {remedy}")
        sha256 = hashlib.sha256(memoryview(mapped)).hexdigest()
        if sha256 != record.sha256:
            raise ValueError(
                f"{path}: sha256 {sha256[:12]}.. differs from its commit record {record.sha256[:12]}..; {remedy}"
            )
        schema = pa.ipc.open_file(mapped).schema
        if not schema.remove_metadata().equals(self.schema):
            raise ValueError(f"{path}: columns {schema.names} or their types are not those of the manifest; {remedy}")
        included = None if columns is None else [schema.get_field_index(column) for column in columns]
        return pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(included_fields=included))
