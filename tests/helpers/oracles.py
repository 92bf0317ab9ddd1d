"""Independent computations that the tests compare against: transformers and float64, no code of this project."""

import math
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


def is_trained(row: dict, token: int) -> bool:
    """Whether a token of a row is to be predicted, if something precedes it."""
    return "predict" not in row or row["predict"][token]


def remit_step(
    model: transformers.PreTrainedModel, rows: list[dict], context: str, column: str | None, epsilon: float
) -> dict:
    """Eq. 3-6 in float64 over the rows of one global batch; column None: plain next-token prediction."""
    total = plain = 0.0
    weights, deltas = [], []
    low = high = 0
    for row in rows:
        base = row_logprobs(model, row, context)
        positions = [t for t, value in enumerate(base) if value is not None and is_trained(row, t)]
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


def rho1_step(
    model: transformers.PreTrainedModel,
    rows: list[dict],
    context: str,
    column: str,
    kept_of: list[list[int]],
    ratio: float,
) -> dict:
    """RHO-1 in float64. kept_of: groups of row numbers whose tokens are ranked together, in the order of their rows."""
    losses = [row_logprobs(model, row, context) for row in rows]
    total, count, kept_tokens = 0.0, 0, []
    for group in kept_of:
        tokens = [
            (r, t) for r in group for t, value in enumerate(losses[r]) if value is not None and is_trained(rows[r], t)
        ]
        count += len(tokens)
        excess = {(r, t): -losses[r][t].item() + rows[r][column][t] for r, t in tokens}
        best = sorted(tokens, key=lambda place: (-excess[place], place))
        if tokens:
            kept_tokens += best[: max(1, int(ratio * len(tokens) + 0.5))]
    for r, t in kept_tokens:
        total = total - losses[r][t]
    plain = -sum(losses[r][t].item() for group in kept_of for r in group for t in range(len(losses[r]))
                 if losses[r][t] is not None and is_trained(rows[r], t)) / count  # fmt: skip
    return {"loss": total / (count * ratio), "ntp_loss": plain, "kept": len(kept_tokens), "predicted_tokens": count}


def kd_token(
    logprobs_V: torch.Tensor, ids: list[int], stored: list[float], temperature: float, missing_mass: str
) -> torch.Tensor:
    """KL(reference || base) of one token from the definition, float64, with base log-probs as given."""
    p = [torch.tensor(value, dtype=torch.float64).exp() for value in stored]
    total = sum(p)
    if total > 1:
        p, total = [value / total for value in p], torch.tensor(1.0, dtype=torch.float64)
    q = [logprobs_V[token].exp() for token in ids]
    if len(ids) == len(logprobs_V) or missing_mass == "renormalise":
        q = (logprobs_V / temperature).softmax(-1)[ids]
        p = torch.stack(p) ** (1 / temperature)
        p = p / p.sum()
    else:
        rest = torch.ones(len(logprobs_V), dtype=torch.bool)
        rest[ids] = False
        p = torch.stack([*p, 1 - total]) ** (1 / temperature)
        q = torch.stack([*q, logprobs_V[rest].exp().sum()]) ** (1 / temperature)
        p, q = p / p.sum(), q / q.sum()
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q) if a > 0)


def kd_step(model: transformers.PreTrainedModel, rows: list[dict], context: str, name: str, settings: dict) -> dict:
    """Distillation in float64 over the rows of one global batch."""
    weight, temperature = settings["kd_weight"], settings["temperature"]
    plain, kl, missing, count = 0.0, 0.0, 0.0, 0
    for row in rows:
        for t, logprobs_V in enumerate(row_distributions(model, row, context)):
            if logprobs_V is None or not is_trained(row, t):
                continue
            ids, stored = row[f"{name}_topk_ids"][t], row[f"{name}_topk_logprobs"][t]
            count += 1
            plain = plain - logprobs_V[row["input_ids"][t]]
            kl = kl + kd_token(logprobs_V, ids, stored, temperature, settings["missing_mass"])
            missing += max(0.0, 1 - sum(torch.tensor(stored, dtype=torch.float64).exp().tolist()))
    loss = ((1 - weight) * plain + weight * temperature**2 * kl) / count
    return {
        "loss": loss,
        "ntp_loss": plain.item() / count,
        "kd_loss": kl.item() / count,
        "missing_mass": missing / count,
    }


