"""What the pool knows of an engine, and what it reports of engines and parts."""

from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from scorer.health import Fault


@dataclass
class EngineHandle:
    """An engine's process: its place, its actor, what it was asked. state: placing, starting, testing, ready, lost.

    avoid: nodes where it must not be placed. lost: what Ray said of its process, before it is known what became of it.
    """

    number: int
    group: Any
    avoid: frozenset[str] = frozenset()
    node: str = ""
    place: str = ""
    actor: Any = None
    state: str = "placing"
    parts: set[str] = field(default_factory=set)
    began: float = field(default_factory=monotonic)  # with its placement
    since: float = field(default_factory=monotonic)  # of the last sign of life
    rests_until: float = 0.0
    seen: Any = None
    tokens: dict[str, int] = field(default_factory=dict)
    silent: dict[str, float] = field(default_factory=dict)  # stores that do not answer it
    description: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    lost: BaseException | None = None

    def __str__(self) -> str:
        return f"engine {self.number} on {self.place}" if self.place else f"engine {self.number} without a place"


@dataclass(frozen=True)
class Outcome:
    """What became of a part, or of an engine that has ended and of the parts that it had.

    result: counts and times of the part, where it was committed. Else error and fault. stage: the engine's state before it
    ended; empty where it goes on.
    """

    engine: EngineHandle
    parts: tuple[str, ...]
    result: dict[str, Any] | None = None
    error: BaseException | None = None
    fault: Fault = Fault.NOBODYS
    stage: str = ""
