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
        """ValueError unless these columns of the reference `name`, given without its name, are stored: all that are missing, and
        the options of remit score that store all of them."""
        columns, reference = tuple(columns), self.require_reference(name)
        gated = any(column.startswith("entropy") for column in columns)  # who reads it knows where a token has none
        missing, options, others = dict[str, None](), dict[str, None](), list[str]()
        for column in columns:
            if column.startswith("topk_"):
                options[f"--top-k {reference.get('top_k') or 32}"] = None
                if reference.get("top_k"):
                    self.require_top_k(name, everywhere=not gated)
                else:
                    missing[f"not its most probable tokens ({topk_columns(name)[0]})"] = None
            elif column == "sample_ids":
                options[f"--sample-k {reference.get('sample_k') or 25}"] = None
                if not reference.get("sample_k"):
                    missing[f"no tokens drawn from it ({name}_sample_ids)"] = None
            elif column != "logprobs":
                temperature = column.rpartition("_t")[2].replace("p", ".")
                options["--entropy"] = None
                if column != "entropy":
                    options[f"--entropy-temperature {temperature}"] = None
                if f"{name}_{column}" not in self.schema.names:
                    others.append(f"{name}_{column}")
        if not missing and not others:
            return
        lacks = [*missing, *([f"no column {', '.join(others)}"] if others else [])]
        also = (
            ", or train at a --temperature that is stored" if others and reference.get("entropy") else ", for instance"
        )
        raise ValueError(
            f"{self.path}: has log-probs of {name!r}, but {' and '.join(lacks)}; score with {' '.join(options)}{also}"
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
