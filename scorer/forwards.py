"""The transformers forwards that engines are compared with, in a Ray task beside them: started, waited for, told about."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import ray

from scorer.canary import Forwards, canary_prompts, compute, node_cores
from scorer.cluster import HeadWatch, cause, one_line, require_ray
from scorer.engine import EngineConfig
from scorer.forward_cost import forward_cost, gib
from scorer.placement import Node, alive_nodes
from scorer.stopping import Stopped
from scorer.waiting import Waits, duration
from shards.folder import ShardFolder

SAID_AFTER_SECONDS = 5.0
MAX_FAILURES = 3  # each for its node's sake, before it is the model's
MAX_LOSSES = 10  # with nodes that leave, or before it is known where it runs: nobody's fault
PLACE_SECONDS = 300.0  # for which memory is waited for that Ray has promised to others
BEGIN_SECONDS = 900.0  # after which a task that asks for nothing is taken for one that never begins
LOOK_SECONDS = 5.0  # between two looks whether its node is there: Ray may take minutes to call the task failed
VERDICT_SECONDS = 10.0  # a node that goes away ends its processes first, and is known to be gone a little later


def find_prompts(shards: ShardFolder, parts: list[str], context: str, num_embeddings: int) -> list[np.ndarray]:
    """Prompts of the first of `parts` that can be read; a damaged one gets its own message when its turn comes."""
    for part in parts:
        try:
            return canary_prompts(shards, part, context, num_embeddings)
        except ValueError:
            continue
    return []


def on_a_node(threads: int, function: Callable, *arguments: Any) -> Iterator[Any]:
    """A Ray task: first the node that it runs on (Ray's id) and the threads that it takes there, then the function's result.

    threads: 0 for all cores of the node; the function's last argument.
    """
    threads = threads or node_cores()
    yield ray.get_runtime_context().get_node_id(), threads
    yield function(*arguments, threads)


@dataclass
class _Attempt:
    """A task that was handed to Ray. answers: what it yields; memory: bytes that Ray was asked for."""

    answers: Any
    memory: int
    since: float = field(default_factory=monotonic)
    node: str = ""  # once it runs
    seconds: float = math.inf  # that it may run
    error: BaseException | None = None  # since `since`
    looked: float = field(default_factory=monotonic)  # whether its node is there


class ForwardTask:
    """Forwards of `prompts` by the engine's model in float32 and in `dtypes`, in a process without vLLM.

    It asks Ray for no CPU, because engines may hold all of them, and takes the cores of its node: engines that load use
    one each, those that are up wait for it. OMP_NUM_THREADS of the command limits it. It does ask for memory, where a node
    has as much. Ray itself repeats nothing: it would do so on the same node, and for ever where memory runs out.
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
        self._arguments = (threads, compute, engine.model, prompts, engine.kept, dtypes)
        self._cost = forward_cost(engine.model, tokens, 1 + len(dtypes))
        self._failed_on: list[str] = []
        self._failures = self._losses = 0
        self._said_small = False
        self._result: Forwards | None = None
        self._waits = Waits()
        self._attempt = self._submit(alive_nodes())

    def _submit(self, nodes: dict[str, Node], ask: bool = True) -> _Attempt:
        """ask: for memory, on whichever node Ray finds; else the node with the most is taken."""
        need = self._cost.memory_bytes
        rest = {id_: node.resources.get("memory", 0) for id_, node in nodes.items() if id_ not in self._failed_on}
        largest = max(rest, key=lambda id_: rest[id_], default=None)
        memory = need if ask and largest and rest[largest] >= need else 0
        where = f"!in({','.join(self._failed_on)})" if self._failed_on else None
        if largest and not memory:
            where = f"in({largest})"
            if ask and not self._said_small:
                self._said_small = True
                self._note(
                    f"the transformers forward with which engines are compared takes about {gib(need)} of memory, and no node has as "
                    f"much for Ray (the most is {gib(rest[largest])}, on {nodes[largest].name}, which is tried); --no-canary goes on "
                    "without it"
                )
        selector = {"ray.io/node-id": where} if where else None
        task: Any = ray.remote(on_a_node).options(
            num_cpus=0, memory=memory or None, max_retries=0, num_returns="streaming", label_selector=selector
        )
        return _Attempt(task.remote(*self._arguments), memory)

    def result(self, seconds: float = 0.0) -> Forwards | None:
        """What came out, None as long as it runs; waits up to `seconds`. RuntimeError where it failed on several nodes, or
        on the only one."""
        attempt = self._attempt
        if self._result is not None:
            return self._result
        if attempt.error is not None or HeadWatch.silent:  # then nobody can say which nodes there are
            time.sleep(seconds)
        elif ray.wait([attempt.answers], timeout=seconds)[0]:
            try:
                value = ray.get(next(attempt.answers))
            except Exception as error:
                attempt.error, attempt.since = cause(error), monotonic()
            else:
                if attempt.node:
                    self._result = value
                    return value
                attempt.node, attempt.since = value[0], monotonic()
                attempt.seconds = self._cost.seconds(value[1])
        if not HeadWatch.silent:
            self._judge(attempt)
        return None

    def _judge(self, attempt: _Attempt) -> None:
        """What follows from an error, or from an attempt that takes too long."""
        waited, error = monotonic() - attempt.since, attempt.error
        if error is None:
            if attempt.node and monotonic() - attempt.looked > LOOK_SECONDS:
                attempt.looked = monotonic()
                if attempt.node not in alive_nodes():
                    self._lost("its node has left the cluster")
                    return
            if attempt.node and waited > attempt.seconds:
                ray.cancel(attempt.answers, force=True)
                self._failed(attempt.node, f"it has not ended within {duration(waited)}")
            elif not attempt.node and waited > (PLACE_SECONDS if attempt.memory else BEGIN_SECONDS):
                ray.cancel(attempt.answers, force=True)
                if not attempt.memory:
                    self._lost(f"it has not begun within {duration(waited)}")
                    return
                self._note(
                    f"the transformers forward with which engines are compared waited {duration(waited)} for {gib(attempt.memory)} of "
                    "Ray's memory; it begins without"
                )
                self._attempt = self._submit(alive_nodes(), ask=False)
        elif not attempt.node:
            self._lost(one_line(error))
        elif not isinstance(error, ray.exceptions.RayError) or isinstance(error, ray.exceptions.RayTaskError):
            self._failed(attempt.node, one_line(error), memory="memory" in str(error).lower())
        elif isinstance(error, ray.exceptions.OutOfMemoryError):
            self._failed(attempt.node, "Ray killed its process, since the node ran out of memory", memory=True)
        elif attempt.node not in alive_nodes():
            self._lost("its node has left the cluster")
        elif waited > VERDICT_SECONDS:
            self._failed(attempt.node, "its process was killed, as happens where memory runs out", memory=True)

    def _lost(self, reason: str) -> None:
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise self._given_up(reason, "")
        self._note(f"the transformers forward with which engines are compared is lost: {reason}; it begins again")
        self._attempt = self._submit(alive_nodes())

    def _failed(self, node: str, reason: str, memory: bool = False) -> None:
        """It has failed for the sake of its node, or of the model. memory: for want of it, which may be free later."""
        self._failures += 1
        self._failed_on.append(node)
        nodes = alive_nodes()
        others = [one for one in nodes if one not in self._failed_on]
        name = nodes[node].name if node in nodes else f"node {node[:8]}"
        if self._failures >= MAX_FAILURES or not (others or memory):
            more = (
                f"it takes about {gib(self._cost.memory_bytes)}: give the cluster a node that has as much; "
                if memory
                else ""
            )
            raise self._given_up(f"{reason} ({name})", more)
        then = "tried elsewhere" if others else "tried there once more"
        self._note(f"the transformers forward with which engines are compared failed on {name}: {reason}; {then}")
        if not others:
            self._failed_on.clear()
        self._attempt = self._submit(nodes)

    def _given_up(self, reason: str, more: str) -> RuntimeError:
        return RuntimeError(
            f"the transformers forward of {self._model} that engines are compared with failed: {reason}; {more}--no-canary goes on "
            "without it"
        )

    def tell(self, waited_for: bool) -> None:
        """Say when it begins and ends to be what the run waits for."""
        what = self._what if waited_for and self._result is None else None
        if what and not self._attempt.node and self._attempt.memory:
            what += f"; it begins where Ray has {gib(self._attempt.memory)} of memory free on a node"
        over = "the wait for the transformers forward is over"
        if line := self._waits.update(monotonic(), "", what, SAID_AFTER_SECONDS, over):
            self._note(line)

    def wait(self, should_stop: Callable[[], bool]) -> Forwards:
        """The result, however long it takes; Stopped where a signal came."""
        while True:
            result = self.result(0.5)
            self.tell(result is None)
            if result is not None:
                return result
            if should_stop():
                ray.cancel(self._attempt.answers, force=True)
                raise Stopped("stopped by a signal")
            require_ray()
