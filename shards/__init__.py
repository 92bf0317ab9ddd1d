"""The on-disk format that the scorer and the trainer share; needs pyarrow and numpy only.

A shard folder holds parts (`part-00000.arrow`, Arrow IPC files), a frozen plan with its provenance
(`_manifest.json`) and one commit record per part (`_commits/part-00000.json`). docs/shard-format.md
describes it for readers in other languages.
"""

from shards.folder import ShardFolder
from shards.manifest import CorpusFile, Manifest, PartPlan
from shards.part import write_part
from shards.record import CommitRecord
from shards.schema import logprobs_column, row_schema

__all__ = [
    "CommitRecord",
    "CorpusFile",
    "Manifest",
    "PartPlan",
    "ShardFolder",
    "logprobs_column",
    "row_schema",
    "write_part",
]
