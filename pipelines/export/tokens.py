"""What OLMo-core and Megatron get of a batch of rows: ids, what is predicted, log-probs, lengths.

In: verified and checked rows of a shard folder. Out: flat numpy arrays. R rows of T tokens and D document pieces in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.folder import ShardFolder
from shards.manifest import Manifest
from shards.rows import Rows
from shards.schema import logprobs_column
from trainer.integrations.folder import DOCUMENTS, IDS, MASK


@dataclass(frozen=True)
class Plan:
    """What is exported of a folder. names: of the references; context: in which all of them were scored."""

    folder: ShardFolder
    names: tuple[str, ...]
    context: str

    @property
    def manifest(self) -> Manifest:
        return self.folder.manifest

    @property
    def columns(self) -> list[str]:
        """Of the shards, that are read."""
        return [IDS, *map(logprobs_column, self.names)]

    def arrays(self, rows: Rows, ids_dtype: str) -> dict[str, np.ndarray]:
        """By column: input_ids [T] in `ids_dtype`; label_mask bool [T], true where training predicts the token: something
        precedes it, it is to be predicted, and every reference of the folder scored its row; of each reference NAME_logprobs
        float32 [T], NaN where it has none; doc_lengths int32 [D]. All stand at the places of the tokens they belong to."""
        mask_T = rows.trained(self.context)
        mask_T = mask_T & np.repeat(rows.scored(*self.manifest.references), rows.lengths)
        found = {IDS: rows.ids.astype(ids_dtype), MASK: mask_T, DOCUMENTS: rows.doc_lengths}
        return found | {logprobs_column(name): rows.logprobs(name) for name in self.names}


def make_plan(folder: ShardFolder, asked: Sequence[str]) -> Plan:
    """ValueError where the folder is not complete, or lacks a reference that is asked for, or has several contexts among them."""
    folder.require_complete()
    names = tuple(asked) or tuple(sorted(folder.manifest.references))
    if not names:
        raise ValueError(f"{folder.path}: has no log-probs; add some with remit score")
    return Plan(folder, names, folder.require_one_context(*names))


def eos_of(manifest: Manifest) -> int:
    """Token id that pads rows."""
    return int(manifest.tokenizer["eos_token_id"])
