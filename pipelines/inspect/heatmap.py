"""remit inspect --html: rows of a folder as one page that colours each token by what ReMiT makes of it.

In: rows with the log-probs of a reference and, stored or computed now, of the base. Out: HTML that stands alone: its
style and script are in it, it loads nothing, and what comes from the corpus is data that the script writes as text.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.inspect.find_rows import Found, read_rows
from pipelines.inspect.token_deltas import Base, TokenFigures, choose_base, token_figures
from pipelines.pages import content_hash
from pipelines.plan.settings import WeightsConfig
from pipelines.plan.weights import weights_of_corpus
from pipelines.settings import InspectConfig
from pipelines.token_text import TokenText, token_label, token_strings
from shards.folder import ShardFolder
from shards.schema import has_predecessor, logprobs_column

MAX_TOKENS = 500_000  # of a page: about 40 MB, and seconds until a browser has laid it out
SAMPLE_ROWS = 2_000  # that the tokens of the folder are ranked over
TOP = 15
HERE = Path(__file__).parent
Progress = Callable[[str, int, int], None]


def heatmap(folder: ShardFolder, config: InspectConfig, found: Found, model: Path | None, progress: Progress) -> str:
    """The page of the rows. model: folder of the base that computes its log-probs now. progress(what, done, total)."""
    rows = found.rows
    tokens = len(rows) * folder.manifest.seq_len
    if len(rows) > 1 and tokens > MAX_TOKENS:
        raise ValueError(
            f"{len(rows):,} rows of up to {folder.manifest.seq_len} tokens are too many for one page, expected at most "
            f"{max(1, MAX_TOKENS // folder.manifest.seq_len):,} rows; choose fewer with --rows or --limit"
        )
    base = choose_base(folder, config.reference, config.base, model)
    text = TokenText(folder)
    data: list[dict[str, Any]] = []
    figures: list[tuple[list[int], TokenFigures]] = []
    for number, row in zip(rows, read_rows(folder, rows)):
        _check(folder, number, row)
        own = token_figures(row, config.reference, base, config.epsilon)
        data.append(_row(folder, number, row, own, text))
        figures.append((row["input_ids"], own))
        progress("rows", len(data), len(rows))
    ids = sorted({token_id for input_ids, _ in figures for token_id in input_ids})
    values = {
        "epsilon": config.epsilon if math.isfinite(config.epsilon) else None,
        "reference": config.reference,
        "base": base.name,
        "symbols": {token_id: text.symbol(token_id) for token_id in ids},
        "rows": data,
    }
    return render(
        data=values,
        folder=str(folder.path),
        chosen="; ".join((found.chosen, *found.remarks)),
        reference=config.reference,
        reference_model=folder.manifest.references[config.reference].get("model", "?"),
        base=base.name,
        computed=base.forward is not None,
        context=base.context,
        epsilon=f"{config.epsilon:g}",
        ranking=_ranking(folder, config, base, figures, progress),
    )


def render(**values: Any) -> str:
    """The template with style and script in it; a policy in the page lets no other script run and nothing load."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False, "separators": (",", ":"), "allow_nan": False,
    }  # fmt: skip
    style, *scripts = (
        (HERE / name).read_text(encoding="utf-8") for name in ("heatmap.css", "heatmap_text.js", "heatmap.js")
    )
    script = "\n".join(scripts)
    hashes = {f"{name}_hash": content_hash(content) for name, content in (("style", style), ("script", script))}
    return environment.get_template("heatmap.html").render(style=style, script=script, **hashes, **values)


def _check(folder: ShardFolder, number: int, row: dict[str, Any]) -> None:
    """ValueError where the columns of a row do not fit together, or hold what the format does not allow."""
    num_tokens, vocabulary = len(row["input_ids"]), folder.manifest.tokenizer["vocab_size"]
    where, remedy = f"{folder.path} row {number}", "run remit verify"
    if not (
        sum(row["doc_lengths"]) == num_tokens
        and len(row["doc_ids"]) == len(row["doc_lengths"])
        and all(0 <= token_id < vocabulary for token_id in row["input_ids"])
    ):
        raise ValueError(f"{where}: its token ids or document lengths are not those of the format; {remedy}")
    for name, reference in folder.manifest.references.items():
        column = logprobs_column(name)
        values_T = np.array(row[column], dtype=np.float64)  # None becomes NaN
        scored_T = has_predecessor(np.array([num_tokens]), np.array(row["doc_lengths"]), reference["context"])
        scored_T &= name not in row["quarantined"]
        if len(values_T) != num_tokens or not np.array_equal(np.isfinite(values_T) & (values_T <= 0), scored_T):
            raise ValueError(f"{where}: {column} is not a log-prob, at most 0, for each token with a context; {remedy}")


