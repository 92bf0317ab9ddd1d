"""Engines in a Ray cluster: started where there is room, replaced when they die, hang or lose their node.

Nothing here blocks: `poll` collects what has happened since the last call, with whose fault it is as far as Ray tells.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Any, cast

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scorer.actor import ScoringActor
from scorer.canary import CanaryFailed, Forwards
from scorer.cluster import HeadWatch, cause, death
from scorer.engine_thread import EngineDied, NodeUnfit
from scorer.handle import EngineHandle, Outcome
from scorer.health import Fault
from scorer.placement import Node, alive_nodes
from shards.store_errors import StoreSilent

PARTS_PER_ENGINE = 2  # one is read or written while the other is computed
START_TIMEOUT_SECONDS = 1800.0
REMOVAL_SECONDS = 5.0
LOOK_SECONDS = 2.0
VERDICT_SECONDS = 3.0  # a node that goes away ends its processes first, and is known to be gone a little later
UNREACHABLE_SECONDS = 90.0  # Ray takes up to a minute to find a node dead
SILENT_STORE_SECONDS = 30.0  # an engine whose store is silent is left alone for so long


class EnginePool:
    """bundle: Ray resources of an engine, all on one node.

    canary: what engines, in `dtype`, are compared with, once it is known, else None; until then none gets a part.
    """

    def __init__(
        self,
        bundle: dict[str, float],
        actor_arguments: tuple,
        canary: Callable[[], Forwards | None],
        dtype: str,
        progress_timeout_seconds: float,
        actor: type[ScoringActor] = ScoringActor,
    ) -> None:
        self._bundle, self._arguments = bundle, actor_arguments
        self._canary, self._dtype = canary, dtype
        self._timeout, self._actor = progress_timeout_seconds, actor
        self.engines: list[EngineHandle] = []
        self._calls: dict[Any, tuple[EngineHandle, str, str]] = {}  # what was asked: engine, verb, part
        self._numbers = count(1)
        self._nodes: dict[str, Node] = {}
        self._looked, self._look = -math.inf, cast(threading.Thread | None, None)
        self._polled = monotonic()
        self._last_progress = 0.0
        self.restarts = 0
        self.canary_result: dict[str, float] = {}

    def nodes(self) -> dict[str, Node]:
        """The nodes that are alive, by their ids, as of the last second or of when the cluster's head last answered."""
        if monotonic() - self._looked > 1 and not HeadWatch.silent and not (self._look and self._look.is_alive()):
            # in a thread, since the call does not come back while there is no head
            self._look = threading.Thread(target=self._look_at_nodes, daemon=True)
            self._look.start()
            self._look.join(LOOK_SECONDS if self._nodes else None)
        return self._nodes

    def _look_at_nodes(self) -> None:
        with contextlib.suppress(Exception):  # the driver has its own ways to see that Ray has gone
            self._nodes, self._looked = alive_nodes(), monotonic()

    def ready(self) -> list[EngineHandle]:
        """Engines that can take parts."""
        return [engine for engine in self.engines if engine.state == "ready" and monotonic() >= engine.rests_until]

    def in_state(self, *states: str) -> list[EngineHandle]:
        """Engines in one of the states."""
        return [engine for engine in self.engines if engine.state in states]

    def running(self) -> int:
        """Parts in work."""
        return sum(len(engine.parts) for engine in self.engines)

    def tokens_in_work(self) -> int:
        """Tokens done of the parts in work."""
        return sum(sum(engine.tokens.values()) for engine in self.engines)

    def top_up(self, wanted: int, avoid: frozenset[str]) -> None:
        """Ask for the engines that are missing; they come when the cluster has room for them on nodes not in `avoid`."""
        for engine in self.in_state("placing"):
            if engine.avoid != avoid:
                self._drop(engine)
        while len(self.engines) < wanted:
            elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}] if avoid else None
            group = placement_group([self._bundle], strategy="STRICT_PACK", bundle_label_selector=elsewhere)
            engine = EngineHandle(next(self._numbers), group, avoid)
            self.engines.append(engine)
            self._calls[group.ready()] = (engine, "place", "")

    def assign(self, engine: EngineHandle, part: str) -> None:
        """Have an engine score a part."""
        if not engine.parts:
            engine.since = monotonic()
        engine.parts.add(part)
        self._calls[engine.actor.score_part.remote(part)] = (engine, "score", part)

    def poll(self, seconds: float) -> list[Outcome]:
        """Wait up to `seconds` for something to happen; what became of parts and engines."""
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
            outcomes += self._verdict(engine) if engine.state == "lost" else self._check_deadline(engine)
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
        if engine.state == "lost":  # and answers all the same; what else it was asked has no answer any more
            return self._give_up(engine, engine.lost or RuntimeError("its process was lost"), Fault.NOBODYS)
        # an actor answers this while its engine is stuck in its start: no sign of life then
        if verb != "progress" or (engine.state == "ready" and value != engine.seen):
            engine.since = monotonic()
        if verb == "place":
            self._start(engine)
        elif verb == "start":
            engine.description, engine.state = value, "testing"
        elif verb == "canary":
            engine.state, engine.seen, self.canary_result = "ready", None, value
        elif verb == "progress":
            engine.silent = value[2]
            if engine.state == "ready":
                engine.seen = value
                # not those of a part whose end came in before this answer: it is counted as committed already
                engine.tokens = {part: tokens for part, tokens in value[1].items() if part in engine.parts}
        elif verb == "score":
            engine.parts.discard(part)
            engine.tokens.pop(part, None)
            return [Outcome(engine, (part,), result=value)]
        return []

    def _start(self, engine: EngineHandle) -> None:
        """The engine has its place: start its process there."""
        engine.node = str(placement_group_table(engine.group)["bundles_to_node_id"][0])
        self._looked = -math.inf
        engine.place = self.nodes().get(engine.node, Node(engine.node, engine.node[:8], {})).name
        strategy = PlacementGroupSchedulingStrategy(engine.group, placement_group_bundle_index=0)
        cpus, gpus = self._bundle.get("CPU", 0), self._bundle.get("GPU", 0)
        engine.actor = (
            ray.remote(self._actor)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                scheduling_strategy=strategy,
                max_restarts=0,  # a new one is asked for here, on whatever node has room then
                max_concurrency=PARTS_PER_ENGINE + 3,
            )
            .remote(*self._arguments)
        )
        engine.state, engine.since = "starting", monotonic()
        self._calls[engine.actor.start.remote()] = (engine, "start", "")

    def _handle_error(self, engine: EngineHandle, verb: str, part: str, error: BaseException) -> list[Outcome]:
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            if engine.state != "lost":
                engine.stage, engine.state, engine.since = engine.state, "lost", monotonic()
            if type(error) is not type(engine.lost):
                engine.lost, engine.since = error, monotonic()
            return []
        if isinstance(error, CanaryFailed | NodeUnfit):
            return self._give_up(engine, error, Fault.NODES)
        if verb == "score" and not isinstance(error, EngineDied | ray.exceptions.RayTaskError):
            engine.parts.discard(part)
            engine.tokens.pop(part, None)
            if isinstance(error, StoreSilent):
                engine.rests_until = monotonic() + SILENT_STORE_SECONDS
                return [Outcome(engine, (part,), error=error)]
            return [Outcome(engine, (part,), error=error, fault=Fault.PARTS)]
        at_work = engine.state == "ready" and engine.parts
        return self._give_up(engine, error, Fault.UNCLEAR if at_work else Fault.NODES)

    def _verdict(self, engine: EngineHandle) -> list[Outcome]:
        """What became of an engine that Ray has lost sight of: taken away with its node, or dead by itself."""
        error, waited = engine.lost, monotonic() - engine.since
        assert error is not None
        died = isinstance(error, ray.exceptions.ActorDiedError)
        if engine.node not in self.nodes() or (died and "node has died" in str(error)):
            return self._give_up(engine, RuntimeError("its node has left the cluster"), Fault.NOBODYS)
        if died:
            if waited < VERDICT_SECONDS:
                return []
            at_work = engine.stage == "ready" and engine.parts
            return self._give_up(
                engine, EngineDied(f"its process has died: {death(error)}"), Fault.UNCLEAR if at_work else Fault.NODES
            )
        if waited < UNREACHABLE_SECONDS:
            return []
        return self._give_up(engine, RuntimeError(f"its node has not answered for {waited:.0f} s"), Fault.NOBODYS)

    def _give_up(self, engine: EngineHandle, error: BaseException, fault: Fault) -> list[Outcome]:
        """End an engine's process; its parts come back."""
        if engine not in self.engines:
            return []
        stage = engine.stage or engine.state
        self._drop(engine)
        self.restarts += 1
        return [Outcome(engine, tuple(sorted(engine.parts)), error=error, fault=fault, stage=stage)]

    def _check_deadline(self, engine: EngineHandle) -> list[Outcome]:
        silent = monotonic() - engine.since
        if engine.state == "ready" and engine.parts and silent > self._timeout:
            error = TimeoutError(f"no progress for {silent:.0f} s, its engine was killed")
            return self._give_up(engine, error, Fault.UNCLEAR)
        if engine.state == "testing" and engine.seen == "asked" and silent > self._timeout:
            return self._give_up(engine, TimeoutError(f"no answer to the canary for {silent:.0f} s"), Fault.NODES)
        if engine.state == "starting" and silent > START_TIMEOUT_SECONDS:
            return self._give_up(engine, TimeoutError(f"its engine did not start within {silent:.0f} s"), Fault.NODES)
        return []

    def _drop(self, engine: EngineHandle) -> None:
        self.engines.remove(engine)
        self._calls = {reference: call for reference, call in self._calls.items() if call[0] is not engine}
        _end([engine])

    def shrink(self, wanted: int) -> None:
        """Give back engines that have nothing to do and are not needed any more."""
        for state in ("placing", "starting", "testing", "ready"):
            for engine in self.in_state(state):
                if len(self.engines) > wanted and not engine.parts:
                    self._drop(engine)

    def close(self) -> None:
        """End all engines."""
        _end(self.engines)
        self.engines, self._calls = [], {}


def _end(engines: list[EngineHandle]) -> None:
    """End the engines' processes and give their places back."""
    if HeadWatch.gone:  # nobody is there to be told; they end with their driver
        return

    def end() -> None:
        for engine in engines:
            if engine.actor is not None:
                ray.kill(engine.actor)
            remove_placement_group(engine.group)

    # the calls wait for Ray to be there again, for a minute; one that has gone has taken its groups with it
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(REMOVAL_SECONDS)
