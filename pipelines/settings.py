"""Settings of the commands that belong to no stage."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


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


@dataclass(frozen=True)
class PlanConfig:
    """Tell before training what ReMiT would do; with --weights, to the tokens of a scored corpus, without a model."""

    weights: bool = False
    """Tabulate weights, clipped shares and tokens from the stored log-probs of a reference and of the base."""
    shards: str | None = None
    """Shard folder with the log-probs of both: remit score, once with each of them."""
    reference: str = "rl"
    """Name of the reference's log-probs (--name of remit score)."""
    base: str = "base"
    """Name of the base's log-probs."""
    epsilons: str = "0.05,0.1,0.2,0.3,0.5,inf"
    """Clips to compare, with commas between; inf: no clip."""
    show_epsilon: float = 0.2
    """Clip at which the tokens of the vocabulary are ranked."""
    centring: Literal["row", "document", "none"] = "row"
    """As for remit train."""
    weight_map: Literal["sigmoid", "exp", "linear"] = "sigmoid"
    """As for remit train."""
    rows: int = 10_000
    """Random rows to read; 0: all."""
    top: int = 20
    """Tokens to show, of the most up-weighted and of the most down-weighted."""
    min_count: int = 20
    """Tokens that occur less often in the rows are not ranked."""
    seed: int = 0
    """Decides which rows are read."""
    json: Path | None = None
    """File to write the figures to, as JSON."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("nothing to plan: give --weights, with --shards DIR")
        if self.shards is None:
            raise ValueError("--shards is not given, expected a folder with log-probs of the reference and of the base")
        if self.reference == self.base:
            raise ValueError(
                f"--reference and --base are both {self.base!r}, expected the names of two columns; score the folder "
                "with the other model too, under another --name"
            )
        for name, least in (("rows", 0), ("top", 1), ("min_count", 1), ("seed", 0)):
            if getattr(self, name) < least:
                what = f"{least} (all) or more" if name == "rows" else f"at least {least}"
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {what}")
        _check_epsilon("--show-epsilon", self.show_epsilon)
        _ = self.epsilon_values
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: its folder does not exist; create it")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"--json {self.json}: is a folder, expected a file")

    @property
    def epsilon_values(self) -> tuple[float, ...]:
        """Those of --epsilons, in its order, each once."""
        values = []
        for text in self.epsilons.split(","):
            try:
                values.append(float(text))
            except ValueError:
                raise ValueError(
                    f"--epsilons is {self.epsilons!r}, expected numbers with commas between, for instance 0.1,0.2,inf"
                ) from None
            _check_epsilon("--epsilons", values[-1])
        return tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class ReportConfig:
    """Show training runs, one or several side by side, in one HTML page that needs no network."""

    run: Annotated[list[list[Path]], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Folder of a run (--out of remit train), finished or not."""
    out: Path = Path("report.html")
    """Page to write; one that is there is replaced."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("--run is not given, expected the folder of a run (--out of remit train)")
        resolved = [folder.resolve() for folder in self.runs]
        for index, folder in enumerate(resolved):
            if folder in resolved[:index]:
                raise ValueError(f"--run {self.runs[index]} is given twice, expected different folders")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out is {self.out}, expected the name of a page, for instance report.html")
        if self.out.is_dir():
            raise ValueError(f"--out {self.out}: is a folder, expected a file")
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out}: its folder does not exist; create it")

    @property
    def runs(self) -> list[Path]:
        """Those of all --run options, in their order."""
        return [folder for folders in self.run for folder in folders]


def _check_epsilon(option: str, value: float) -> None:
    if not (0 < value < 1 or value == math.inf):
        raise ValueError(f"{option} has {value:g}, expected numbers between 0 and 1, or inf for no clip")
