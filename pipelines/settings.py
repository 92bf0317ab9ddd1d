"""Settings of the commands that belong to no stage."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trainer.objectives.settings import check_epsilon


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
    """Clip of the ReMiT weights that are compared; inf: no clip."""
    seed: int = 0
    """Decides which rows are rescored."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"--rows is {self.rows}, expected at least 1")
        check_epsilon("--epsilon", self.epsilon)


@dataclass(frozen=True)
class InspectConfig:
    """Show what a shard folder is, or some of its rows: in the terminal, or as a page that colours each token."""

    shards: str
    """Shard folder."""
    row: int | None = None
    """Row to show, counted over all parts; without it and the next three, the folder's provenance."""
    rows: str | None = None
    """Rows to show, first and last with two dots between: 8..11."""
    doc: int | None = None
    """Document whose rows to show, by its ordinal in its corpus file."""
    search: str | None = None
    """Show the first rows whose decoded text has this in it."""
    source: int | None = None
    """Corpus file that --doc or --search looks in, by its number in the folder's provenance."""
    limit: int = 20
    """Rows that --doc and --search show at most."""
    tokens: int = 64
    """Tokens of each row to show in the terminal; 0: all."""
    html: Path | None = None
    """File to write the rows to as one page: tokens coloured by log p(reference) - log p(base), or by ReMiT weight."""
    reference: str = "rl"
    """Name of the reference whose log-probs the page compares with the base's."""
    base: str | None = None
    """Name of the base's stored log-probs, for the page; default: base, where the folder has it."""
    model: str | None = None
    """Base model that computes its log-probs of the rows now, instead of stored ones; a folder, or NAME or
    NAME@REVISION of the hub."""
    epsilon: float = 0.2
    """Clip of the ReMiT weights on the page; inf: no clip."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        chosen = [f"--{name}" for name in ("row", "rows", "doc", "search") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are given, expected one of them")
        if self.html is not None and not chosen:
            raise ValueError("--html is given without rows, expected --row, --rows, --doc or --search beside it")
        if self.html is None and (self.base is not None or self.model is not None):
            raise ValueError("--base and --model are for the page; give --html FILE too")
        if self.base is not None and self.model is not None:
            raise ValueError(
                "--base and --model are both given, expected one: a stored column, or a model that runs now"
            )
        if self.base is not None and self.base == self.reference:
            raise ValueError(f"--reference and --base are both {self.base!r}, expected the names of two columns")
        if self.search == "":
            raise ValueError("--search is empty, expected text to look for")
        if self.source is not None and self.doc is None and self.search is None:
            raise ValueError("--source is given without --doc or --search, which it narrows")
        for name, least in (("row", 0), ("doc", 0), ("source", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}, expected at least {least}")
        if self.tokens < 0:
            raise ValueError(f"--tokens is {self.tokens}, expected 0 (all) or more")
        check_epsilon("--epsilon", self.epsilon)
        if self.html is not None:
            check_page("--html", self.html)
        _ = self.row_range

    @property
    def row_range(self) -> tuple[int, int] | None:
        """First and last row of --row or --rows."""
        if self.rows is None:
            return None if self.row is None else (self.row, self.row)
        match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", self.rows)
        if match is None or int(match[1]) > int(match[2]):
            raise ValueError(f"--rows is {self.rows!r}, expected the first and the last row, for instance 8..11")
        return int(match[1]), int(match[2])


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
        check_page("--out", self.out)

    @property
    def runs(self) -> list[Path]:
        """Those of all --run options, in their order."""
        return [folder for folders in self.run for folder in folders]


def check_page(option: str, file: Path) -> None:
    """ValueError unless `file` can be written, and is called a page: what it replaces should be one."""
    check_output_file(option, file)
    if file.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{option} is {file}, expected the name of a page, for instance page.html")


def check_output_file(option: str, file: Path) -> None:
    """ValueError unless `file` can be written as far as its place is concerned."""
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: its folder does not exist; create it")
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a folder, expected a file")


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script with which your shell completes commands, options and values of remit."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]
    """Your shell. bash: add eval "$(remit completion bash)" to ~/.bashrc; zsh: write it to a file _remit in a folder
    of $fpath; tcsh: write it to a file that ~/.tcshrc sources."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""
