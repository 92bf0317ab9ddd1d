"""The entropies of a sample, from an engine that is trusted no more than those of the run: compared with transformers
first, replaced on another node when it dies, hangs or computes wrongly, and waited for with a line.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np

from scorer.actor import ScoringActor, leave, make_engine
from scorer.bad_rows import dtype_remedy, main_reason
from scorer.below_entropy import Sample, sample_rows, threshold_of
from scorer.canary import CanaryFailed
from scorer.cluster import HeadWatch, nodes_may_join, one_line, ray_errors, require_ray
from scorer.config import ScoreConfig
from scorer.engine import Answer, EngineConfig
from scorer.engine_failures import EngineFailures
from scorer.engine_thread import EngineLoop, Job
from scorer.health import MAX_ATTEMPTS, Fault, NodeHealth
from scorer.pool import EnginePool
from scorer.rowcheck import fault_of_row
from scorer.second_opinion import SecondOpinion
from scorer.stopping import Stopped
from scorer.watch import Watch
from shards.entropy import entropy_columns, outside
from shards.folder import ShardFolder

WORK = "the sample"  # what the engine's only part is called
FEW_ROWS = 3  # of a sample that may be bad, however small it is
Bounds = dict[str, tuple[float, float]]


class BadSample(CanaryFailed):
    """Too many rows of the sample have no entropies: the engine, or its dtype."""


def fault_of(answer: Answer, bounds: Bounds) -> str | None:
    """Why what an engine said of a prompt cannot be right; None if it can. bounds: of each column of entropies."""
    fault = fault_of_row(answer.logprobs)
    if fault or answer.entropies is None:
        return fault or "the engine was asked for entropies and gave none"
    for values, (column, range_) in zip(answer.entropies.T, bounds.items()):
        bad = values[outside(values, range_)]
        if len(bad):
            return f"{column} is {bad[0]:g}, expected {range_[0]:.4g}..{range_[1]:.4g}"
    return None


def require_few(rows: int, bad: int, most: float, reason: str, dtype: str) -> None:
    """BadSample where more than a share `most` of a sample's rows are bad, or all of them."""
    if bad == rows or (bad > most * rows and (bad > FEW_ROWS or bad > rows / 2)):
        raise BadSample(
            f"{bad} of {rows} rows of the sample for --top-k-below-entropy have no entropies ({reason}), expected at most {most:.3g} of "
            f"them (--max-bad-rows); {dtype_remedy(dtype, reason)}or give a threshold in nats"
        )


class SampleActor(ScoringActor):
    """An engine whose only part is the sample; it opens no folder."""

    def __init__(
        self,
        engine: EngineConfig,
        model_config: dict[str, Any],
        cores: int,
        sample: Sample,
        bounds: Bounds,
        most: float,
    ) -> None:
        """most: the share of the sample's rows that may be bad."""
        self._sample, self._bounds, self._most, self._dtype = sample, bounds, most, engine.dtype
        self._jobs: dict[str, Job] = {}
        self._loop = EngineLoop(lambda: make_engine(engine, model_config, cores), leave)

    def score_part(self, part: str) -> dict[str, Any]:
        """entropies: float32 [tokens - 1] of each prompt, at the last of the engine's temperatures; None where the prompt's row
        is bad, as it is after it was scored twice. rows_bad, reason: of these."""
        prompts, row_of = self._sample.prompts, self._sample.row_of
        job = self._jobs[part] = Job()
        try:
            for index, prompt in enumerate(prompts):
                self._loop.submit(job, index, prompt)
            self._loop.wait(job)
            faults: dict[int, str] = {}
            for row in sorted({row_of[index] for index in job.values if fault_of(job.values[index], self._bounds)}):
                again = Job(alone=True)
                places = [index for index in range(len(prompts)) if row_of[index] == row]
                for index in places:
                    self._loop.submit(again, index, prompts[index])
                self._loop.wait(again)
                job.values |= again.values
                found = [fault for index in places if (fault := fault_of(job.values[index], self._bounds))]
                if found:
                    faults[row] = found[0]
        finally:
            self._jobs.pop(part, None)
        reason = main_reason(faults.values())
        require_few(len(set(row_of)), len(faults), self._most, reason, self._dtype)
        return {
            "entropies": [
                None if row_of[index] in faults else _last_temperature(job.values[index])
                for index in range(len(prompts))
            ],
            "rows_bad": len(faults),
            "reason": reason,
        }


