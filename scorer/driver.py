"""The driver of remit score: which parts wait, which engine has which, which failed how often.

A part is committed by the engine's actor; the driver only counts, so it may die at any time.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from scorer.actor import ScoringTask
from scorer.canary import Forwards
from scorer.cluster import one_line, ray_errors, require_ray
from scorer.config import ScoreConfig
from scorer.engine import EngineConfig
from scorer.forwards import ForwardTask, find_prompts
from scorer.placement import capacity
from scorer.pool import EnginePool, Outcome
from scorer.stopping import StopGuard, Stopped
from scorer.telemetry import ScoreLog, ScoreProgress
from shards.crash import crash_point
from shards.entropy import entropy_columns
from shards.folder import ShardFolder
from shards.lease import Lease, LeaseLost
from shards.quarantine import write_failure
from shards.store import NO_SPACE

MAX_ATTEMPTS = 3
SAMPLED_PARTS = 32  # whose sizes stand for all in the estimate of the disk's need
COLUMN_BYTES_PER_TOKEN = {True: 1.5, False: 4.0}  # rounded or exact; measured 1.39 and 3.78
# An id and a log-prob, rounded or exact; measured 3.3 and 5.4 for 32 of 150,000 tokens, 4.3 and 6.2 for the best one
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
        forwards: Forwards | None = None,
    ) -> None:
        """forwards: where they are known already, from the choice of the dtype."""
        self.config, self.shards, self.folder, self.engine, self.lease = config, shards, folder, engine, lease
        self.show, self.note = progress, note
        plans = folder.manifest.parts
        self.tokens = {plan.name: plan.tokens for plan in plans}
        self.waiting = deque(folder.missing_parts())
        self.attempts: dict[str, int] = {}
        self.committed = folder.manifest.tokens - sum(self.tokens[part] for part in self.waiting)
        self.state = ScoreProgress(
            self.committed, folder.manifest.tokens, len(plans) - len(self.waiting), len(plans)
        )  # fmt: skip
        self.log = ScoreLog(folder.store)
        self.bundle = bundle
        self._capacity = (0.0, 0)
        self._forwards = forwards
        self._task: ForwardTask | None = None
        self._announced = False
        task = ScoringTask(
            config.shards, config.out, lease.fence, config.name, config.context, config.logprob_step,
            engine.vocab_size, config.top_k, entropy_columns(config.name, folder.manifest.references[config.name]),
        )  # fmt: skip
        cores = int(self.bundle.get("CPU", 1))
        self.pool = EnginePool(
            self.bundle, (engine, model_config, cores, task), self.num_engines, self.canary, engine.dtype,
            config.progress_timeout_seconds,
        )  # fmt: skip

    def num_engines(self) -> int:
        """Engines that there should be: as many as nodes carry and parts need, at most --num-engines."""
        if monotonic() - self._capacity[0] > 2:
            self._capacity = (monotonic(), capacity(self.bundle))
        wanted = self.config.num_engines or self._capacity[1]
        return max(1, min(wanted, len(self.waiting) + self.pool.running()))

    def canary(self) -> Forwards | None:
        """What engines are compared with, once transformers has computed it; no prompts where that is not wanted."""
        if self._forwards is None and self._task is None:
            prompts = []
            if self.config.canary and self.engine.kind == "vllm":
                prompts = find_prompts(self.shards, list(self.waiting), self.config.context, self.engine.vocab_size)
            if not prompts:
                self._forwards = Forwards([], [], {})
                return self._forwards
            dtypes = () if self.engine.dtype == "float32" else (self.engine.dtype,)
            self._task = ForwardTask(self.engine, prompts, dtypes, self.note)
        if self._forwards is None and self._task is not None:
            self._forwards = self._task.result()
        return self._forwards

    def drive(self, should_stop: Callable[[], bool]) -> None:
        """Give engines parts until all are done or have failed."""
        missing = len(self.waiting) / len(self.tokens)
        self.folder.store.require_free(int(missing * self._needed_bytes()), "the annotated folder")
        stop = StopGuard(should_stop, self.config.grace_seconds)
        event = "failed"
        try:
            self.canary()  # its forward runs while the engines start
            with ray_errors(stop.requested):
                while self.waiting or self.pool.running():
                    if not stop.requested():
                        self.pool.top_up()
                        self._assign()
                    stop.check(self.pool.running())
                    for outcome in self.pool.poll(0.5):
                        self._note_outcome(outcome)
                    require_ray()
                    self.pool.shrink(self.num_engines())
                    self._report()
            event = "done" if not self.state.failed else "failed"
        except Stopped:
            event = "stopped"
            raise
        except BaseException as error:
            if stop.requested() and (isinstance(error, SystemError) or not isinstance(error, Exception)):
                event = "stopped"  # by a second signal
            raise
        finally:
            self.pool.close()
            with contextlib.suppress(OSError):  # a full disk has its own error by now
                self.log.write(event, self.state)
        if self.state.failed:
            first, reason = next(iter(self.state.failed.items()))
            raise PartsFailed(
                f"{len(self.state.failed)} of {len(self.tokens)} parts failed, the others are committed; the first: "
                f"{first}: {reason}",
                self.state.failed,
            )

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
        per_token += self.config.top_k * TOPK_BYTES_PER_ENTRY[rounded]
        return per_token * self.folder.manifest.tokens

    def _assign(self) -> None:
        """A part that failed before is scored alone, so that what fails with it is known to be its own fault."""
        for depth in (0, 1):  # first every engine one part, then a second to read while the first is computed
            for engine in self.pool.ready():
                alone = any(self.attempts.get(part) for part in engine.parts)
                if not self.waiting or len(engine.parts) != depth or alone:
                    continue
                if depth and (self.attempts.get(self.waiting[0]) or len(self.waiting) < len(self.pool.ready())):
                    continue  # the last parts go to whoever is free first
                self.pool.assign(engine, self.waiting.popleft())
                crash_point("driver.assigned")

    def _note_outcome(self, outcome: Outcome) -> None:
        part, error = outcome.part, outcome.error
        if outcome.result is not None:
            crash_point("driver.committed")
            self.committed += self.tokens[part]
            self.state.parts += 1
            self.state.rows_quarantined += outcome.result["quarantined"]
            for kind in ("read_seconds", "wait_seconds", "write_seconds"):
                setattr(self.state, kind, getattr(self.state, kind) + outcome.result[kind])
            return
        assert error is not None
        if isinstance(error, LeaseLost):
            raise error
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise error
        self.attempts[part] = self.attempts.get(part, 0) + 1
        # what is wrong with the part itself does not get better by another engine
        if isinstance(error, ValueError) or self.attempts[part] >= MAX_ATTEMPTS:
            self.state.failed[part] = one_line(error)
            self.state.parts_failed += 1
            write_failure(self.folder.store, part, one_line(error), self.attempts[part])
            self.note(f"{part}: given up after {self.attempts[part]} attempts: {one_line(error)}")
        else:
            self.state.retries += 1
            self.waiting.append(part)
            self.note(f"{part}: attempt {self.attempts[part]} failed: {one_line(error)}")

    def _report(self) -> None:
        ready = self.pool.ready()
        if self._task is not None and self._forwards is None and self.pool.testing():
            self._task.tell()
        if ready and not self._announced:
            self._announced = True
            facts = ready[0].description | {"dtype": self.engine.dtype} | {"resources": self.bundle}
            facts |= {"canary": self.pool.canary_result}
            self.log.write("engine", facts)
            self.note(", ".join(f"{key} {value}" for key, value in facts.items() if key != "pid"))
        self.state.tokens = self.committed + self.pool.tokens_in_work()
        self.state.engines = len(self.pool.ready())
        self.state.engine_restarts = self.pool.restarts
        self.log.update(self.state)
        self.show(self.state)
