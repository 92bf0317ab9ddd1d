"""The Ray actor that scores parts: one engine, two parts at once so that the engine never waits for a file.

In: the name of a part. Out: the part with a column more, committed in the output folder. Light to import: vLLM
enters with the engine, after the environment that it reads is set.
"""

import os
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pyarrow as pa

from scorer.bad_rows import main_reason
from scorer.canary import Forwards, compare
from scorer.cores import claim_cores
from scorer.engine import Engine, EngineConfig, batched_tokens, device_memory, environment
from scorer.engine_thread import EngineDied, EngineLoop, Job, NodeUnfit
from scorer.installed import installed_vllm
from scorer.once_per_node import node_weights_fingerprint
from scorer.scored_rows import ScoredRows
from scorer.scratch import own_temporary_folder
from shards.asking import silences
from shards.fingerprint import config_fingerprint
from shards.folder import ShardFolder
from shards.lease import LeaseLost, check_fence
from shards.part import CommittedAlready, committed_record, read_record, write_part
from shards.quarantine import read_quarantined_rows, write_quarantined_rows
from shards.record import CommitRecord
from shards.rows import Rows
from shards.store_errors import NoTemporarySpace, StoreSilent


@dataclass(frozen=True)
class ScoringTask:
    """What every part of a run has in common. num_embeddings: ids of the reference are below it. entropies: columns of its
    entropy, and the range of each column's values. topk_limit: the one above whose value no most probable tokens are kept."""

    shards: str
    out: str
    lease: tuple[int, str]
    name: str
    context: str
    logprob_step: float
    num_embeddings: int
    top_k: int = 0
    entropies: dict[str, tuple[float, float]] = field(default_factory=dict)
    topk_limit: tuple[str, float] | None = None
    sample_k: int = 0


class ScoringActor:
    """Methods run in threads of the actor: score_part twice at once, progress beside them."""

    def __init__(self, engine: EngineConfig, model_config: dict[str, Any], cores: int, task: ScoringTask) -> None:
        self._task = task
        self._shards: ShardFolder | None = None
        self._out: ShardFolder | None = None
        self._jobs: dict[str, Job] = {}

        def make() -> Engine:
            self._shards, self._out = self._open(task.shards), self._open(task.out)  # before minutes of loading
            return make_engine(engine, model_config, cores)

        self._loop = EngineLoop(make, leave)

    def start(self) -> dict[str, Any]:
        """Description of the engine, once it runs."""
        return self._loop.wait_ready() | {"pid": os.getpid()}

    def canary(self, forwards: Forwards, dtype: str) -> dict[str, float]:
        """Score prompts whose log-probs transformers has computed; CanaryFailed where they are too far apart."""
        if not forwards.prompts:
            return {}
        job = Job()
        for index, prompt in enumerate(forwards.prompts):
            self._loop.submit(job, index, prompt)
        self._loop.wait(job)
        answers = [job.values[index] for index in range(len(forwards.prompts))]
        return compare(answers, forwards.expected, forwards.limits(dtype))

    def progress(self) -> tuple[int, dict[str, int], dict[str, float]]:
        """Tokens done so far, by steps that finished something, those of each part in work, and stores that do not answer
        here with the seconds since when."""
        return self._loop.tokens_done, {part: job.tokens_done for part, job in self._jobs.items()}, silences()

    def score_part(self, part: str) -> dict[str, Any]:
        """Score a part and commit it; counts and times of it.

        ValueError where the part cannot be read, NodeUnfit where this node is to blame, StoreSilent where a store has not
        answered for as long as it is asked.
        """
        assert self._shards is not None
        assert self._out is not None
        job = self._jobs[part] = Job()
        try:
            record = committed_record(self._out.store, part, self._fence)
            if record is not None:  # by an engine that died right after
                done = len(record.quarantined.get(self._task.name, []))
                times = {"read_seconds": 0.0, "wait_seconds": 0.0, "write_seconds": 0.0}
                return times | {"quarantined": done, "reason": "found by an engine that has died"}
            began = perf_counter()
            reader = self._shards.open_rows(part)
            read_seconds = perf_counter() - began
            batches: list[ScoredRows] = []
            for number in range(len(reader)):
                before = perf_counter()
                rows = reader.batch(number)
                read_seconds += perf_counter() - before
                batches.append(self._submit(job, rows))  # waits while the engine has enough to do
            self._loop.wait(job)
            scored = perf_counter()
            self._fill(job, batches)
            try:
                record = self._commit(part, batches)
            except CommittedAlready:  # by an engine that was given up, on a node that lost its raylet for instance
                record = read_record(self._out.store, part)
            except PermissionError as error:  # which the driver has, or there would be no folder
                raise NodeUnfit(f"the node may not write: {error}") from None
            return {
                "read_seconds": read_seconds,
                "wait_seconds": scored - began - read_seconds,
                "write_seconds": perf_counter() - scored,
                "quarantined": len(record.quarantined.get(self._task.name, [])) if record else 0,
                "reason": main_reason([fault for scored in batches for fault in scored.faults.values()]),
            }
        except EngineDied as error:
            raise type(error)(str(error)) from None  # its cause need not exist where the driver runs
        except StoreSilent:
            raise
        except NoTemporarySpace as error:
            raise NodeUnfit(str(error)) from None
        except (ValueError, OSError, LeaseLost):
            # neither the part nor another driver is to blame where this node has lost its storage
            self._open(self._task.shards), self._open(self._task.out)
            raise
        finally:
            self._jobs.pop(part, None)

    @staticmethod
    def _open(folder: str) -> ShardFolder:
        """NodeUnfit where this node does not reach the folder: another one may."""
        try:
            return ShardFolder(folder)
        except StoreSilent:
            raise
        except (ValueError, OSError) as error:
            raise NodeUnfit(f"the node cannot read {folder}: {error}") from None

    def _submit(self, job: Job, rows: Rows) -> ScoredRows:
        """Send the prompts of a record batch to the engine."""
        task = self._task
        scored = ScoredRows(
            rows, task.context, task.num_embeddings, task.top_k, task.entropies, task.topk_limit, task.sample_k
        )  # fmt: skip
        for start, end, row in scored.spans:
            if row not in scored.faults:
                self._loop.submit(job, job.asked, rows.ids[start:end])
        return scored

    def _fill(self, job: Job, batches: list[ScoredRows]) -> None:
        """Put the values into their rows; score rows with impossible ones again, alone, and note what stays bad."""
        index = 0
        for scored in batches:
            for start, end, row in scored.spans:
                if row not in scored.faults:
                    scored.put(start, end, job.values.pop(index))
                    index += 1
        job.asked = 0
        num_rows = bad = 0
        for scored in batches:
            num_rows += len(scored.rows)
            for row in range(len(scored.rows)):
                if row in scored.faults or not scored.fault_of(row):
                    continue
                again = Job(alone=True)
                spans = [span for span in scored.spans if span[2] == row]
                for place, (start, end, _) in enumerate(spans):
                    self._loop.submit(again, place, scored.rows.ids[start:end])
                self._loop.wait(again)
                for place, (start, end, _) in enumerate(spans):
                    scored.put(start, end, again.values[place])
                fault = scored.fault_of(row)
                if fault:
                    scored.faults[row] = f"scored twice, {fault}"
            bad += len(scored.faults)
        if bad == num_rows > 1:
            reason = next(iter(batches[0].faults.values()))
            raise EngineDied(f"all {num_rows} rows of the part came out bad ({reason})")

    def _fence(self) -> None:
        """LeaseLost where another driver has taken the folder over."""
        assert self._out is not None
        check_fence(self._out.store, *self._task.lease)

    def _commit(self, part: str, batches: list[ScoredRows]) -> CommitRecord:
        """Write the part with the new column; CommittedAlready where another engine was faster."""
        assert self._shards is not None
        assert self._out is not None
        out, name = self._out, self._task.name
        schema = out.schema
        side = read_quarantined_rows(self._shards.store, part)
        quarantined = dict(self._shards.record(part).quarantined)
        written, bad_rows = [], []
        for scored in batches:
            rows = scored.rows
            for row, reason in sorted(scored.faults.items()):
                bad_rows.append(rows.first_row + row)
                ids = rows.ids[rows.place(row)].tolist()
                side.append({"reference": name, "row": rows.first_row + row, "reason": reason, "input_ids": ids})
            by_name = dict(zip(rows.batch.schema.names, rows.batch.columns))
            by_name |= scored.columns(name, self._task.logprob_step)
            written.append(pa.record_batch([by_name[field.name] for field in schema], schema=schema))
        if bad_rows:
            quarantined[name] = bad_rows
        self._fence()
        if committed_record(out.store, part, self._fence) is not None:
            raise CommittedAlready(part)
        write_quarantined_rows(out.store, part, side)
        return write_part(out.store, part, schema, out.part_metadata(part), written, quarantined, self._fence)


