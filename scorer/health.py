"""Whose fault a failure is, which nodes are left alone for a while, when a run has no hope. Neither Ray nor a clock.

The driver says what happened and when (seconds of any clock that only goes forward) and asks what follows from it:

- A node or process that the cluster took away, and a store that is silent, are nobody's fault. They count nowhere.
- A node that cannot be worked on (engines do not start, folders cannot be read, the temporary folder is full) counts for
  that node. After two such failures in a row nothing is started there for a while, twice as long after each more.
- A node whose engine computes wrongly is out for the rest of the run: a later try might pass by chance.
- An engine that dies or hangs at work may be the part's fault or the node's. Both count; for a part that was suspected
  before, the part alone.
"""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

FAILURES_IN_A_ROW = 2  # of a node, after which it is left alone
REST_SECONDS, LONGEST_REST_SECONDS = 300.0, 3600.0
NODES_ALIKE = 3  # nodes that fail in the same way are enough to tell that the next one will
JOIN_SECONDS = 120.0  # for which a cluster with one bad node is given the chance to get another
MAX_ATTEMPTS = 3  # of a part, each with an engine that failed


class Fault(Enum):
    """Whose fault a failure is."""

    NOBODYS = "nobody's"
    NODES = "the node's"
    PARTS = "the part's"
    UNCLEAR = "the node's or the part's"


@dataclass
class _Record:
    failures: int = 0
    first: float = math.inf
    last: float = -math.inf
    rests_until: float = -math.inf
    kind: str = ""
    reason: str = ""


class NodeHealth:
    """What happened on each node. may_join: whether the cluster may still get nodes; a private one does not.

    Nodes are known by any string that stays theirs.
    """

    def __init__(self, may_join: bool) -> None:
        self._may_join = may_join
        self._nodes: dict[str, _Record] = {}
        self.ever_ready = False

    def failed(self, node: str, began: float, now: float, kind: str, reason: str, for_good: bool = False) -> None:
        """An engine on the node, started at `began`, failed for the node's sake. kind: what such failures have in common.

        Engines that were on their way when another one failed there are the same failure. for_good: leave the node alone
        for the rest of the run.
        """
        record = self._nodes.setdefault(node, _Record())
        record.kind, record.reason = kind, reason
        if for_good:
            record.rests_until = math.inf
        if began > record.last:
            record.failures += 1
            if record.failures >= FAILURES_IN_A_ROW:
                seconds = REST_SECONDS * 2 ** min(30, record.failures - FAILURES_IN_A_ROW)
                record.rests_until = max(record.rests_until, now + min(LONGEST_REST_SECONDS, seconds))
        record.first, record.last = min(record.first, now), max(record.last, now)

    def worked(self, node: str, began: float) -> None:
        """An engine that was started at `began` has finished a part. One that was there before the failures proves nothing."""
        record = self._nodes.get(node)
        if record is not None and began > record.last and record.rests_until < math.inf:
            del self._nodes[node]

    def keep_only(self, nodes: Collection[str]) -> None:
        """Forget nodes that have left the cluster."""
        self._nodes = {node: record for node, record in self._nodes.items() if node in nodes}

    def failures(self, node: str) -> int:
        """Failures of the node in a row."""
        return self._nodes[node].failures if node in self._nodes else 0

    def rest(self, node: str, now: float) -> float:
        """Seconds for which nothing is to be started on the node, inf for the rest of the run; 0 where something may."""
        return max(0.0, self._nodes[node].rests_until - now) if node in self._nodes else 0.0

    def left_alone(self, now: float) -> frozenset[str]:
        """The nodes on which nothing is to be started now."""
        return frozenset(node for node in self._nodes if self.rest(node, now))

    def hopeless(self, now: float, nodes: Collection[str], engines: Collection[tuple[str, float]]) -> str | None:
        """Why the run should end, None where it should not.

        nodes: those with room for an engine. engines: node and beginning of those that start, wait for their comparison or
        are ready. It ends where no engine ever was ready and NODES_ALIKE nodes failed alike, or all that there are as often
        as is allowed in a row; or where all nodes are out for good. Engines are waited for that no failure of their node
        came after: other GPUs of the node, other nodes.
        """
        bad = {node: record for node, record in self._nodes.items() if node in nodes}
        if not bad or any(node not in bad or began <= bad[node].last for node, began in engines):
            return None
        record = max(bad.values(), key=lambda one: one.last)
        everywhere = len(bad) == len(nodes)
        if everywhere and not engines and all(one.rests_until == math.inf for one in bad.values()):
            return None if self._wait_for_others(now, bad) else record.reason
        if self.ever_ready:
            return None
        alike = Counter(one.kind for one in bad.values())
        if alike[record.kind] >= NODES_ALIKE:
            return record.reason
        allowed = FAILURES_IN_A_ROW if self._may_join else 1
        if everywhere and all(one.failures >= allowed or one.rests_until == math.inf for one in bad.values()):
            return None if self._wait_for_others(now, bad) else record.reason
        return None

    def _wait_for_others(self, now: float, bad: dict[str, _Record]) -> bool:
        """Whether one node alone has failed, in a cluster that may be starting."""
        return self._may_join and len(bad) == 1 and now - min(one.first for one in bad.values()) < JOIN_SECONDS


@dataclass
class PartAttempts:
    """How often parts failed, and where. Failures that are nobody's, or a node's, never come here."""

    _failed_on: dict[str, list[str]] = field(default_factory=dict)

    def failed(self, part: str, node: str) -> int:
        """Count a failure on a node; how many there are now."""
        self._failed_on.setdefault(part, []).append(node)
        return len(self._failed_on[part])

    def count(self, part: str) -> int:
        return len(self._failed_on.get(part, ()))

    def suspect(self, part: str) -> bool:
        """Whether it has failed before; then it is scored alone, so that what fails with it is known to be its own fault."""
        return part in self._failed_on

    def welcome(self, part: str, node: str, nodes: Collection[str]) -> bool:
        """Whether the node should try the part: not one that failed with it, as long as another of `nodes` has not."""
        failed_on = self._failed_on.get(part, ())
        return node not in failed_on or all(other in failed_on for other in nodes)