def _row(
    folder: ShardFolder, number: int, row: dict[str, Any], figures: TokenFigures, text: TokenText
) -> dict[str, Any]:
    """A row as the script reads it: lists by token, but groups, which are pairs of a number of tokens and their text."""
    groups, exact = text.groups(row["input_ids"])
    starts = np.cumsum([0, *row["doc_lengths"]])[:-1].tolist()
    return {
        "row": number,
        "part": folder.manifest.parts[number // folder.manifest.rows_per_part].name,
        "file": folder.manifest.corpus[row["source"]].path,
        "exact": exact,
        "documents": list(zip(starts, row["doc_ids"])),
        "quarantined": row["quarantined"],
        "ids": row["input_ids"],
        "groups": groups,
        "reference": _numbers(figures.reference_T),
        "base": _numbers(figures.base_T),
        "delta": _numbers(figures.delta_T),
        "centred": _numbers(figures.centred_T),
        "weight": _numbers(figures.weight_T),
        "clipped": figures.clipped_T.tolist(),
    }


def _numbers(values_T: np.ndarray) -> list[float | None]:
    """Rounded for the page; None where there is none."""
    return [round(value, 4) if math.isfinite(value) else None for value in values_T.tolist()]


def _ranking(
    folder: ShardFolder,
    config: InspectConfig,
    base: Base,
    figures: list[tuple[list[int], TokenFigures]],
    progress: Progress,
) -> dict[str, Any] | None:
    """The tokens with the largest and the smallest mean weight: of the folder, where it has the base's log-probs of all
    rows, else of the rows shown. None where there are no weights."""
    if base.name is None:
        return None
    if base.column is None or folder.missing_parts():
        why = "the folder has no stored log-probs of this base" if base.column is None else "the folder is not complete"
        return _ranking_of_rows(folder, figures) | {
            "what": f"of the rows on this page, because {why}",
            "least": 1,
        }
    rows = min(SAMPLE_ROWS, folder.manifest.rows)
    least = 20 if folder.manifest.tokens / folder.manifest.rows * rows >= 100_000 else 2
    plan = WeightsConfig(
        shards=config.shards, reference=config.reference, base=base.name, epsilons=str(config.epsilon),
        show_epsilon=config.epsilon, rows=rows, top=TOP, min_count=least,
    )  # fmt: skip
    vocabulary = weights_of_corpus(folder, plan, lambda done, tokens: progress("rank tokens", done, rows))["vocabulary"]
    which = "all rows" if rows == folder.manifest.rows else f"{rows:,} random rows of {folder.manifest.rows:,}"
    return {
        "what": f"of the folder ({which})",
        "least": least,
        "up": _entries(vocabulary["up"]),
        "down": _entries(vocabulary["down"]),
    }


def _ranking_of_rows(folder: ShardFolder, figures: list[tuple[list[int], TokenFigures]]) -> dict[str, Any]:
    weights: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for input_ids, own in figures:
        for token_id, weight, delta in zip(input_ids, own.weight_T.tolist(), own.delta_T.tolist()):
            if math.isfinite(weight):
                weights[token_id].append((weight, delta))
    means = [(token_id, len(pairs), *np.mean(pairs, axis=0).tolist()) for token_id, pairs in weights.items()]

    def entries(sign: int) -> list[dict[str, Any]]:
        # clipped weights tie, so the excess loss decides next
        best = sorted(means, key=lambda mean: (sign * mean[2], sign * mean[3], mean[0]))[:TOP]
        strings = token_strings(folder, [mean[0] for mean in best])
        keys = ("token", "count", "weight_mean", "excess_loss_mean")
        return _entries([dict(zip(keys, (string, *mean[1:]))) for string, mean in zip(strings, best)])

    return {"up": entries(-1), "down": entries(1)}


def _entries(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "token": token_label(entry["token"]),
            "count": f"{entry['count']:,}",
            "weight": "-" if entry["weight_mean"] is None else f"{entry['weight_mean']:.3f}",
            "delta": f"{entry['excess_loss_mean']:+.3f}",
        }
        for entry in entries
    ]