def leave() -> None:
    """End this process soon: nothing in it can be trusted, but whoever waits is to learn the reason first."""
    timer = threading.Timer(20, os._exit, (1,))
    timer.daemon = True
    timer.start()


def require_same_vllm(config: EngineConfig) -> None:
    """ValueError where this node would score with another vLLM, or on another kind of device, than the run began with.

    A CPU build is known by its name or version: torch must not be imported before the environment of a CPU engine is set.
    """
    distribution, version = installed_vllm() or ("none", "none")
    device = "cpu"
    if distribution == "vllm" and "cpu" not in version:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"distribution": distribution, "version": version, "device": device}
    for name, value in found.items():
        expected = getattr(config, name)
        if value != expected:
            raise ValueError(
                f"engine {name} is {value} on this node, {expected} where the run began (there {config.distribution} "
                f"{config.version} on {config.device}, here {distribution} {version} on {device}); give all nodes the same "
                "vLLM, or leave this one out"
            )


def require_own_devices(config: EngineConfig) -> None:
    """ValueError where Ray was told not to say which GPUs are whose: all engines of a node would take the first."""
    name = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    if config.device == "cuda" and os.environ.get(name, "").lower() in ("1", "true"):
        raise ValueError(
            f"{name} is set on this node, so that all its engines would share one GPU; unset it where Ray is started"
        )


def make_engine(config: EngineConfig, model_config: dict[str, Any], cores: int) -> Engine:
    """The engine that the config names; sets the environment that it reads.

    ValueError where this node has another model at that place, or it has changed since the run began.
    """
    for name, fingerprint in (("weights_sha256", node_weights_fingerprint), ("config_sha256", config_fingerprint)):
        expected, found = getattr(config, name), fingerprint(config.model)
        if found != expected:
            raise ValueError(
                f"{config.model}: {name} is {found[:12]}.. on this node now, {expected[:12]}.. where the run began; "
                "give all nodes the same files and leave them alone while they are scored with"
            )
    if config.kind == "vllm":
        require_own_devices(config)
        require_same_vllm(config)
    if config.kind == "fake":
        from scorer.fake import FakeEngine

        return FakeEngine(config.vocab_size, config.kept)
    tokens = batched_tokens(config, device_memory(config.device))
    os.environ.update(environment(config, model_config, claim_cores(cores), tokens))
    own_temporary_folder()  # after the claim of cores, which all engines of a machine look for in one place
    from scorer.engine import VllmEngine

    return VllmEngine(config, tokens)
