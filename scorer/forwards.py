"""The transformers forwards that engines are compared with, in a Ray task beside them: started, waited for, told about."""

import os
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import ray

from scorer.canary import Forwards, canary_prompts, compute
from scorer.cluster import cause, one_line, require_ray
from scorer.engine import EngineConfig
from scorer.stopping import Stopped
from scorer.waiting import Waits
from shards.folder import ShardFolder

SAID_AFTER_SECONDS = 5.0
MAX_NODES = 3  # that may fail at the forward, each for its own sake, before it is the model's


def find_prompts(shards: ShardFolder, parts: list[str], context: str, num_embeddings: int) -> list[np.ndarray]:
    """Prompts of the first of `parts` that can be read; a damaged one gets its own message when its turn comes."""
    for part in parts:
        try:
            return canary_prompts(shards, part, context, num_embeddings)
        except ValueError:
            continue
    return []


class ForwardFailed(RuntimeError):
    """What went wrong on which node (Ray's id)."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(node, reason)
        self.node, self.reason = node, reason


def on_its_node(function: Callable, *arguments: Any) -> Any:
    """The function's result; ForwardFailed says where it failed."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ForwardFailed(ray.get_runtime_context().get_node_id(), one_line(error)) from None


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
        self._arguments = (compute, engine.model, prompts, engine.kept, dtypes, threads)
        self._failed_on: list[str] = []
        self._submit()
        self._result: Forwards | None = None
        self._waits = Waits()

    def _submit(self) -> None:
        others = {"ray.io/node-id": f"!in({','.join(self._failed_on)})"} if self._failed_on else None
        # a node that is lost is no failure of the forward's, up to ten times
        task: Any = ray.remote(on_its_node).options(num_cpus=0, max_retries=10, label_selector=others)
        self._reference = task.remote(*self._arguments)

    def result(self, seconds: float = 0.0) -> Forwards | None:
        """What came out, None as long as it runs; waits up to `seconds`. RuntimeError where it failed on several nodes, or
        on the only one."""
        if self._result is None and ray.wait([self._reference], timeout=seconds)[0]:
            try:
                self._result = ray.get(self._reference)
            except Exception as error:
                self._try_elsewhere(cause(error))
        return self._result

    def tell(self, waited_for: bool) -> None:
        """Say when it begins and ends to be what the run waits for."""
        what = self._what if waited_for and self._result is None else None
        over = "the wait for the transformers forward is over"
        if line := self._waits.update(monotonic(), "", what, SAID_AFTER_SECONDS, over):
            self._note(line)

    def _try_elsewhere(self, error: BaseException) -> None:
        reason = error.reason if isinstance(error, ForwardFailed) else one_line(error)
        if isinstance(error, ForwardFailed):
            self._failed_on.append(error.node)
        others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self._failed_on]
        if not isinstance(error, ForwardFailed) or not others or len(self._failed_on) >= MAX_NODES:
            raise RuntimeError(
                f"the transformers forward of {self._model} that engines are compared with failed: {reason}; --no-canary goes "
                "on without it"
            ) from None
        self._note(
            f"the transformers forward with which engines are compared failed on node {error.node[:8]}: {reason}; tried elsewhere"
        )
        self._submit()

    def wait(self, should_stop: Callable[[], bool]) -> Forwards:
        """The result, however long it takes; Stopped where a signal came."""
        while True:
            result = self.result(0.5)
            self.tell(result is None)
            if result is not None:
                return result
            if should_stop():
                ray.cancel(self._reference, force=True)
                raise Stopped("stopped by a signal")
            require_ray()
