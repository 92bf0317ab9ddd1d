"""Which references have scored a shard folder, and what of theirs it holds.

In: what a command needs of a reference. Out: its provenance, or a ValueError that names what the folder has instead.
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from shards.entropy import topk_limit
from shards.manifest import Manifest
from shards.schema import logprobs_column, topk_columns


class Scored:
    """The references of a folder; shards.folder.ShardFolder is one."""

    manifest: Manifest

    @property
    def path(self) -> str | Path:
        """Where the folder is: a path, or a URL."""
        raise NotImplementedError

    @property
    def schema(self) -> pa.Schema:
        """Expected schema of every part, without metadata."""
        return self.manifest.schema

    def require_reference(self, name: str) -> dict:
        """Provenance of the reference `name`; ValueError lists what the folder has instead."""
        if name not in self.manifest.references:
            has = ", ".join(self.manifest.references) or "none"
            raise ValueError(
                f"{self.path}: has no log-probs of a reference named {name!r} (it has: {has}); "
                f"add them with remit score --name {name}, or name one that it has"
            )
        return self.manifest.references[name]

    def require_scored(self, name: str, context: str | None = None) -> dict:
        """Provenance of the reference `name`; ValueError unless a model scored its log-probs, and in `context` if given."""
        reference = self.require_reference(name)
        column, scored = logprobs_column(name), reference["context"]
        if reference.get("engine") == "fake":
            raise ValueError(
                f"{self.path}: {column} comes from the fake engine, a hash, and not from a model; score again without "
                "--engine fake"
            )
        if context not in (None, scored):
            raise ValueError(
                f"{self.path}: column {column} was scored in {scored} context, {context} asked for; "
                f"use --context {scored}, or score again with --context {context}"
            )
        return reference

    def require_one_context(self, *names: str) -> str:
        """The context in which all these references were scored; ValueError unless it is one, and models scored them."""
        contexts = {name: self.require_scored(name)["context"] for name in names}
        first = names[0]
        for name in names[1:]:
            if contexts[name] != contexts[first]:
                raise ValueError(
                    f"{self.path}: {logprobs_column(first)} was scored in {contexts[first]} context, "
                    f"{logprobs_column(name)} in {contexts[name]} context, so they are not of the same predictions; score "
                    "one of them again with the other's --context"
                )
        return contexts[first]

    def require_columns(self, name: str, columns: Iterable[str]) -> None:
        """ValueError unless these columns of the reference `name`, given without its name, are stored."""
        columns = tuple(columns)
        gated = any(column.startswith("entropy") for column in columns)  # who reads it knows where a token has none
        for column in columns:
            if column.startswith("topk_"):
                self.require_top_k(name, everywhere=not gated)
            elif column == "sample_ids" and not self.require_reference(name).get("sample_k"):
                raise ValueError(
                    f"{self.path}: has log-probs of {name!r}, but no tokens drawn from it ({name}_sample_ids); score with --sample-k 25, "
                    "for instance"
                )
            elif f"{name}_{column}" not in self.schema.names:
                temperature = column.rpartition("_t")[2].replace("p", ".")
                option = f" --entropy-temperature {temperature}" if column != "entropy" else ""
                raise ValueError(
                    f"{self.path}: has log-probs of {name!r}, but no column {name}_{column}; score with --entropy{option}, or "
                    f"train at a --temperature that is stored"
                )

    def require_top_k(self, name: str, everywhere: bool = True) -> None:
        """ValueError unless the most probable tokens of the reference `name` are stored, at every token if `everywhere`."""
        limit = topk_limit(name, self.require_reference(name))
        if everywhere and limit is not None:
            raise ValueError(
                f"{self.path}: has the most probable tokens of {name!r} only where {limit[0]} is at most {limit[1]:g}, which "
                "is enough for --objective switch; score without --top-k-below-entropy"
            )
        if not self.require_reference(name).get("top_k"):
            raise ValueError(
                f"{self.path}: has log-probs of {name!r}, but not its most probable tokens ({topk_columns(name)[0]}); "
                "score with --top-k 32, for instance"
            )
