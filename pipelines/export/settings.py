"""Settings of remit export, checked once. Light to import, so that --help answers at once."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import tyro

from shards.output_folder import require_new_folder
from shards.ranges import require_at_least, require_not_negative, require_one_of
from shards.schema import logprobs_column
from trainer.mixture import Mixture, given_mixture
from trainer.objectives.settings import check_epsilon

Target = Literal["torchtitan", "olmo-core", "megatron", "datasets"]
TARGETS: tuple[Target, ...] = ("torchtitan", "olmo-core", "megatron", "datasets")
OF_TORCHTITAN = ("mix", "objective", "epsilon", "seed", "global_batch_size")


@dataclass(frozen=True)
class ExportConfig:
    """Write annotated shards for another trainer: torchtitan, OLMo-core or Megatron; or as a repository of datasets."""

    to: Target = tyro.MISSING
    """torchtitan: a module for its --module, with which it reads the shards themselves; olmo-core: .npy files; megatron: .bin
    and .idx; datasets: parquet files with a card."""
    shards: tuple[str, ...] = ()
    """Shard folder with log-probs; for torchtitan also several, each with its weight: A=0.7 B=0.3."""
    out: Path = tyro.MISSING
    """Folder to write, on this machine. It gets its name when it is whole; the same command again finishes it."""
    reference: tuple[str, ...] = ()
    """Names of the references whose log-probs are written; default: all that the folder has. torchtitan takes one."""
    verified: tuple[Path, ...] = ()
    """datasets: what remit verify --model MODEL --json FILE measured of the references, for the card."""
    mix: Path | None = None
    """torchtitan: in place of --shards, YAML file that describes a mixture."""
    objective: Literal["remit", "ntp", "rho1"] = "remit"
    """torchtitan: what the loss is; rho1 ranks the tokens of a row."""
    epsilon: float = 0.2
    """torchtitan, remit: weights are clipped to 1 - epsilon .. 1 + epsilon; inf: no clip."""
    seed: int = 0
    """torchtitan: decides the order of the rows, as that of remit train."""
    global_batch_size: int | None = None
    """torchtitan: rows per optimizer step, which a mixture with stages needs."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        require_one_of(self, TARGETS, "to")
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.out)):  # of the two slashes a path keeps one
            raise ValueError(f"--out is {self.out}, expected a folder on this machine; copy it from there")
        mixture = self.mixture
        for folder in mixture.folders:
            require_new_folder(self.out, "remit export", shards=folder)
        for name in self.reference:
            logprobs_column(name)
        if len(set(self.reference)) != len(self.reference):
            raise ValueError(f"--reference is {' '.join(self.reference)}, expected each name once")
        for name in OF_TORCHTITAN:
            entry = ExportConfig.__dataclass_fields__[name]
            if self.to != "torchtitan" and getattr(self, name) != entry.default:
                raise ValueError(f"--{name.replace('_', '-')} belongs to --to torchtitan; leave it out for {self.to}")
        if self.to != "torchtitan" and mixture.is_mixed:
            raise ValueError(
                f"--to {self.to} takes one folder, {len(mixture.folders)} are given; export each, and mix them there"
            )
        if self.to == "torchtitan" and len(self.reference) > 1:
            raise ValueError(f"--reference is {' '.join(self.reference)}, expected one for --to torchtitan")
        if self.verified and self.to != "datasets":
            raise ValueError(f"--verified belongs to --to datasets, whose card it is for; leave it out for {self.to}")
        check_epsilon("--epsilon", self.epsilon)
        require_not_negative(self, "seed")
        require_at_least(self, 1, "global_batch_size")

    @cached_property
    def mixture(self) -> Mixture:
        """The folder or folders; ValueError where none is given."""
        return given_mixture(self.shards, self.mix)