def _last_temperature(answer: Answer) -> np.ndarray:
    """The entropies that the threshold is for, float32 [tokens - 1]."""
    assert answer.entropies is not None
    return answer.entropies[:, -2 if answer.entropies.shape[1] > 1 else 0].copy()


def score_sample(
    pool: EnginePool,
    bundle: dict[str, float],
    opinion: SecondOpinion,
    should_stop: Callable[[], bool],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """What SampleActor.score_part says, from an engine of the pool that holds up.

    Stopped where a signal came, CanaryFailed or RuntimeError where engines compute wrongly or do not start by the rules of a run
    (scorer/health.py), or where it failed with several that were ready.
    """

    def tell(event: str, line: str, **facts: Any) -> None:
        note(f"for the estimate: {line}")

    health = NodeHealth(nodes_may_join())
    failures, watch = EngineFailures(pool, health, tell), Watch(pool, health, tell)
    failed_on: list[str] = []  # nodes, each time that a ready engine failed there
    while True:
        if should_stop():
            raise Stopped("stopped by a signal")
        failures.require_hope(bundle)
        if not HeadWatch.silent:
            room = {node.id for node in pool.nodes().values() if node.room(bundle)}
            alone = health.left_alone(monotonic())
            pool.top_up(1, alone | (frozenset(failed_on) if room - alone - {*failed_on} else frozenset()))
        for engine in pool.ready():
            health.ever_ready = True
            if not engine.parts:
                pool.assign(engine, WORK)
        for outcome in pool.poll(0.5):
            if outcome.result is not None:
                return outcome.result
            assert outcome.error is not None
            if outcome.stage:
                failures.note(outcome, outcome.error, suspected=bool(outcome.parts and failed_on))
            if outcome.parts and outcome.fault is not Fault.NOBODYS:
                failed_on.append(outcome.engine.node)
                if len(failed_on) < MAX_ATTEMPTS:
                    continue
                if isinstance(outcome.error, CanaryFailed):
                    raise outcome.error
                raise RuntimeError(
                    f"the sample for --top-k-below-entropy was scored {MAX_ATTEMPTS} times, each time with an engine that failed, the "
                    f"last time: {one_line(outcome.error)} ({outcome.engine}); --debug shows its output; a threshold in nats needs no "
                    "estimate"
                )
        require_ray()
        opinion.tell(bool(pool.in_state("testing")))
        watch.look(1, bundle)


def estimate(
    config: ScoreConfig,
    shards: ShardFolder,
    engine: EngineConfig,
    model_config: dict[str, Any],
    bundle: dict[str, float],
    opinion: SecondOpinion,
    should_stop: Callable[[], bool],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """`threshold_of` for what `config` asks. Errors as of `score_sample`; ValueError where the sample has no prompt."""
    below = config.below_entropy
    assert below is not None
    assert below.quantile is not None
    sample = sample_rows(shards, config.context, engine.vocab_size)
    tokens = sum(len(prompt) for prompt in sample.prompts)
    note(f"the entropy below which the most probable tokens are kept is estimated on {tokens:,} tokens first")
    if not sample.prompts:
        return threshold_of(sample, [], below.quantile, below.margin, config.logprob_step)  # says what is wrong
    stored = {"entropy": True, "vocab_size": engine.vocab_size, "entropy_temperature": config.entropy_temperature}
    arguments = (sample, entropy_columns(config.name, stored), config.max_bad_rows)
    cores = int(bundle.get("CPU", 1))
    with ray_errors(should_stop):
        opinion.begin([plan.name for plan in shards.manifest.parts])
        pool = EnginePool(
            bundle,
            (engine, model_config, cores, *arguments),
            opinion,
            engine.dtype,
            config.progress_timeout_seconds,
            SampleActor,
        )
        try:
            answer = score_sample(pool, bundle, opinion, should_stop, note)
        finally:
            pool.close()
    kept = [(one, place) for place, one in enumerate(answer["entropies"]) if one is not None]
    good = Sample([sample.prompts[place] for _, place in kept], [sample.row_of[place] for _, place in kept])
    if answer["rows_bad"]:
        rows = len(set(sample.row_of))
        note(f"{answer['rows_bad']} of the sample's {rows} rows are left out: {answer['reason']}, scored twice")
    found = threshold_of(good, [one for one, _ in kept], below.quantile, below.margin, config.logprob_step)
    record = found["top_k_quantile"]
    note(
        f"the most probable tokens are kept where the entropy is at most {found['top_k_below_entropy']:.4g} nat: "
        f"{record['share']:.1%} of the sample (standard error {record['share_error']:.1%} over {record['rows']} rows)"
    )
    return found
