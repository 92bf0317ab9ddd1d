"""How large an engine is, how many the cluster has room for, and waiting for nodes that have any."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import ceil

import ray

from scorer.cluster import nodes_may_join, require_ray
from scorer.config import ScoreConfig
from scorer.stopping import Stopped
from scorer.waiting import Waits, counted

KEYS = {"cuda": "GPU", "cpu": "CPU"}
SAID_AFTER_SECONDS = 3.0


@dataclass(frozen=True)
class Node:
    """A node that is alive. name: its host, and the beginning of Ray's id, which `ray list nodes` shows."""

    id: str
    name: str
    resources: dict[str, float]

    def room(self, bundle: dict[str, float]) -> int:
        """How many engines it would carry if nothing else ran on it."""
        key, each = next(iter(bundle.items()))
        return int(self.resources.get(key, 0) // each)


def alive_nodes() -> dict[str, Node]:
    """The nodes of the cluster by their ids."""
    return {
        node["NodeID"]: Node(
            node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})", node.get("Resources", {})
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def wait_for_nodes(
    key: str, should_stop: Callable[[], bool], note: Callable[[str], None], each: int = 1, why: str = ""
) -> None:
    """Return once the cluster has a node with `each` of `key` (GPU, CPU); Stopped where a signal came.

    The nodes of a cluster come in any order, the small ones first perhaps. A private Ray gets no more: it returns at once.
    why: the option that asks for more than one.
    """
    waits = Waits()
    wanted = f"a node with a {key}" if each == 1 else f"a node with {each} {key}s"
    while True:
        require_ray()
        nodes = alive_nodes().values()
        most = max((int(node.resources.get(key, 0)) for node in nodes), default=0)
        what = None
        if most < each:
            has = (
                "none with one" if each == 1 else f"none with more than {most} ({why}, and an engine lives on one node)"
            )
            what = f"{wanted}; the cluster has {counted(len(nodes), 'node')} so far, {has}"
        line = waits.update(time.monotonic(), "", what, SAID_AFTER_SECONDS, f"{wanted} is there")
        if line:
            note(line)
        if most >= each or not nodes_may_join():
            return
        if should_stop():
            raise Stopped("stopped by a signal")
        time.sleep(0.5)


def cpus_per_engine(config: ScoreConfig, node_cpus: int) -> int:
    """Cores of a CPU engine on a node with `node_cpus`."""
    group = config.devices_per_engine
    # two narrow engines beat one wide one (docs/log.md); beyond that a model's memory counts more
    engines = config.num_engines or max(min(2, node_cpus // group), node_cpus // (4 * group), 1)
    return max(group, node_cpus // engines)


def engine_bundle(config: ScoreConfig, device: str) -> dict[str, float]:
    """Ray resources of one engine, all of them on one node; ValueError where no node has as many."""
    key = KEYS[device]
    per_node = [int(node.resources.get(key, 0)) for node in alive_nodes().values()]
    group = config.devices_per_engine
    if not any(per_node) and device == "cuda":
        raise ValueError(
            "the vLLM that is installed here needs a GPU, and this machine has none; in your checkout of remit: pip install "
            "'.[cpu]', or name a cluster with GPUs in RAY_ADDRESS"
        )
    if max(per_node) < group:
        raise ValueError(
            f"{size_options(config)}, but no node of the cluster has more than {max(per_node)} {key}s, and an "
            "engine lives on one node; lower it"
        )
    if device == "cuda":
        bundle = {"GPU": float(group)}
    elif config.num_engines and len(per_node) > 1:
        nodes = sum(count > 0 for count in per_node)
        each = replace(config, num_engines=ceil(config.num_engines / nodes))
        bundle = {"CPU": float(cpus_per_engine(each, max(per_node)))}
    else:
        bundle = {"CPU": float(cpus_per_engine(config, min(count for count in per_node if count >= group)))}
    if (config.num_engines or 0) > capacity(bundle, alive_nodes().values()) and not nodes_may_join():
        raise ValueError(
            f"--num-engines {config.num_engines} x {size_options(config, ' ')} is more than the cluster's {sum(per_node)} "
            f"{key}s; lower one of them"
        )
    return bundle


def size_options(config: ScoreConfig, verb: str = " is ") -> str:
    """The options that say how many GPUs or core groups an engine takes."""
    stages = config.devices_per_engine // config.tensor_parallel_size
    tail = f" with pipeline_parallel_size={stages}" if stages > 1 else ""
    return f"--tensor-parallel-size{verb}{config.tensor_parallel_size}{tail}"


def capacity(bundle: dict[str, float], nodes: Collection[Node]) -> int:
    """How many engines the nodes have room for."""
    return sum(node.room(bundle) for node in nodes)
