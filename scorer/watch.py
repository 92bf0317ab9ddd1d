"""What a run tells while nothing fails: nodes that come and go, engines that are ready, what is being waited for."""

import math
import time
from collections.abc import Callable
from time import monotonic

import ray

from scorer.handle import EngineHandle
from scorer.health import NodeHealth
from scorer.pool import EnginePool
from scorer.waiting import Waits, counted, duration

PLACE_SECONDS, START_SECONDS, SILENT_SECONDS = 30.0, 120.0, 5.0  # that a wait takes before it is worth a line
FREE_SECONDS = 10.0  # for which the resources that are free are not asked for again


class Watch:
    """Looks at pool and nodes once in a while; tell: as Drive.tell."""

    def __init__(self, pool: EnginePool, health: NodeHealth, tell: Callable[..., None]) -> None:
        self._pool, self._health, self._tell = pool, health, tell
        self._waits = Waits()
        self._nodes: dict[str, str] | None = None
        self._told: set[int] = set()
        self._free = (-math.inf, "")
        self._stores: set[str] = set()

    def look(self, wanted: int, bundle: dict[str, float]) -> None:
        """Tell what has changed. wanted: engines that there should be."""
        self._look_at_nodes(bundle)
        for engine in self._pool.in_state("ready"):
            if engine.number not in self._told:
                self._told.add(engine.number)
                seconds = duration(monotonic() - engine.began)
                self._tell(
                    "engine_ready", f"{engine} is ready, after {seconds}", engine=engine.number, node=engine.place
                )
        placing, starting = self._pool.in_state("placing"), self._pool.in_state("starting")
        lost = self._pool.in_state("lost")
        self._wait("place", self._placing(placing, wanted, bundle) if placing else None, PLACE_SECONDS, "there is room")
        what = f"{_some(starting)} to start (a model is read and loaded, kernels may be compiled)"
        self._wait("start", what if starting else None, START_SECONDS, "no engine is starting any more")
        what = f"news of {_some(lost)}, whose process or node does not answer"
        self._wait("lost", what if lost else None, SILENT_SECONDS, "what became of it is known")
        self._look_at_stores()
        self._look_at_rests(bundle)

    def _wait(self, key: str, what: str | None, after: float, over: str) -> None:
        if line := self._waits.update(monotonic(), key, what, after, over):
            self._tell("waiting" if what else "waited", line, what=key)

    def _look_at_nodes(self, bundle: dict[str, float]) -> None:
        nodes = {node.id: node for node in self._pool.nodes().values() if node.resources.get(next(iter(bundle)), 0)}
        key, each = next(iter(bundle.items()))
        if self._nodes is None:
            rooms = [f"{node.name}: {node.room(bundle)}" for node in nodes.values()]
            listed = f" ({', '.join(rooms)})" if len(rooms) <= 8 else ""
            total = sum(node.room(bundle) for node in nodes.values())
            self._tell(
                "nodes",
                f"{counted(len(nodes), 'node')} with room for {counted(total, 'engine')} of {each:g} {key}{listed}",
                room=total,
            )
            self._nodes = {id_: node.name for id_, node in nodes.items()}
        for id_, node in nodes.items():
            if id_ not in self._nodes:
                room = node.room(bundle)
                says = (
                    f"room for {counted(room, 'engine')}"
                    if room
                    else f"has {node.resources.get(key, 0):g} {key}, an engine takes {each:g}: it gets none"
                )
                self._tell("node_joined", f"node {node.name} is there: {says}", node=node.name, room=room)
        for id_, name in self._nodes.items():
            if id_ not in nodes:
                self._tell("node_left", f"node {name} has left the cluster", node=name)
        self._nodes = {id_: node.name for id_, node in nodes.items()}

    def _placing(self, placing: list[EngineHandle], wanted: int, bundle: dict[str, float]) -> str:
        key, each = next(iter(bundle.items()))
        if monotonic() - min(engine.began for engine in placing) > FREE_SECONDS < monotonic() - self._free[0]:
            free, total = ray.available_resources().get(key, 0), ray.cluster_resources().get(key, 0)
            self._free = (monotonic(), f"{free:g} of the cluster's {total:g} {key}s are free")
        return (
            f"room for {len(placing)} of {wanted} engines, each with {each:g} {key} of one node: {self._free[1]}; they start "
            "as nodes join or others' jobs end"
        )

    def _look_at_stores(self) -> None:
        silent: dict[str, list[EngineHandle]] = {}
        for engine in self._pool.in_state("ready", "starting"):
            for store, seconds in engine.silent.items():
                if seconds >= SILENT_SECONDS:
                    silent.setdefault(store, []).append(engine)
        for store in self._stores | {*silent}:
            what = f"{store}, which does not answer {_some(silent.get(store, []))}; it is asked again and again"
            self._wait(f"store {store}", what if store in silent else None, 0.0, f"{store} answers all engines again")
        self._stores |= {*silent}

    def _look_at_rests(self, bundle: dict[str, float]) -> None:
        now, nodes = monotonic(), self._pool.nodes().values()
        rests = {node.name: self._health.rest(node.id, now) for node in nodes if node.room(bundle)}
        nothing = not self._pool.in_state("starting", "testing", "ready", "lost") and rests and all(rests.values())
        what = "nodes that are left alone: " + ", ".join(f"{name} {until(rest)}" for name, rest in rests.items())
        self._wait("nodes", what if nothing else None, 0.0, "a node may be tried again")


def _some(engines: list[EngineHandle]) -> str:
    """Names of engines, of a few."""
    names = ", ".join(map(str, engines[:3]))
    return names if len(engines) <= 3 else f"{len(engines)} engines ({names} and others)"


def after_failure(rest: float, failures: int, place: str) -> str:
    """What follows from a failure of a node, for the line about it."""
    if rest == math.inf:
        return f"{place} gets no engine any more in this run: look at its device; a new run tries it again"
    if rest:
        return f"{failures} failures in a row, so {place} is left alone {until(rest)}: look at that node"
    return "one is started again where there is room"


def until(rest: float) -> str:
    """The time of day in so many seconds."""
    return (
        "for the rest of the run"
        if rest == math.inf
        else time.strftime("until %H:%M:%S", time.localtime(time.time() + rest))
    )
