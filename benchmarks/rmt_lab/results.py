"""The numbers of a seed, in the file that benchmarks.lab.results describes.

arm: one of graph.py; `base` is the pre-trained model. Beside the laboratory's metrics:
    bare_TIER, thought_TIER   shares of held-out positions whose next token is right, without and with a thought; _all: mean
    compute                   forwards of one token (compute.py) from the base on, and `steps`, optimizer steps
    thought_tokens, budget, outcome, closed, engine_difference    by step, means over some steps
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lab.results import RESULT, curve
from benchmarks.rmt_lab.compute import FORWARD, rmt_compute, train_compute
from benchmarks.rmt_lab.graph import RMT_ARMS, SLOW, WITHOUT_SCORES
from benchmarks.rmt_lab.measure import with_mean
from shards.folder import ShardFolder

if TYPE_CHECKING:
    from benchmarks.rmt_lab.graph import RmtSeed
    from pipelines.flywheel.run import Outcome

CURVES = ("budget", "thought_tokens", "outcome", "closed", "engine_difference")


def scoring(corpus: Path) -> int:
    """What scoring a corpus has cost. corpus: shard folder."""
    manifest = ShardFolder(str(corpus)).manifest
    return FORWARD * manifest.rows * manifest.seq_len


def compute_of_rmt(seed: "RmtSeed", run: Path) -> int:
    """Of the rmt arm, without the scoring of its corpus."""
    return rmt_compute(_json_lines(run / "metrics.jsonl"), seed.recipe.generations)


def collect(seed: "RmtSeed", outcome: "Outcome") -> dict[str, Any]:
    """The numbers of a seed whose stages are all done, as benchmarks.lab.results.write takes them."""
    records, folder = outcome.records, outcome.folder.path
    outputs = {name: folder / record["output"] for name, record in records.items()}
    rows: list[dict[str, Any]] = []

    def add(arm: str, stage: str, metric: str, value: float, step: int | None = None) -> None:
        rows.append({"arm": arm, "stage": stage, "metric": metric, "step": step, "value": value})

    for (arm, kind), stage in seed.measured.items():
        for metric, value in json.loads((outputs[stage.name] / RESULT).read_text(encoding="utf-8")).items():
            add(arm, kind, metric, value)
    corpus = scoring(outputs[seed.columns["rl"].name])
    for (arm, kind), stage in seed.models.items():
        if kind != "mid":
            continue
        lines = _json_lines(outputs[stage.name] / "metrics.jsonl")
        if arm in (*RMT_ARMS, SLOW):
            compute = rmt_compute(lines, seed.recipe.generations)
            for metric, value in with_thought(_json_lines(outputs[stage.name] / "evaluation.jsonl")).items():
                add(arm, kind, metric, value)
            policy = [line for line in lines if line["phase"] == "policy"]
            for step, means in curve(policy, CURVES):
                for metric, value in means.items():
                    add(arm, kind, metric, value, step - seed.recipe.format_steps)
        else:
            compute = train_compute(len(lines), seed.tokens_per_step)
        add(arm, kind, "compute", compute + (0 if arm in WITHOUT_SCORES else corpus))
        add(arm, kind, "steps", len(lines))
    versions: dict[str, set[str]] = {}
    for record in records.values():
        for package, version in record["versions"].items():
            versions.setdefault(package, set()).add(version)
    return {
        "seed": seed.seed, "size": seed.size, "recipe": asdict(seed.recipe),
        "seconds": {name.partition("/")[2]: record["seconds"] for name, record in records.items()},
        "versions": {package: sorted(found) for package, found in sorted(versions.items())},
        "code": sorted({record["code"] for record in records.values()}), "measurements": rows,
    }  # fmt: skip


def with_thought(evaluations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """thought_TIER of the finished model, and thought_all; closed_all: share of its thoughts that ended."""
    tiers = evaluations[-1]["tiers"]
    found = with_mean("thought", {name: figures["accuracy_with_thought"] for name, figures in tiers.items()})
    return found | {
        "closed_all": with_mean("closed", {name: each["closed"] for name, each in tiers.items()})["closed_all"]
    }


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
