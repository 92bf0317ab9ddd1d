"""Settings of remit push. Light to import, so that --help answers at once."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BRANCH = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class PushConfig:
    """Push a shard folder, as a dataset, or a trained model to the Hugging Face hub, with a card that says how it was made.

    The repository is made if there is none, private unless --public. The token is that of `hf auth login`, or HF_TOKEN. The
    same command again goes on where it was interrupted.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Shard folder, here or in an object store; run of remit train, sft, dpo or rl, whose model is pushed; or model folder."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository on the hub: a dataset for shards, a model for models."""
    path: str = ""
    """For shards: the folder in the dataset, so that it may hold several; default: the dataset is the shard folder."""
    revision: str = "main"
    """Branch to push to; made from main if there is none."""
    public: bool = False
    """Make the new repository public; needed too for pushing to one that is public already."""
    license: str | None = None
    """What the card is to name as the licence, such as apache-2.0; default: the card asks its owner to fill it in."""
    results: list[Path] = field(default_factory=list)
    """For models: results.json files of remit eval, whose figures go into the card."""
    dry_run: bool = False
    """Make all checks that need no hub, and print the card and what would be pushed."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.repo) or ".." in self.repo or "--" in self.repo or len(self.repo) > 96:
            raise ValueError(
                f"{self.repo!r} is no name of a repository, expected OWNER/NAME of letters, digits, ., _ and -, for instance "
                "lab/olmo2-1b-scored"
            )
        if self.path and (not _BRANCH.fullmatch(self.path) or {".", ".."} & set(self.path.split("/"))):
            raise ValueError(f"--path is {self.path!r}, expected a folder in the dataset, for instance scored/web")
        if self.path.startswith("_"):
            raise ValueError(f"--path is {self.path!r}, expected no underscore in front, which readers pass over")
        if not _BRANCH.fullmatch(self.revision) or re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"--revision is {self.revision!r}, expected the name of a branch, for instance main")
