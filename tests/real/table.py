"""How far scored log-probs of the real models are from a float32 forward, as a Markdown table.

python -m tests.real.table [MODEL ...]      # both contexts in every dtype, and losses with and without BOS
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .models import MODELS
from .project import CONTEXTS, STEP, Project, read_rows, stored

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Result:
    """Stored log-probs against a float32 forward, over `tokens` of them; errors and losses in nats.

    moved: share of ReMiT weights that change by more than 0.02 where the base is the reference itself, whose weights
    are all 1 if log-probs are exact; moved_rounded: with log-probs in steps of 1/64 nat, as stored by default.
    weight_std: of these. step: that the log-probs were stored in, 0 for exact ones.
    """

    model: str
    context: str
    dtype: str
    step: float
    tokens: int
    error: float
    bias: float
    moved: float
    moved_rounded: float
    weight_std: float
    loss: float
    loss_float32: float


def weights(logprobs: np.ndarray, truth: np.ndarray, epsilon: float = 0.2) -> np.ndarray:
    """ReMiT weights of a row (Eq. 3-5) whose base has the log-probs `truth`, float64 [predicted tokens]."""
    there = ~np.isnan(truth)
    delta = logprobs[there] - truth[there]  # base loss less reference loss
    return np.clip(2 / (1 + np.exp(-(delta - delta.mean()))), 1 - epsilon, 1 + epsilon)


def rounded(logprobs: np.ndarray) -> np.ndarray:
    return np.round(logprobs / STEP) * STEP


def result(project: Project, scored: Path, context: str) -> Result:
    """Compare a scored folder of `project.packed` with the float32 forward."""
    rows = read_rows(scored)
    truths = [project.truth(row, context) for row in rows]
    ours = [stored(row) for row in rows]
    truth, our = np.concatenate(truths), np.concatenate(ours)
    error = (our - truth)[~np.isnan(truth)]
    exact, stepped = (
        np.concatenate([weights(f(row), true) for row, true in zip(ours, truths)]) for f in (np.asarray, rounded)
    )
    reference = json.loads((scored / "_manifest.json").read_text())["references"]["rl"]
    return Result(
        model=project.name,
        context=context,
        dtype=reference["dtype"],
        step=reference["logprob_step"],
        tokens=len(error),
        error=float(np.abs(error).mean()),
        bias=float(error.mean()),
        moved=float((np.abs(exact - 1) > 0.02).mean()),
        moved_rounded=float((np.abs(stepped - 1) > 0.02).mean()),
        weight_std=float(stepped.std()),
        loss=-float(np.nanmean(our)),
        loss_float32=-float(np.nanmean(truth)),
    )


def render(results: list[Result]) -> str:
    lines = [
        "| model | context | dtype | steps of | log-probs | mean error (nat) | bias (nat) | weights moved by > 0.02 "
        "| in steps of 1/64 | std of the weights | loss (float32) |",
        "|---" * 11 + "|",
    ]
    lines += [
        f"| {r.model} | {r.context} | {r.dtype} | {f'1/{1 / r.step:.0f}' if r.step else 'exact'} | {r.tokens:,} "
        f"| {r.error:.4f} | {r.bias:+.4f} | {r.moved:.1%} | {r.moved_rounded:.1%} | {r.weight_std:.4f} "
        f"| {r.loss:.3f} ({r.loss_float32:.3f}) |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        results, losses = [], []
        for name in sys.argv[1:] or MODELS:
            project = Project(name, Path(work) / name)
            behind = project.losses_behind()
            losses.append(f"| {name} | " + " | ".join(f"{behind[what]:.3f}" for what in ("bos", "none", "eos")) + " |")
            for context in CONTEXTS:
                for dtype in DTYPES:
                    try:
                        scored = project.scored(context, "--dtype", dtype, "--logprob-step", 0)
                    except AssertionError as refused:
                        print(f"{name}, {context}, {dtype}: {str(refused).strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    results.append(result(project, scored, context))
                    print(results[-1], file=sys.stderr)
        print(render(results), "\n")
        print("| model | behind BOS | behind nothing | behind EOS |\n|---|---|---|---|", *losses, sep="\n")


if __name__ == "__main__":
    main()
