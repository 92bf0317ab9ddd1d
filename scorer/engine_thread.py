"""The thread that owns an engine: prompts of several parts go in, their log-probs come out.

One thread makes the engine and steps it (its OpenMP threads are bound to that thread). Parts that are read,
checked and written in other threads keep its queue filled, so the engine does not wait for them.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scorer.engine import Answer, Engine

QUEUED_PROMPTS = 64
IN_ENGINE_TOKENS = 1 << 15  # enough for the next steps; more would only hold memory


class EngineDied(RuntimeError):
    """The engine failed; its process is of no use any more."""


class NodeUnfit(EngineDied):
    """The engine cannot be used on its node: folders that it does not reach, a full temporary folder."""


@dataclass
class Job:
    """Prompts of one part. values: what the engine says of them by index, as it arrives.

    alone: each prompt has the engine for itself, with nothing left in it of another one.
    """

    values: dict[int, Answer] = field(default_factory=dict)
    tokens_done: int = 0
    asked: int = 0
    alone: bool = False


class EngineLoop:
    """Runs `make_engine` and steps it in a thread of its own.

    on_death: called in that thread, as its last act, when the engine has failed and whoever waits has been told.
    """

    def __init__(self, make_engine: Callable[[], Engine], on_death: Callable[[], None]) -> None:
        self._make_engine, self._on_death = make_engine, on_death
        self._queue: queue.Queue[tuple[Job, int, np.ndarray]] = queue.Queue(QUEUED_PROMPTS)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._engine: Engine | None = None
        self.tokens_done = 0
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def wait_ready(self) -> dict[str, Any]:
        """Description of the engine once it runs; EngineDied where it does not start."""
        with self._changed:
            self._changed.wait_for(lambda: self._engine is not None or self._error is not None)
        self._raise_if_dead()
        assert self._engine is not None
        return self._engine.description

    def submit(self, job: Job, index: int, prompt: np.ndarray) -> None:
        """Queue a prompt; waits while the queue is full."""
        job.asked += 1
        while True:
            self._raise_if_dead()
            try:
                return self._queue.put((job, index, prompt), timeout=1)
            except queue.Full:
                continue

    def wait(self, job: Job) -> None:
        """Return when all prompts of the job that were submitted have their values."""
        with self._changed:
            self._changed.wait_for(lambda: len(job.values) >= job.asked or self._error is not None)
        if len(job.values) < job.asked:
            self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        if isinstance(self._error, EngineDied):  # says itself what is wrong
            raise type(self._error)(str(self._error)) from None
        if self._error is not None:
            lines = [line.strip() for line in str(self._error).splitlines() if line.strip()]
            # vLLM checks its settings with pydantic, which says what is wrong and ends with a link
            said = [line for line in lines if not line.startswith("For further information visit")]
            raise EngineDied(f"{type(self._error).__name__}: {said[-1] if said else 'no message'}") from self._error

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            with self._changed:
                self._engine = engine
                self._changed.notify_all()
            self._loop(engine)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._on_death()

    def _loop(self, engine: Engine) -> None:
        running: dict[str, tuple[Job, int, int]] = {}
        number = tokens = 0
        held: tuple[Job, int, np.ndarray] | None = None  # comes in when nothing else is in work
        alone = False  # what is in work must not be joined
        spoiled = False  # by a prompt with a number that is not finite: see LogprobKernel.zero_kv_cache
        while True:
            while tokens < IN_ENGINE_TOKENS and not alone and not (running and (spoiled or held)):
                try:
                    job, index, prompt = held or self._queue.get(block=not running)
                except queue.Empty:
                    break
                held = None
                if job.alone and running:
                    held = (job, index, prompt)
                    break
                if spoiled or job.alone:
                    engine.forget()
                spoiled, alone = False, job.alone
                number += 1
                running[str(number)] = (job, index, len(prompt))
                tokens += len(prompt)
                engine.add(str(number), prompt)
            finished = engine.step()
            if not finished:
                continue
            with self._changed:
                for key, answer in finished:
                    job, index, length = running.pop(key)
                    job.values[index] = answer
                    spoiled = spoiled or not np.isfinite(answer.logprobs).all()
                    job.tokens_done += length
                    self.tokens_done += length
                    tokens -= length
                self._changed.notify_all()
            alone = alone and bool(running)
