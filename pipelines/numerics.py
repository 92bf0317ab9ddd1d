"""How far a stored column is from a transformers forward of its reference, and what that does to ReMiT's weights.

In: an annotated folder and the reference model. Out: differences over random rows, as a table and as JSON.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from pipelines.terminal import print_table
from scorer.canary import BIAS_DEVIATIONS, Distance, Limits
from scorer.forward import load_forward
from scorer.reference import require_quantised_readable
from scorer.rowcheck import round_logprobs
from shards.entropy import entropy_columns
from shards.fingerprint import weights_fingerprint
from shards.folder import ShardFolder
from shards.modelfolder import require_language_model
from shards.rows import Rows
from shards.samples import excess
from shards.schema import logprobs_column, sample_column, topk_columns
from trainer.objectives.remit import remit_weights

WEIGHT_CHANGE = 0.02
AS_GOOD_AS_EXACT, NOISE = 0.01, 0.1  # shares of weights that change by more than WEIGHT_CHANGE


@dataclass(frozen=True)
class Numerics:
    """Differences stored - rescored over `tokens` log-probs, in nats; shares of tokens whose weight differs.

    weights_changed: by more than 0.02; clip_changed: clipped with the one log-prob and not with the other. Both
    with the losses of `base`; where none is given the reference stands in for it, which makes every weight as
    sensitive as it can be. topk_mean, entropy_mean: mean |difference| of the stored most probable tokens, and of the stored
    entropies and log partition sums; None where there are none. sample_excess: by how much the share of the most probable token
    among the drawn ones is further from its probability than draws can be, in the mean.

    tolerance, topk_tolerance, entropy_tolerance: largest means that pass; bias_tolerance: largest |bias - rounding_bias|, which is what
    rounding to the column's step adds to these very log-probs. They come from own_mean: mean |difference| between a
    transformers forward in the column's dtype and one in float32, on the same rows.
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
    dtype: str
    own_mean: float
    tolerance: float
    rounding_bias: float
    bias_tolerance: float
    topk_mean: float | None = None
    topk_tolerance: float | None = None
    entropy_mean: float | None = None
    entropy_tolerance: float | None = None
    sample_excess: float | None = None

    @property
    def passes(self) -> bool:
        if self.topk_mean is not None and not self.topk_mean <= (self.topk_tolerance or 0.0):
            return False
        if self.entropy_mean is not None and not self.entropy_mean <= (self.entropy_tolerance or 0.0):
            return False
        if self.sample_excess is not None and not self.sample_excess <= self.tolerance:
            return False
        if not np.isfinite(self.tolerance):  # a forward in that dtype overflows: nothing tells what is right
            return False
        return self.mean <= self.tolerance and abs(self.bias - self.rounding_bias) <= self.bias_tolerance

    @property
    def verdict(self) -> str:
        """What the share of weights that change means for training."""
        line = f"{self.weights_changed:.1%} of ReMiT's weights change by more than {WEIGHT_CHANGE}"
        if not self.passes:
            return f"{line}, and the column is not what the model gives in {self.dtype}: do not train from it"
        if self.weights_changed < AS_GOOD_AS_EXACT:
            return f"{line}: as good as exact"
        if self.weights_changed < NOISE:
            return f"{line}: little beside what the clip lets through; --dtype float32 is exact"
        part = "a third" if 0.28 < self.weights_changed < 0.4 else f"{self.weights_changed:.0%}"
        better = "float32" if self.dtype == "float16" else "float16 or float32"
        return f"{line}: {part} of ReMiT's weights are noise at this precision; score with --dtype {better}"


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
    reference = folder.require_scored(name)
    forward = load_forward(model)
    if base:
        require_language_model(base)
        require_quantised_readable(base)
    base_forward = load_forward(base) if base else forward
    dtype, step = reference["dtype"], reference["logprob_step"]
    own_forward = forward if dtype == "float32" else load_forward(model, dtype)
    chosen = np.random.default_rng(seed).permutation(folder.manifest.rows)[:rows]
    differences: list[np.ndarray] = []
    own_differences: list[np.ndarray] = []
    rounding: list[np.ndarray] = []
    top_differences: list[tuple[np.ndarray, np.ndarray]] = []
    entropy_differences: list[tuple[np.ndarray, np.ndarray]] = []
    drawn: list[np.ndarray] = []
    changed = clip_changed = used = weighed = 0
    entropies = list(entropy_columns(name, reference))
    columns = [logprobs_column(name), *(topk_columns(name) if reference.get("top_k") else ()), *entropies]
    columns += [sample_column(name)] if reference.get("sample_k") else []
    for row in folder.rows(np.sort(chosen), columns):
        stored, again, own, losses = _row(row, name, forward, own_forward, base_forward)
        if reference.get("top_k"):
            top_differences.append(_top_row(row, name, forward, own_forward))
        if reference.get("sample_k"):
            drawn.append(_sample_row(row, name, forward))
        if entropies:
            entropy_differences.append(_entropy_row(row, name, forward, own_forward))
        on_row()
        if not len(stored):
            continue
        used += 1
        differences.append(stored - again)
        own_differences.append(own - again)
        rounding.append(round_logprobs(again.astype(np.float32), step) - again)
        trained = _trained(row, name)
        weighed += int(trained.sum())
        if not trained.any():
            continue
        losses_N = torch.from_numpy(losses[trained])
        with_stored, with_again = (
            remit_weights(losses_N, torch.from_numpy(values[trained]), epsilon) for values in (stored, again)
        )
        changed += int(((with_stored.weights_N - with_again.weights_N).abs() > WEIGHT_CHANGE).sum())
        for kind in ("clipped_low_N", "clipped_high_N"):
            clip_changed += int((getattr(with_stored, kind) != getattr(with_again, kind)).sum())
    if not differences:
        raise ValueError(f"{folder.path}: none of {len(chosen)} rows has a log-prob to compare; raise --rows")
    all_, own_all = np.concatenate(differences), np.concatenate(own_differences)
    topk, own_topk = _means(top_differences)
    entropy, own_entropy = _means(entropy_differences)
    rms = float(np.sqrt((own_all**2).mean()))
    own_distance = Distance(len(all_), float(np.abs(own_all).mean()), rms, 0.0, 0.0, own_topk, 0.0, own_entropy)
    limits = Limits(dtype, own_distance)
    return Numerics(
        reference=name,
        rows=used,
        tokens=len(all_),
        mean=float(np.abs(all_).mean()),
        max=float(np.abs(all_).max()),
        bias=float(all_.mean()),
        weights_changed=changed / max(1, weighed),
        clip_changed=clip_changed / max(1, weighed),
        epsilon=epsilon,
        base=None if base is None else base.name,
        dtype=dtype,
        own_mean=own_distance.mean,
        tolerance=limits.mean + step / 2,
        rounding_bias=float(np.concatenate(rounding).mean()),
        bias_tolerance=limits.bias(len(all_)) + BIAS_DEVIATIONS * step / 2 / len(all_) ** 0.5,
        topk_mean=topk,
        topk_tolerance=None if topk is None else limits.topk_mean + step / 2,
        entropy_mean=entropy,
        entropy_tolerance=None if entropy is None else limits.entropy_mean + step / 2,
        sample_excess=float(np.concatenate(drawn).mean()) if drawn else None,
    )


