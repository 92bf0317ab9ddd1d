"""Engines that end, in a run's output and log: whose fault it was, what follows for the node, when there is no hope."""

from collections.abc import Callable
from time import monotonic

from scorer.canary import CanaryFailed
from scorer.cluster import one_line
from scorer.handle import Outcome
from scorer.health import Fault, NodeHealth
from scorer.pool import EnginePool
from scorer.watch import after_failure


class EngineFailures:
    """tell: as Drive.tell."""

    def __init__(self, pool: EnginePool, health: NodeHealth, tell: Callable[..., None]) -> None:
        self._pool, self._health, self._tell = pool, health, tell
        self._last: BaseException | None = None

    def require_hope(self, bundle: dict[str, float]) -> None:
        """End the run where engines start nowhere: CanaryFailed, or RuntimeError with the reason."""
        nodes = [node.id for node in self._pool.nodes().values() if node.room(bundle)]
        engines = [(one.node, one.began) for one in self._pool.in_state("starting", "testing", "ready", "lost")]
        self._health.keep_only(self._pool.nodes())
        reason = self._health.hopeless(monotonic(), nodes, engines)
        if reason is None:
            return
        if isinstance(self._last, CanaryFailed):
            raise self._last
        where = f"on any of {len(nodes)} nodes" if len(nodes) > 1 else "on the only node"
        raise RuntimeError(
            f"an engine does not start {where}, the last time: {reason}; --debug shows its output; the same command again goes on"
        )

    def note(self, outcome: Outcome, error: BaseException, suspected: bool) -> None:
        """An engine has ended. suspected: one of its parts had failed before, and is to blame rather than the node."""
        engine, now = outcome.engine, monotonic()
        reason, then = one_line(error), ""
        if outcome.fault is Fault.NOBODYS:
            reason = str(error)
            if outcome.parts:
                then = f"; what it had waits again and counts as no attempt: {', '.join(outcome.parts)}"
        elif outcome.fault is Fault.NODES or not suspected:
            self._last, wrong = error, isinstance(error, CanaryFailed)
            kind = "".join(letter for letter in reason if not letter.isdigit())[:60]
            self._health.failed(engine.node, engine.began, now, kind, f"{reason} ({engine})", for_good=wrong)
            then = "; " + after_failure(
                self._health.rest(engine.node, now), self._health.failures(engine.node), engine.place
            )
        what = {"ready": "has died at work", "testing": "is not used"}.get(outcome.stage, "did not start")
        if outcome.fault is Fault.NOBODYS:
            what = "is lost" if outcome.stage == "ready" else "is lost before it was ready"
        self._tell(
            "engine_lost", f"{engine} {what}: {reason}{then}", engine=engine.number, node=engine.place, fault=outcome.fault.value,
            parts=outcome.parts,
        )  # fmt: skip
