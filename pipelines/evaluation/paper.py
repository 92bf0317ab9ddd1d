"""The paper's figures of each task, restated in paper.json: families, stages of post-training, objectives; per cent."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean


@dataclass(frozen=True)
class PaperRow:
    """A line of the paper's tables. stage: SFT, DPO or RL, each after the one before; None: after mid-training.

    values: per cent, in the order of the suite's tasks. average: over them, as the paper states it.
    """

    family: str
    stage: str | None
    method: str
    average: float
    values: tuple[float, ...]

    @property
    def title(self) -> str:
        return self.family if self.stage is None else f"{self.family}, {self.stage}"

    @property
    def mean(self) -> float:
        """The average of the values themselves."""
        return fmean(self.values)


@dataclass(frozen=True)
class PaperTable:
    """The paper's table for one suite. tasks: labels of the suite's tasks; columns: shorter names of them."""

    source: str
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]


@cache
def paper_table(suite: str) -> PaperTable | None:
    """The paper's table for a suite; None where the paper has none."""
    file = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
    table = file["suites"].get(suite)
    if table is None:
        return None
    rows = tuple(PaperRow(**{**row, "values": tuple(row["values"])}) for row in table["rows"])
    return PaperTable(file["source"], tuple(table["tasks"]), tuple(table["columns"]), rows)