def _means(differences: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float | None, float]:
    """Means of |stored - rescored| and of |in the column's dtype - rescored|, per row arrays of both; None and 0 for no rows."""
    if not differences:
        return None, 0.0
    stored, own = (float(np.concatenate(sizes).mean()) for sizes in zip(*differences))
    return stored, own


def _entropy_row(row: Rows, name: str, forward: Callable, own_forward: Callable) -> tuple[np.ndarray, np.ndarray]:
    """As `_top_row`, of the entropies and log partition sums of a row."""
    reference = row.part.manifest.references[name]
    temperature = reference.get("entropy_temperature")
    temperatures = (1.0,) if temperature is None else (1.0, temperature)
    stored_TE = np.stack([row.values(column) for column in entropy_columns(name, reference)], axis=1)
    found, own = [np.zeros(0)], [np.zeros(0)]
    for start, end in _scored_spans(row, name):
        prompt = row.ids[start:end]
        again_NE = forward(prompt, temperatures=temperatures).entropies.astype(np.float64)
        found.append(np.abs(stored_TE[start + 1 : end] - again_NE).ravel())
        if own_forward is not forward:
            own.append(np.abs(own_forward(prompt, temperatures=temperatures).entropies - again_NE).ravel())
        else:
            own.append(np.zeros(again_NE.size))
    return np.concatenate(found), np.concatenate(own)


def _sample_row(row: Rows, name: str, forward: Callable) -> np.ndarray:
    """`excess` of the drawn tokens of a row, at each place that has any."""
    found, ids_TS = [np.zeros(0)], row.values(sample_column(name))
    for start, end in _scored_spans(row, name):
        best = forward(row.ids[start:end], best=1)
        probabilities = np.exp(best.topk_logprobs[:, 0].astype(np.float64))
        found.append(excess(ids_TS[start + 1 : end], best.topk_ids[:, 0], probabilities))
    return np.concatenate(found)