def rkl_token(
    logprobs_V: torch.Tensor,
    ids: list[int],
    stored: list[float],
    temperature: float,
    log_partition: float | None = None,
    least: float = 1e-6,
) -> torch.Tensor:
    """KL(base || reference) of one token from the definition, float64, with base log-probs as given.

    log_partition: of the reference at the temperature; None: the k + 1 outcomes at temperature 1 are softened.
    """
    stored_K = torch.tensor(stored, dtype=torch.float64)
    inside = torch.zeros(len(logprobs_V), dtype=torch.bool)
    inside[ids] = True
    if len(ids) == len(logprobs_V):
        p, q = (stored_K / temperature).softmax(-1), (logprobs_V / temperature).softmax(-1)[ids]
        return (q * (q.log() - p.log())).sum()
    exact = log_partition is not None
    p = (stored_K / temperature - log_partition).exp() if exact else stored_K.exp()
    q_V = (logprobs_V / temperature).softmax(-1) if exact else logprobs_V.exp()
    if 1 - p.sum() < least:
        p = p / p.sum() * (1 - least)
    p, q = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q_V[ids], q_V[~inside].sum(0, keepdim=True)])
    if not exact:
        p, q = p ** (1 / temperature), q ** (1 / temperature)
        p, q = p / p.sum(), q / q.sum()
    return torch.where(q > 0, q * (q.log() - p.log()), 0.0).sum()


def places(model: transformers.PreTrainedModel, rows: list[dict], context: str) -> list[tuple[int, int, torch.Tensor]]:
    """Row, position and float64 log-probs of every predicted token of a step that its reference has scored."""
    found = []
    for r, row in enumerate(rows):
        for t, logprobs_V in enumerate(row_distributions(model, row, context)):
            if logprobs_V is not None and row["rl_logprobs"][t] is not None:
                found.append((r, t, logprobs_V))
    return found


def of_token(row: dict, t: int, temperature: float, least: float) -> tuple:
    """What `rkl_token` takes of a stored token."""
    label = f"{temperature:g}".replace(".", "p")
    z = row.get(f"rl_log_partition_t{label}", {t: None})[t] if temperature != 1 else 0.0
    return row["rl_topk_ids"][t], row["rl_topk_logprobs"][t], temperature, z, least


def rkl_step(
    model: transformers.PreTrainedModel,
    rows: list[dict],
    context: str,
    kd_weight: float,
    temperature: float,
    least: float,
) -> dict:
    """Reverse KL in float64 over the rows of one global batch."""
    plain = kl = 0.0
    tokens = places(model, rows, context)
    for r, t, logprobs_V in tokens:
        plain = plain - logprobs_V[rows[r]["input_ids"][t]]
        kl = kl + rkl_token(logprobs_V, *of_token(rows[r], t, temperature, least))
    count = len(tokens)
    loss = ((1 - kd_weight) * plain + kd_weight * temperature**2 * kl) / count
    return {"loss": loss, "ntp_loss": plain.item() / count, "kd_loss": kl.item() / count}


def switch_step(
    model: transformers.PreTrainedModel,
    rows: list[dict],
    context: str,
    groups: list[list[int]],
    share: float,
    temperature: float,
    least: float,
) -> dict:
    """Switch distillation in float64. groups: row numbers of each scope; a scope counts by its predicted tokens."""
    label = f"{temperature:g}".replace(".", "p")
    column = "rl_entropy" if temperature == 1 else f"rl_entropy_t{label}"
    tokens = places(model, rows, context)
    loss, plain, kl_sum, chosen = 0.0, 0.0, 0.0, set()
    for group in groups:
        own = [token for token in tokens if token[0] in group]
        if not own:
            continue
        entropies = sorted(rows[r][column][t] for r, t, _ in own)
        tau = entropies[math.floor(share * (len(own) - 1) + 1e-9)]
        sure = [x for x in own if rows[x[0]][column][x[1]] <= tau and rows[x[0]]["rl_topk_ids"][x[1]] is not None]
        gated = {(r, t) for r, t, _ in sure}
        ce = [-logprobs_V[rows[r]["input_ids"][t]] for r, t, logprobs_V in own]
        kl = [rkl_token(logprobs_V, *of_token(rows[r], t, temperature, least)) for r, t, logprobs_V in sure]
        others = [value for value, (r, t, _) in zip(ce, own) if (r, t) not in gated]
        mean = (sum(others) / len(others) if others else 0.0) + (temperature**2 * sum(kl) / len(kl) if kl else 0.0)
        loss = loss + mean * len(own) / len(tokens)
        plain, kl_sum, chosen = plain + sum(ce).item(), kl_sum + sum(float(value) for value in kl), chosen | gated
    count = len(tokens)
    return {
        "loss": loss, "ntp_loss": plain / count, "kd_loss": kl_sum / max(1, len(chosen)), "gated": len(chosen) / count,
        "predicted_tokens": count,
    }  # fmt: skip
