"""Engines in a Ray cluster: started where there is room, replaced when they die, hang or lose their node.

Nothing here blocks: `poll` collects what has happened since the last call.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scorer.actor import ScoringActor
from scorer.canary import CanaryFailed, Forwards
from scorer.cluster import cause, one_line
from scorer.engine_thread import EngineDied

PARTS_PER_ENGINE = 2  # one is read or written while the other is computed
START_TIMEOUT_SECONDS = 1800.0
MAX_FAILED_STARTS = 3
REMOVAL_SECONDS = 5.0


@dataclass
class EngineHandle:
    """An engine's process: its place, its actor, what it was asked. state: placing, starting, testing, ready."""

    group: Any
    actor: Any = None
    state: str = "placing"
    parts: set[str] = field(default_factory=set)
    since: float = field(default_factory=monotonic)  # of the last sign of life
    seen: Any = None
    tokens: dict[str, int] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a part. result: counts and times where it was committed, else error.

    engine_died: the error took the engine with it, which may be the engine's fault and not the part's.
    """

    part: str
    result: dict[str, Any] | None = None
    error: BaseException | None = None
    engine_died: bool = False


class EnginePool:
    """bundle: Ray resources of an engine, all on one node. num_engines: how many there should be now.

    canary: what engines, in `dtype`, are compared with, once it is known, else None; until then none gets a part.
    """

    def __init__(
        self,
        bundle: dict[str, float],
        actor_arguments: tuple,
        num_engines: Callable[[], int],
        canary: Callable[[], Forwards | None],
        dtype: str,
        progress_timeout_seconds: float,
    ) -> None:
        self._bundle, self._arguments = bundle, actor_arguments
        self._num_engines, self._canary, self._dtype = num_engines, canary, dtype
        self._timeout = progress_timeout_seconds
        self.engines: list[EngineHandle] = []
        self._calls: dict[Any, tuple[EngineHandle, str, str]] = {}  # what was asked: engine, verb, part
        self._failed_starts, self._ever_ready = 0, False
        self._polled = monotonic()
        self._last_progress = 0.0
        self.restarts = 0
        self.canary_result: dict[str, float] = {}

    def ready(self) -> list[EngineHandle]:
        """Engines that can take parts."""
        return [engine for engine in self.engines if engine.state == "ready"]

    def testing(self) -> bool:
        """Whether engines have started and nothing but their comparison keeps them from parts."""
        return any(engine.state == "testing" for engine in self.engines)

    def running(self) -> int:
        """Parts in work."""
        return sum(len(engine.parts) for engine in self.engines)

    def tokens_in_work(self) -> int:
        """Tokens done of the parts in work."""
        return sum(sum(engine.tokens.values()) for engine in self.engines)

    def top_up(self) -> None:
        """Ask for the engines that are missing; they come when the cluster has room for them."""
        while len(self.engines) < self._num_engines():
            engine = EngineHandle(placement_group([self._bundle], strategy="STRICT_PACK"))
            self.engines.append(engine)
            self._calls[engine.group.ready()] = (engine, "place", "")

    def assign(self, engine: EngineHandle, part: str) -> None:
        """Have an engine score a part."""
        if not engine.parts:
            engine.since = monotonic()
        engine.parts.add(part)
        self._calls[engine.actor.score_part.remote(part)] = (engine, "score", part)

    def poll(self, seconds: float) -> list[Outcome]:
        """Wait up to `seconds` for something to happen; what became of parts. CanaryFailed, or RuntimeError where
        engines do not start."""
        outcomes: list[Outcome] = []
        for engine in self.engines:  # while the driver itself was held up, it did not ask
            engine.since += max(0.0, monotonic() - self._polled - 1)
        if monotonic() - self._last_progress > 1:
            self._last_progress = monotonic()
            asked = {id(engine) for engine, verb, _ in self._calls.values() if verb == "progress"}
            for engine in self.engines:
                if engine.actor is not None and id(engine) not in asked:
                    self._calls[engine.actor.progress.remote()] = (engine, "progress", "")
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=seconds) if self._calls else ([], [])
        if done:
            done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for reference in done:
            if reference in self._calls:  # not if its engine was given up meanwhile
                engine, verb, part = self._calls.pop(reference)
                outcomes += self._handle(engine, verb, part, reference)
        for engine in list(self.engines):
            outcomes += self._check_deadline(engine)
            if engine.state == "testing" and engine.seen != "asked" and self._canary() is not None:
                engine.seen, engine.since = "asked", monotonic()
                self._calls[engine.actor.canary.remote(self._canary(), self._dtype)] = (engine, "canary", "")
        self._polled = monotonic()
        return outcomes

    def _handle(self, engine: EngineHandle, verb: str, part: str, reference: Any) -> list[Outcome]:
        try:
            value: Any = ray.get(reference)
        except Exception as error:
            return self._handle_error(engine, verb, part, cause(error))
        # an actor answers this while its engine is stuck in its start: no sign of life then
        if verb != "progress" or (engine.state == "ready" and value != engine.seen):
            engine.since = monotonic()
        if verb == "place":
            strategy = PlacementGroupSchedulingStrategy(engine.group, placement_group_bundle_index=0)
            cpus, gpus = self._bundle.get("CPU", 0), self._bundle.get("GPU", 0)
            engine.actor = (
                ray.remote(ScoringActor)
                .options(
                    num_cpus=cpus,
                    num_gpus=gpus,
                    scheduling_strategy=strategy,
                    max_restarts=0,  # a new one is asked for here, on whatever node has room then
                    max_concurrency=PARTS_PER_ENGINE + 3,
                )
                .remote(*self._arguments)
            )
            engine.state = "starting"
            self._calls[engine.actor.start.remote()] = (engine, "start", "")
        elif verb == "start":
            engine.description, engine.state = value, "testing"
        elif verb == "canary":
            engine.state, engine.seen = "ready", None
            self._failed_starts, self.canary_result, self._ever_ready = 0, value, True
        elif verb == "progress" and engine.state == "ready":
            engine.seen = value
            # not those of a part whose end came in before this answer: it is counted as committed already
            engine.tokens = {part: tokens for part, tokens in value[1].items() if part in engine.parts}
        elif verb == "score":
            engine.parts.discard(part)
            engine.tokens.pop(part, None)
            return [Outcome(part, result=value)]
        return []

    def _handle_error(self, engine: EngineHandle, verb: str, part: str, error: BaseException) -> list[Outcome]:
        if isinstance(error, CanaryFailed):
            raise error
        died = isinstance(error, EngineDied | ray.exceptions.RayError)
        if verb == "score" and not died:
            engine.parts.discard(part)
            return [Outcome(part, error=error)]
        if part:
            engine.parts.add(part)  # so that it is among those that the engine took with it
        return self._give_up(engine, error)

    def _give_up(self, engine: EngineHandle, error: BaseException) -> list[Outcome]:
        """End an engine's process; its parts come back."""
        if engine not in self.engines:
            return []
        self.engines.remove(engine)
        self._calls = {reference: call for reference, call in self._calls.items() if call[0] is not engine}
        if engine.state in ("starting", "testing"):
            self._failed_starts += 1
            # one that was to replace or join others that worked gets further tries, on whatever node has room
            if (isinstance(error, EngineDied) and not self._ever_ready) or self._failed_starts >= MAX_FAILED_STARTS:
                self._end(engine)
                raise RuntimeError(
                    f"an engine does not start: {one_line(error)}; --debug shows its output; the same command again goes on"
                )
        self._end(engine)
        self.restarts += 1
        return [Outcome(part, error=error, engine_died=True) for part in sorted(engine.parts)]

    def _check_deadline(self, engine: EngineHandle) -> list[Outcome]:
        silent = monotonic() - engine.since
        if engine.state == "ready" and engine.parts and silent > self._timeout:
            return self._give_up(engine, TimeoutError(f"no progress for {silent:.0f} s, its engine was killed"))
        if engine.state == "testing" and engine.seen == "asked" and silent > self._timeout:
            return self._give_up(engine, TimeoutError(f"no answer to the canary for {silent:.0f} s"))
        if engine.state == "starting" and silent > START_TIMEOUT_SECONDS:
            return self._give_up(engine, TimeoutError(f"its engine did not start within {silent:.0f} s"))
        return []

    def _end(self, engine: EngineHandle) -> None:
        if engine.actor is not None:
            ray.kill(engine.actor)
        # the call waits for Ray to be there again, for a minute; one that has gone has taken its groups with it
        removal = threading.Thread(target=remove_placement_group, args=(engine.group,), daemon=True)
        removal.start()
        removal.join(REMOVAL_SECONDS)

    def shrink(self, wanted: int) -> None:
        """Give back engines that have nothing to do and are not needed any more."""
        for engine in list(self.engines):
            if len(self.engines) > wanted and not engine.parts:
                self.engines.remove(engine)
                self._calls = {reference: call for reference, call in self._calls.items() if call[0] is not engine}
                self._end(engine)

    def close(self) -> None:
        """End all engines."""
        for engine in self.engines:
            self._end(engine)
        self.engines, self._calls = [], {}