def _top_row(row: Rows, name: str, forward: Callable, own_forward: Callable) -> tuple[np.ndarray, np.ndarray]:
    """|stored - rescored| of the most probable tokens of a row, and |in the column's dtype - rescored| of the same."""
    found, own = [np.zeros(0)], [np.zeros(0)]
    ids_TK, stored_TK = row.topk(name)
    for start, end in _scored_spans(row, name):
        prompt, ids_NK = row.ids[start:end], ids_TK[start + 1 : end]
        kept_N = ids_NK[:, 0] >= 0  # not all places have any with --top-k-below-entropy
        ids_NK = np.where(kept_N[:, None], ids_NK, 0)
        again_NK = forward(prompt, ids_NK=ids_NK)[1]
        found.append(np.abs(stored_TK[start + 1 : end].astype(np.float64) - again_NK)[kept_N].ravel())
        if own_forward is not forward:
            own.append(np.abs(own_forward(prompt, ids_NK=ids_NK)[1] - again_NK)[kept_N].ravel())
        else:
            own.append(np.zeros(again_NK[kept_N].size))
    return np.concatenate(found), np.concatenate(own)


def _row(
    row: Rows, name: str, forward: Callable, own_forward: Callable, base_forward: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Stored log-probs of a row, those rescored in float32 and in the column's dtype, and the base's losses: float64
    [tokens that have one]."""
    stored, again, own, losses = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    for start, end in _scored_spans(row, name):
        ids = row.ids[start:end]
        stored.append(row.logprobs(name)[start + 1 : end].astype(np.float64))
        again.append(forward(ids).astype(np.float64))
        own.append(own_forward(ids).astype(np.float64) if own_forward is not forward else again[-1])
        losses.append(-base_forward(ids).astype(np.float64) if base_forward is not forward else -again[-1])
    return np.concatenate(stored), np.concatenate(again), np.concatenate(own), np.concatenate(losses)


def _trained(row: Rows, name: str) -> np.ndarray:
    """Which of the tokens that `_row` gives figures of are to be predicted, bool."""
    trained = row.trained(row.part.manifest.references[name]["context"])
    return np.concatenate(
        [np.zeros(0, dtype=bool), *(trained[start + 1 : end] for start, end in _scored_spans(row, name))]
    )


def _scored_spans(row: Rows, name: str) -> list[tuple[int, int]]:
    """What was conditioned on together in a row: first token and one past the last; nothing of a quarantined row."""
    spans = row.spans(row.part.manifest.references[name]["context"])
    return [(start, end) for start, end, _ in spans] if row.scored(name).all() else []


def show(numerics: Numerics, console: Console) -> None:
    """The table."""
    rows = {
        "column": logprobs_column(numerics.reference),
        "compared": f"{numerics.tokens:,} log-probs in {numerics.rows:,} rows, with a float32 forward",
        "mean |difference|": f"{numerics.mean:.2e} nat (at most {numerics.tolerance:.2e})",
        f"the model in {numerics.dtype}": f"{numerics.own_mean:.2e} nat from float32",
        "max |difference|": f"{numerics.max:.2e} nat",
        "bias": f"{numerics.bias:+.2e} nat (at most {numerics.bias_tolerance:.2e} from {numerics.rounding_bias:+.2e}, "
        "which rounding gives)",
        f"weights changed by > {WEIGHT_CHANGE}": f"{numerics.weights_changed:.3%}",
        "clipped in one only": f"{numerics.clip_changed:.3%}",
        "losses of the base": f"of {numerics.base}" if numerics.base else "the reference stands in; --base gives one",
    }
    if numerics.topk_mean is not None:
        rows["mean |difference| of the top k"] = f"{numerics.topk_mean:.2e} nat (at most {numerics.topk_tolerance:.2e})"
    if numerics.entropy_mean is not None:
        rows["mean |difference| of entropies"] = (
            f"{numerics.entropy_mean:.2e} nat (at most {numerics.entropy_tolerance:.2e})"
        )
    if numerics.sample_excess is not None:
        rows["shares of drawn tokens"] = (
            f"off by {numerics.sample_excess:.2e} more than draws are (at most {numerics.tolerance:.2e})"
        )
    print_table(console, ["", ""], rows.items(), left=2, ruled=False)
    console.print(numerics.verdict)
