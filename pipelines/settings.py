"""Options that several commands share."""

from dataclasses import dataclass
from typing import Annotated

import tyro


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
