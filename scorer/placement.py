"""How large an engine is and how many the cluster has room for."""

from dataclasses import replace
from math import ceil

import ray

from scorer.config import ScoreConfig


def cpus_per_engine(config: ScoreConfig, node_cpus: int) -> int:
    """Cores of a CPU engine on a node with `node_cpus`."""
    group = config.devices_per_engine
    # two narrow engines beat one wide one (docs/log.md); beyond that a model's memory counts more
    engines = config.num_engines or max(min(2, node_cpus // group), node_cpus // (4 * group), 1)
    return max(group, node_cpus // engines)


def engine_bundle(config: ScoreConfig, device: str) -> dict[str, float]:
    """Ray resources of one engine, all of them on one node; ValueError where no node has as many."""
    key = "GPU" if device == "cuda" else "CPU"
    per_node = [int(node["Resources"].get(key, 0)) for node in ray.nodes() if node["Alive"]]
    group = config.devices_per_engine
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
    if (config.num_engines or 0) > capacity(bundle):
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


def capacity(bundle: dict[str, float]) -> int:
    """How many engines the nodes that are alive now have room for."""
    key, each = next(iter(bundle.items()))
    return sum(int(node["Resources"].get(key, 0) // each) for node in ray.nodes() if node["Alive"])
