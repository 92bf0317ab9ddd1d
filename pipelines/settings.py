"""Settings of the commands that belong to no stage."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VerifyConfig:
    """Check every byte, count and invariant of a shard folder."""

    shards: str
    """Shard folder."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""


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
