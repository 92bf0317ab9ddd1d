"""Settings of the commands that belong to no stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.report.runs import require_different
from trainer.objectives.settings import check_epsilon


@dataclass(frozen=True)
class OneFolder:
    """Options of a command that looks at one shard folder."""

    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER]")] = None
    """Shard folder."""
    shards: str | None = None
    """The shard folder, as an option."""

    @property
    def path(self) -> str:
        """The shard folder; ValueError where it is not given, or twice."""
        if (self.folder is None) == (self.shards is None):
            given = (
                "no shard folder is" if self.folder is None else f"{self.folder} and --shards {self.shards} are both"
            )
            raise ValueError(f"{given} given, expected FOLDER or --shards FOLDER")
        return self.folder or self.shards or ""


@dataclass(frozen=True)
class VerifyConfig(OneFolder):
    """Check every byte, count and invariant of a shard folder; with --model, rescore random rows with transformers."""

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
    json: Path | None = None
    """File to write the figures of --model to, as JSON."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.path
        if self.rows < 1:
            raise ValueError(f"--rows is {self.rows}, expected at least 1")
        if self.json is not None:
            if self.model is None:
                raise ValueError("--json is given without --model, whose figures it takes")
            check_output_file("--json", self.json)
        check_epsilon("--epsilon", self.epsilon)


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
        require_different(self.runs)
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
