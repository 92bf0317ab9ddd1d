"""How far a stored column is from a transformers forward of its reference, and what that does to ReMiT's weights.

In: an annotated folder and the reference model. Out: differences over random rows, as a table and as JSON.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipelines.inspect.terminal import read_row
from scorer.canary import TOLERANCE
from scorer.forward import load_forward
from scorer.reference import require_quantised_readable
from shards.fingerprint import weights_fingerprint
from shards.folder import ShardFolder
from shards.modelfolder import require_language_model
from shards.schema import logprobs_column, topk_columns
from trainer.objectives.remit import remit_weights

WEIGHT_CHANGE = 0.02


@dataclass(frozen=True)
class Numerics:
    """Differences stored - rescored over `tokens` log-probs, in nats; shares of tokens whose weight differs.

    weights_changed: by more than 0.02; clip_changed: clipped with the one log-prob and not with the other. Both
    with the losses of `base`; where none is given the reference stands in for it, which makes every weight as
    sensitive as it can be. tolerance: largest mean that passes. topk_mean: mean |difference| of the stored most probable
    tokens, None where there are none.
    """

    reference: str
    rows: int
    tokens: int
    mean: float
    max: float
    bias: float
    weights_changed: float
    clip_changed: float
    epsilon: float
    base: str | None
    tolerance: float
    topk_mean: float | None = None

    @property
    def passes(self) -> bool:
        return self.mean <= self.tolerance and (self.topk_mean is None or self.topk_mean <= self.tolerance)


def choose_reference(folder: ShardFolder, model: Path, name: str | None) -> str:
    """The column that `model` has scored; ValueError where there is none, or the one named is another's."""
    require_language_model(model)
    require_quantised_readable(model)
    fingerprint = weights_fingerprint(model)
    if name is not None:
        scored = folder.require_reference(name)["weights_sha256"]
        if scored != fingerprint:
            raise ValueError(
                f"{model}: its weights {fingerprint[:12]}.. are not those that scored {logprobs_column(name)}, "
                f"{scored[:12]}..; give the model that scored it"
            )
        return name
    names = [key for key, value in folder.manifest.references.items() if value["weights_sha256"] == fingerprint]
    if not names:
        has = ", ".join(f"{key} ({value['model']})" for key, value in folder.manifest.references.items()) or "none"
        raise ValueError(
            f"{model}: its weights {fingerprint[:12]}.. scored no column of {folder.path}, which has: {has}; give the "
            "model that scored one"
        )
    return names[0]


def measure(
    folder: ShardFolder,
    model: Path,
    name: str | None,
    rows: int,
    base: Path | None,
    epsilon: float,
    seed: int,
    on_row: Callable[[], Any] = lambda: None,
) -> Numerics:
    """Rescore random rows of `folder` and compare; ValueError where `model` did not score the column."""
    name = choose_reference(folder, model, name)
    reference = folder.manifest.references[name]
    if reference.get("engine") == "fake":
        raise ValueError(f"{folder.path}: {logprobs_column(name)} comes from the fake engine, not from a model")
    forward = load_forward(model)
    if base:
        require_language_model(base)
        require_quantised_readable(base)
    base_forward = load_forward(base) if base else forward
    chosen = np.random.default_rng(seed).permutation(folder.manifest.rows)[:rows]
    differences: list[np.ndarray] = []
    top_differences: list[np.ndarray] = []
    changed = clip_changed = used = 0
    for row in sorted(map(int, chosen)):
        values = read_row(folder, row)
        stored, again, losses = _row(values, name, reference["context"], forward, base_forward)
        if reference.get("top_k"):
            top_differences.append(_top_row(values, name, reference["context"], forward))
        on_row()
        if not len(stored):
            continue
        used += 1
        differences.append(stored - again)
        with_stored = remit_weights(torch.from_numpy(losses), torch.from_numpy(stored), epsilon)
        with_again = remit_weights(torch.from_numpy(losses), torch.from_numpy(again), epsilon)
        changed += int(((with_stored.weights_N - with_again.weights_N).abs() > WEIGHT_CHANGE).sum())
        for kind in ("clipped_low_N", "clipped_high_N"):
            clip_changed += int((getattr(with_stored, kind) != getattr(with_again, kind)).sum())
    if not differences:
        raise ValueError(f"{folder.path}: none of {len(chosen)} rows has a log-prob to compare; raise --rows")
    all_ = np.concatenate(differences)
    return Numerics(
        reference=name,
        rows=used,
        tokens=len(all_),
        mean=float(np.abs(all_).mean()),
        max=float(np.abs(all_).max()),
        bias=float(all_.mean()),
        weights_changed=changed / len(all_),
        clip_changed=clip_changed / len(all_),
        epsilon=epsilon,
        base=None if base is None else base.name,
        tolerance=TOLERANCE[reference["dtype"]] + reference["logprob_step"] / 2,
        topk_mean=float(np.concatenate(top_differences).mean()) if top_differences else None,
    )


def _top_row(row: dict[str, Any], name: str, context: str, forward: Callable) -> np.ndarray:
    """|stored - rescored| of the most probable tokens of a row: the model's own log-probs of the stored ids."""
    ids_column, logprobs_column_ = topk_columns(name)
    found, start = [np.zeros(0)], 0
    for length in [len(row["input_ids"])] if context == "packed" else row["doc_lengths"]:
        here = slice(start + 1, start + length)
        if length > 1 and row[ids_column][start + 1] is not None:
            ids_NK, stored_NK = np.array(row[ids_column][here]), np.array(row[logprobs_column_][here])
            again_NK = forward(np.array(row["input_ids"][start : start + length]), ids_NK=ids_NK)[1]
            found.append(np.abs(stored_NK - again_NK).ravel())
        start += length
    return np.concatenate(found)


def _row(
    row: dict[str, Any], name: str, context: str, forward: Callable, base_forward: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored and rescored log-probs of a row and the base's losses, float64 [tokens that have one]."""
    stored, again, losses = [], [], []
    start = 0
    values = row[logprobs_column(name)]
    for length in [len(row["input_ids"])] if context == "packed" else row["doc_lengths"]:
        ids = np.array(row["input_ids"][start : start + length])
        if length > 1 and values[start + 1] is not None:  # else the row is quarantined
            stored.append(np.array(values[start + 1 : start + length], dtype=np.float64))
            again.append(forward(ids).astype(np.float64))
            losses.append(-base_forward(ids).astype(np.float64))
        start += length
    if not stored:
        return (np.zeros(0),) * 3
    return np.concatenate(stored), np.concatenate(again), np.concatenate(losses)


def show(numerics: Numerics, console: Console) -> None:
    """The table."""
    table = Table(box=None, show_header=False)
    rows = {
        "column": logprobs_column(numerics.reference),
        "compared": f"{numerics.tokens:,} log-probs in {numerics.rows:,} rows",
        "mean |difference|": f"{numerics.mean:.2e} nat (at most {numerics.tolerance:.2e})",
        "max |difference|": f"{numerics.max:.2e} nat",
        "bias": f"{numerics.bias:+.2e} nat",
        f"weights changed by > {WEIGHT_CHANGE}": f"{numerics.weights_changed:.3%}",
        "clipped in one only": f"{numerics.clip_changed:.3%}",
        "weights with the losses of": numerics.base or "the reference itself (no --base given)",
    }
    if numerics.topk_mean is not None:
        rows["mean |difference| of the top k"] = f"{numerics.topk_mean:.2e} nat"
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)
    console.print_json(data=asdict(numerics) | {"passes": numerics.passes}, indent=None)
