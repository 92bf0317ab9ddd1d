"""Independent computations that the tests compare against: transformers and float64, no code of this project."""

from pathlib import Path

import pyarrow.dataset
import torch
import transformers


def read_rows(shards: Path) -> list[dict]:
    """All rows of a shard folder, with pyarrow alone."""
    return pyarrow.dataset.dataset(shards, format="arrow").to_table().to_pylist()


def contexts(row: dict, context: str) -> list[tuple[int, int]]:
    """Start and end of what is conditioned on together: the row, or each document piece of it."""
    if context == "packed":
        return [(0, len(row["input_ids"]))]
    spans, start = [], 0
    for length in row["doc_lengths"]:
        spans.append((start, start + length))
        start += length
    return spans


def load(model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def row_logprobs(model: transformers.PreTrainedModel, row: dict, context: str) -> list[torch.Tensor | None]:
    """Natural log-prob of each token of a row by one forward per context; None where nothing precedes."""
    result: list[torch.Tensor | None] = []
    for start, end in contexts(row, context):
        ids = torch.tensor([row["input_ids"][start:end]])
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        result.append(None)
        result += [logprobs[t - 1, ids[0, t]] for t in range(1, end - start)]
    return result


def row_distributions(model: transformers.PreTrainedModel, row: dict, context: str) -> list[torch.Tensor | None]:
    """float64 [vocabulary] log-probs at each place of a row; None where nothing precedes."""
    result: list[torch.Tensor | None] = []
    for start, end in contexts(row, context):
        ids = torch.tensor([row["input_ids"][start:end]])
        result += [None, *model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)]
    return result


def remit_step(
    model: transformers.PreTrainedModel, rows: list[dict], context: str, column: str | None, epsilon: float
) -> dict:
    """Eq. 3-6 in float64 over the rows of one global batch; column None: plain next-token prediction."""
    total = plain = 0.0
    weights, deltas = [], []
    low = high = 0
    for row in rows:
        base = row_logprobs(model, row, context)
        positions = [t for t, value in enumerate(base) if value is not None]
        if not positions:
            continue
        losses = torch.stack([-base[t] for t in positions])
        w = torch.ones_like(losses)
        if column is not None:
            delta = losses.detach() - torch.tensor([-row[column][t] for t in positions], dtype=torch.float64)
            raw = 2 / (1 + torch.exp(-(delta - delta.mean())))
            low += int((raw < 1 - epsilon).sum())
            high += int((raw > 1 + epsilon).sum())
            w = raw.clip(1 - epsilon, 1 + epsilon)
            deltas.append(delta)
        total = total + (w * losses).sum()
        plain = plain + losses.detach().sum()
        weights.append(w)
    all_weights = torch.cat(weights)
    count = len(all_weights)
    return {
        "loss": total / count,
        "ntp_loss": plain.item() / count,
        "weight_mean": all_weights.mean().item(),
        "weight_std": all_weights.std(correction=0).item(),
        "clipped_low": low / count,
        "clipped_high": high / count,
        "delta_mean": torch.cat(deltas).mean().item() if deltas else None,
    }
