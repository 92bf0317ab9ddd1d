"""Settings of the commands that belong to no stage."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SelectConfig:
    """Keep the rows that a teacher predicts best compared with a small reference (MiniPLM's difference sampling)."""

    shards: str
    """Shard folder that remit score has annotated with both references."""
    teacher: str
    """Name of the large reference, whose column is NAME_logprobs."""
    small: str
    """Name of the small reference, scored in the same context."""
    out: str
    """Shard folder to write; the same command again finishes an interrupted run."""
    keep_ratio: float = 0.8
    """Share of the rows to keep, over the whole corpus: those with the highest mean log p(teacher) - log p(small)."""
    num_workers: int | None = None
    """Parts read or written at once; default: one per CPU. About as many are in memory."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio < 1:
            raise ValueError(
                f"--keep-ratio is {self.keep_ratio}, expected more than 0 and less than 1, for instance 0.8"
            )
        if self.teacher == self.small:
            raise ValueError(
                f"--teacher and --small are both {self.small!r}, expected two references; all rows would tie"
            )
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers is {self.num_workers}, expected at least 1")


@dataclass(frozen=True)
class VerifyConfig:
    """Check every byte, count and invariant of a shard folder; with --model, rescore random rows with transformers."""

    shards: str
    """Shard folder."""
    repair: bool = False
    """Move bad parts to _quarantine/damaged, so that the command that wrote the folder refills just those."""
    model: str | None = None
    """Reference that scored a column: compare the column with a transformers forward of it."""
    reference: str | None = None
    """Name of the column's reference; default: the one with the model's weights."""
    rows: int = 64
    """Random rows to rescore, with --model."""
    base: str | None = None
    """Base model whose losses the ReMiT weights are compared with; default: the reference stands in for it."""
    epsilon: float = 0.2
    """Clip of the ReMiT weights that are compared."""
    seed: int = 0
    """Decides which rows are rescored."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"--rows is {self.rows}, expected at least 1")
        if not self.epsilon > 0:
            raise ValueError(f"--epsilon is {self.epsilon}, expected more than 0")


@dataclass(frozen=True)
class InspectConfig:
    """Show what a shard folder is, or one of its rows: tokens, log-probs, document boundaries."""

    shards: str
    """Shard folder."""
    row: int | None = None
    """Row to show, counted over all parts; without it, the folder's provenance."""
    tokens: int = 64
    """Tokens of the row to show; 0: all."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"--tokens is {self.tokens}, expected 0 (all) or more")
