"""The driver of remit score: which parts wait, which engine has which, which failed how often.

A part is committed by the engine's actor; the driver only counts, so it may die at any time.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Any

from scorer.actor import ScoringTask
from scorer.bad_rows import BadRows
from scorer.cluster import HeadWatch, nodes_may_join, one_line, ray_errors, require_ray
from scorer.config import ScoreConfig
from scorer.engine import EngineConfig
from scorer.engine_failures import EngineFailures
from scorer.guess import GuessCheck
from scorer.handle import EngineHandle, Outcome
from scorer.health import MAX_ATTEMPTS, Fault, NodeHealth, PartAttempts
from scorer.lost_records import LostRecords
from scorer.placement import capacity
from scorer.pool import EnginePool
from scorer.second_opinion import SecondOpinion
from scorer.stopping import StopGuard, Stopped
from scorer.telemetry import ScoreLog, ScoreProgress, engine_line
from scorer.watch import Watch
from shards.asking import tell_of_silence
from shards.crash import crash_point
from shards.entropy import entropy_columns, topk_limit
from shards.folder import ShardFolder
from shards.lease import Lease, LeaseLost
from shards.quarantine import write_failure
from shards.store import NO_SPACE

SAMPLED_PARTS = 32  # whose sizes stand for all in the estimate of the disk's need
COLUMN_BYTES_PER_TOKEN = {True: 1.5, False: 4.0}  # rounded or exact; measured 1.39 and 3.78
# An id and a log-prob, rounded or exact; measured 3.3 and 5.4 for 32 of 150,000 tokens, 4.3 and 6.2 for the best one
SAMPLE_BYTES_PER_DRAW = 1.5  # of ids, many of which repeat; measured 0.9 to 1.4
TOPK_BYTES_PER_ENTRY = {True: 4.5, False: 6.5}

Progress = Callable[[ScoreProgress], None]


class PartsFailed(RuntimeError):
    """Some parts could not be scored; reasons: per part."""

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons


class Drive:
    """One run of the driver: which parts wait, which failed how often."""

    def __init__(
        self,
        config: ScoreConfig,
        shards: ShardFolder,
        folder: ShardFolder,
        engine: EngineConfig,
        model_config: dict[str, Any],
        bundle: dict[str, float],
        lease: Lease,
        progress: Progress,
        note: Callable[[str], None],
        opinion: SecondOpinion,
    ) -> None:
        self.config, self.shards, self.folder, self.engine, self.lease = config, shards, folder, engine, lease
        self.show, self.note = progress, note
        plans = folder.manifest.parts
        self.tokens = {plan.name: plan.tokens for plan in plans}
        self.rows = {plan.name: plan.rows for plan in plans}
        self.bad_rows = BadRows(config.max_bad_rows, engine.dtype, folder.store.where("_quarantine/rows"))
        self.waiting = deque(folder.missing_parts())
        self.attempts, self.failed = PartAttempts(), dict[str, str]()
        self.health = NodeHealth(nodes_may_join())
        self.guess, self.lost_records = GuessCheck(engine, self.tell), LostRecords(folder)
        self.committed = folder.manifest.tokens - sum(self.tokens[part] for part in self.waiting)
        self.state = ScoreProgress(
            self.committed, folder.manifest.tokens, len(plans) - len(self.waiting), len(plans)
        )  # fmt: skip
        self.log = ScoreLog(folder.store, note)
        self.bundle = bundle
        self.opinion = opinion
        task = ScoringTask(
            config.shards, config.out, lease.fence, config.name, config.context, config.logprob_step,
            engine.vocab_size, config.top_k, entropy_columns(config.name, folder.manifest.references[config.name]),
            topk_limit(config.name, folder.manifest.references[config.name]), config.sample_k,
        )  # fmt: skip
        cores = int(self.bundle.get("CPU", 1))
        self.pool = EnginePool(
            self.bundle, (engine, model_config, cores, task), opinion, engine.dtype, config.progress_timeout_seconds
        )  # fmt: skip
        self.watch = Watch(self.pool, self.health, self.tell)
        self.engine_failures = EngineFailures(self.pool, self.health, self.tell)

    def tell(self, event: str, line: str, **facts: Any) -> None:
        """A line for whoever looks, and the same in the log."""
        self.note(line)
        self.log.write(event, {"line": line} | facts)

    def num_engines(self) -> int:
        """Engines that there should be: as many as nodes carry and parts need, at most --num-engines."""
        alone, nodes = self.health.left_alone(monotonic()), self.pool.nodes()
        room = capacity(self.bundle, [node for node in nodes.values() if node.id not in alone])
        room += sum(engine.node in alone for engine in self.pool.engines)  # these may go on
        return max(1, min(self.config.num_engines or room, room, len(self.waiting) + self.pool.running()))

    def drive(self, should_stop: Callable[[], bool]) -> None:
        """Give engines parts until all are done or have failed."""
        missing = len(self.waiting) / len(self.tokens)
        self.folder.store.require_free(int(missing * self._needed_bytes()), "the annotated folder")
        stop = StopGuard(should_stop, self.config.grace_seconds)
        event, why = "failed", {}
        before = tell_of_silence(partial(self.tell, "store"))
        try:
            self.opinion.begin(list(self.waiting))  # its forward runs while the engines start
            with ray_errors(stop.requested):
                while self.waiting or self.pool.running() or self._take_back():
                    if not stop.requested():
                        self.engine_failures.require_hope(self.bundle)
                        if not HeadWatch.silent:
                            self.pool.top_up(self.num_engines(), self.health.left_alone(monotonic()))
                        self._assign()
                    stop.check(self.pool.running())
                    for outcome in self.pool.poll(0.5):
                        self._note_outcome(outcome)
                    require_ray()
                    self.pool.shrink(self.num_engines())
                    self._report()
                if self.pool.restarts:
                    self.folder.require_sizes()
            event = "done" if not self.failed else "failed"
        except Stopped:
            event = "stopped"
            raise
        except BaseException as error:
            if stop.requested() and (isinstance(error, SystemError) or not isinstance(error, Exception)):
                event = "stopped"  # by a second signal
            else:
                why = {"reason": one_line(error)}
            raise
        finally:
            tell_of_silence(before)
            self.note(f"{event}: {self.state.parts:,} of {self.state.parts_total:,} parts are committed")
            self.pool.close()
            self.log.write(event, asdict(self.state) | why)
            self.log.close()
        if self.failed:
            first, reason = next(iter(self.failed.items()))
            raise PartsFailed(
                f"{len(self.failed)} of {len(self.tokens)} parts failed, the others are committed; the first: "
                f"{first}: {reason}",
                self.failed,
            )

    def _take_back(self) -> bool:
        """Have parts wait again whose records an engine that was given up has taken away; whether there are any."""
        gone = self.lost_records.find(self.failed) if self.pool.restarts else []
        self.committed -= sum(self.tokens[part] for part in gone)
        self.state.parts -= len(gone)
        for part in gone:
            self._try_again(part)
        return bool(gone)

    def _needed_bytes(self) -> float:
        """Estimated size of the whole output folder."""
        plans = self.shards.manifest.parts
        sample = plans[:: max(1, len(plans) // SAMPLED_PARTS)][:SAMPLED_PARTS]
        bytes_ = tokens = 0
        for plan in sample:
            with contextlib.suppress(ValueError):  # a damaged part gets its own message when its turn comes
                bytes_, tokens = bytes_ + self.shards.record(plan.name).size, tokens + plan.tokens
        rounded = self.config.logprob_step > 0
        per_token = bytes_ / max(1, tokens) + COLUMN_BYTES_PER_TOKEN[rounded]
        per_token += self.engine.kept.num_entropies * COLUMN_BYTES_PER_TOKEN[rounded]
        record = self.folder.manifest.references[self.config.name].get("top_k_quantile") or {}
        per_token += self.config.top_k * TOPK_BYTES_PER_ENTRY[rounded] * record.get("share", 1.0)
        per_token += self.config.sample_k * SAMPLE_BYTES_PER_DRAW
        return per_token * self.folder.manifest.tokens

    def _assign(self) -> None:
        """A part that failed before is scored alone, so that what fails with it is known to be its own fault."""
        nodes = {engine.node for engine in self.pool.ready()}
        for depth in (0, 1):  # first every engine one part, then a second to read while the first is computed
            for engine in self.pool.ready():
                alone = any(self.attempts.suspect(part) for part in engine.parts)
                if not self.waiting or len(engine.parts) != depth or alone:
                    continue
                if depth and (self.attempts.suspect(self.waiting[0]) or len(self.waiting) < len(self.pool.ready())):
                    continue  # the last parts go to whoever is free first
                part = next((one for one in self.waiting if self.attempts.welcome(one, engine.node, nodes)), None)
                if part is None or (depth and self.attempts.suspect(part)):
                    continue
                self.waiting.remove(part)
                self.pool.assign(engine, part)
                crash_point("driver.assigned")

    def _note_outcome(self, outcome: Outcome) -> None:
        engine, error = outcome.engine, outcome.error
        if outcome.result is not None:
            crash_point("driver.committed")
            self.committed += sum(self.tokens[part] for part in outcome.parts)
            self.state.parts += 1
            self.state.rows_quarantined += outcome.result["quarantined"]
            for kind in ("read_seconds", "wait_seconds", "write_seconds"):
                setattr(self.state, kind, getattr(self.state, kind) + outcome.result[kind])
            self.health.worked(engine.node, engine.began)
            rows = sum(self.rows[part] for part in outcome.parts)
            if line := self.bad_rows.add(rows, outcome.result["quarantined"], outcome.result["reason"]):
                self.tell("bad_rows", line, **self.bad_rows.facts)
            return
        assert error is not None
        if isinstance(error, LeaseLost):
            raise error
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise error
        if outcome.stage:
            self.engine_failures.note(outcome, error, any(map(self.attempts.suspect, outcome.parts)))
        for part in outcome.parts:
            if outcome.fault in (Fault.PARTS, Fault.UNCLEAR):
                self._note_attempt(part, engine, error)
            else:
                self._try_again(part)
                if not outcome.stage:  # its store is silent, of which there is a line already
                    facts = {"part": part, "engine": engine.number, "node": engine.place, "reason": one_line(error)}
                    self.log.write("part_waits", facts)

    def _note_attempt(self, part: str, engine: EngineHandle, error: BaseException) -> None:
        count, reason = self.attempts.failed(part, engine.node), one_line(error)
        facts = {"part": part, "attempt": count, "engine": engine.number, "node": engine.place, "reason": reason}
        # what is wrong with the part itself does not get better by another engine
        if isinstance(error, ValueError) or count >= MAX_ATTEMPTS:
            self.failed[part] = reason
            self.state.parts_failed += 1
            self.log.also(partial(write_failure, self.folder.store, part, f"{reason} ({engine})", count))
            self.tell("part_failed", f"{part}: given up after {count} attempts: {reason}, {engine}", **facts)
        else:
            self._try_again(part)
            self.tell("part_attempt", f"{part}: attempt {count} failed: {reason}, {engine}", **facts)

    def _try_again(self, part: str) -> None:
        self.state.retries += 1
        self.waiting.append(part)

    def _report(self) -> None:
        self.guess.look(self.opinion())
        ready = self.pool.ready()
        self.opinion.tell(bool(self.pool.in_state("testing")))
        if ready and not self.health.ever_ready:
            self.health.ever_ready = True
            facts = ready[0].description | {"dtype": self.engine.dtype} | {"resources": self.bundle}
            facts |= {"canary": self.pool.canary_result}
            self.log.write("engine", facts)
            self.note(engine_line(facts))
        self.watch.look(self.num_engines(), self.bundle)
        self.state.tokens = self.committed + self.pool.tokens_in_work()
        self.state.engines = len(ready)
        self.state.engine_restarts = self.pool.restarts
        self.log.update(self.state)
        self.show(self.state)
