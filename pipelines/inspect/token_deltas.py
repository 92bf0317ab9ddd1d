"""What ReMiT makes of each token of some rows: log-probs of reference and base, their difference, the weight.

In: rows of a folder, the base's log-probs as a stored column or from a model. Out: the figures of every token, NaN
where nothing precedes it. T = tokens of a row, N = those of them with log-probs of both. Nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scorer.forward import load_forward
from shards.entropy import entropy_columns
from shards.folder import ShardFolder
from shards.manifest import Manifest
from shards.rows import Rows
from trainer.objectives.remit import remit_weights

Forward = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Base:
    """Whose losses the reference is compared with: a stored column, or a model's forward; neither: nobody's.

    name: for the page. context: that both were, or are, scored in. column: name of the reference whose log-probs it is.
    """

    name: str | None
    context: str
    column: str | None = None
    forward: Forward | None = None


@dataclass(frozen=True)
class TokenFigures:
    """Of a row, float32 [T]: log-probs, delta = log p(reference) - log p(base), delta minus its mean over the row,
    ReMiT weight. clipped_T, int8: -1 where the weight was raised to 1 - epsilon, 1 where it was cut to 1 + epsilon.
    entropy_T: of the reference's prediction at temperature 1, where it is stored and was read. predict_T, bool: False where
    a token is not to be predicted: it has log-probs, and neither delta nor weight."""

    reference_T: np.ndarray
    base_T: np.ndarray
    delta_T: np.ndarray
    centred_T: np.ndarray
    weight_T: np.ndarray
    clipped_T: np.ndarray
    entropy_T: np.ndarray
    predict_T: np.ndarray


def choose_base(folder: ShardFolder, reference: str, base: str | None, model: Path | None) -> Base:
    """Where the base's log-probs come from: `model`, else the column `base`, else the column called base if there is one.

    ValueError where a column is missing, the two were scored in different contexts, or the model does not fit the rows.
    """
    context = folder.require_scored(reference)["context"]
    if model is not None:
        from scorer.reference import Reference, check_reference, require_quantised_readable

        check_reference(folder, Reference(model, model.name))
        require_quantised_readable(model)
        name = model.resolve().name
        return Base(name if name != reference else f"{name} (base)", context, forward=load_forward(model))
    if base is None and ("base" not in folder.manifest.references or reference == "base"):
        return Base(None, context)
    name = base or "base"
    return Base(name, folder.require_one_context(reference, name), column=name)


def token_figures(row: Rows, reference: str, base: Base, epsilon: float) -> TokenFigures:
    """The figures of one row; all NaN of a model whose column the row was left out of (quarantine)."""
    reference_T = row.logprobs(reference)
    base_T = row.logprobs(base.column) if base.column is not None else np.full_like(reference_T, np.nan)
    if base.forward is not None:
        for start, end, _ in row.spans(base.context):
            base_T[start + 1 : end] = base.forward(row.ids[start:end])
    predict_T = row.predict
    both_T = np.isfinite(reference_T) & np.isfinite(base_T) & predict_T
    delta_T, centred_T, weight_T = (np.full_like(reference_T, np.nan) for _ in range(3))
    clipped_T = np.zeros(len(reference_T), dtype=np.int8)
    if both_T.any():
        losses_N, logprobs_N = torch.from_numpy(-base_T[both_T]), torch.from_numpy(reference_T[both_T])
        weighted = remit_weights(losses_N, logprobs_N, epsilon)
        assert weighted.delta_N is not None
        delta_T[both_T] = weighted.delta_N.numpy()
        centred_T[both_T] = (weighted.delta_N - weighted.delta_N.mean()).numpy()
        weight_T[both_T] = weighted.weights_N.numpy()
        assert weighted.clipped_low_N is not None
        assert weighted.clipped_high_N is not None
        clipped_T[both_T] = (weighted.clipped_high_N.int() - weighted.clipped_low_N.int()).numpy()
    entropy = entropy_column(row.part.manifest, reference)
    is_read = entropy in row.batch.schema.names
    entropy_T = row.values(entropy) if entropy and is_read else np.full_like(reference_T, np.nan)
    return TokenFigures(reference_T, base_T, delta_T, centred_T, weight_T, clipped_T, entropy_T, predict_T)


def entropy_column(manifest: Manifest, reference: str) -> str | None:
    """Column of the reference's entropy at temperature 1; None where it is not stored."""
    return next(iter(entropy_columns(reference, manifest.references[reference])), None)
