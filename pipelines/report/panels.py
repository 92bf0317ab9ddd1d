"""A panel of remit report: figures of runs over steps or tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A panel of figures of all runs. format: of a value, as d3 writes it. idle: the value that says nothing: where all
    runs have nothing else, the panel is left out (weights under plain next-token prediction are 1)."""

    title: str
    unit: str
    figures: tuple[str, ...]
    format: str = ".4g"
    idle: float | None = None
    note: str = ""
