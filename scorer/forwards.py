"""The transformers forwards that engines are compared with, in a Ray task beside them: started, waited for, told about."""

import os
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import ray

from scorer.canary import Forwards, canary_prompts, compute
from scorer.cluster import cause, one_line
from scorer.engine import EngineConfig
from scorer.stopping import Stopped
from shards.folder import ShardFolder

SAID_AFTER_SECONDS, SAID_EVERY_SECONDS = 5.0, 60.0


def find_prompts(shards: ShardFolder, parts: list[str], context: str, num_embeddings: int) -> list[np.ndarray]:
    """Prompts of the first of `parts` that can be read; a damaged one gets its own message when its turn comes."""
    for part in parts:
        try:
            return canary_prompts(shards, part, context, num_embeddings)
        except ValueError:
            continue
    return []


class ForwardTask:
    """Forwards of `prompts` by the engine's model in float32 and in `dtypes`, in a process without vLLM.

    It asks Ray for no CPU, because engines may hold all of them, and takes the cores of its node: engines that load use
    one each, those that are up wait for it. OMP_NUM_THREADS of the command limits it.
    """

    def __init__(
        self, engine: EngineConfig, prompts: list[np.ndarray], dtypes: tuple[str, ...], note: Callable[[str], None]
    ) -> None:
        self._model, self._note = engine.model, note
        tokens = sum(len(prompt) for prompt in prompts)
        names = ", ".join(("float32", *dtypes))
        self._what = f"a transformers forward of {tokens:,} tokens ({names}), with which engines are compared"
        limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        threads = int(limit) if limit.isdigit() else 0
        task: Any = ray.remote(compute).options(num_cpus=0, max_retries=2)
        self._reference = task.remote(engine.model, prompts, engine.kept, dtypes, threads)
        self._result: Forwards | None = None
        self._began = monotonic()
        self._said = self._began + SAID_AFTER_SECONDS - SAID_EVERY_SECONDS

    def result(self, seconds: float = 0.0) -> Forwards | None:
        """What came out, None as long as it runs; waits up to `seconds`. RuntimeError where it failed."""
        if self._result is None and ray.wait([self._reference], timeout=seconds)[0]:
            try:
                self._result = ray.get(self._reference)
            except Exception as error:
                raise RuntimeError(
                    f"the transformers forward of {self._model} that engines are compared with failed: "
                    f"{one_line(cause(error))}; --no-canary goes on without it"
                ) from None
        return self._result

    def tell(self) -> None:
        """Say what is being waited for, after some seconds and then every minute."""
        if monotonic() - self._said > SAID_EVERY_SECONDS:
            self._said = monotonic()
            self._note(f"waiting for {self._what}, for {monotonic() - self._began:.0f} s so far")

    def wait(self, should_stop: Callable[[], bool]) -> Forwards:
        """The result, however long it takes; Stopped where a signal came."""
        while True:
            result = self.result(0.5)
            if result is not None:
                return result
            if should_stop():
                ray.cancel(self._reference, force=True)
                raise Stopped("stopped by a signal")
            self.tell()
