"""remit inspect --html: rows of a folder as one page that colours each token by what ReMiT makes of it.

In: rows with the log-probs of a reference and, stored or computed now, of the base. Out: HTML that stands alone: its
style and script are in it, it loads nothing, and text of the corpus is escaped. A token is a span whose class is its
colour and whose data-n holds its figures. T = tokens of a row. Nats.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipelines.choose_rows import choose_rows
from pipelines.inspect.colours import LOW, colour_class, colour_rules, legends, scale, steps
from pipelines.inspect.find_rows import Found
from pipelines.inspect.settings import InspectConfig
from pipelines.inspect.token_deltas import Base, TokenFigures, choose_base, token_figures
from pipelines.pages import content_hash
from pipelines.terminal import counted
from pipelines.token_ranking import TokenRanking
from pipelines.token_text import TokenText, find_in_groups, printable, token_label
from shards.folder import ShardFolder
from shards.rows import Rows
from shards.schema import logprobs_column

MAX_TOKENS = 500_000  # of a page: about 45 MB, and seconds until a browser has laid it out
MANY = 20_000  # tokens: above, rows are laid out as they come into view
SAMPLE_ROWS = 2_000  # that the tokens of the folder are ranked over
TOP = 15
HERE = Path(__file__).parent
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PageRow:
    """A row with its figures. groups: tokens and text, as TokenText gives them; exact: whether they are the decoded row;
    facts: about it, for its head; documents: the first token of each document piece, and the document."""

    number: int
    ids: list[int]
    groups: list[tuple[int, str]]
    exact: bool
    facts: list[str]
    documents: list[tuple[int, int]]
    figures: TokenFigures


def page_of_rows(
    folder: ShardFolder, config: InspectConfig, found: Found, model: Path | None, progress: Progress
) -> str:
    """The page of the rows. model: folder of the base that computes its log-probs now. progress(what, done, total)."""
    numbers = found.rows
    tokens = len(numbers) * folder.manifest.seq_len
    if len(numbers) > 1 and tokens > MAX_TOKENS:
        raise ValueError(
            f"{len(numbers):,} rows of up to {folder.manifest.seq_len} tokens are too many for one page, expected at most "
            f"{max(1, MAX_TOKENS // folder.manifest.seq_len):,} rows; choose fewer with --rows or --limit"
        )
    base = choose_base(folder, config.reference, config.base, model)
    text = TokenText(folder)
    ranking = TokenRanking(folder.manifest.tokenizer["vocab_size"])
    rows: list[PageRow] = []
    for row in folder.rows(numbers, _columns(config, base)):
        rows.append(_page_row(folder, row, token_figures(row, config.reference, base, config.epsilon), text, config))
        _rank(ranking, row, rows[-1].figures)
        progress("rows", len(rows), len(numbers))
    full = {"delta": scale([row.figures.delta_T for row in rows])}
    full |= {"weight": config.epsilon if math.isfinite(config.epsilon) else 1.0, "reference": LOW}
    ids = np.unique(np.concatenate([np.array(row.ids) for row in rows])).tolist()
    return render(
        folder=str(folder.path),
        chosen="; ".join((found.chosen, *found.remarks)),
        reference=config.reference,
        reference_model=folder.manifest.references[config.reference].get("model", "?"),
        base=base.name,
        computed=base.forward is not None,
        context=base.context,
        epsilon=f"{config.epsilon:g}",
        legends=legends(config.reference, base.name, full),
        numbers=numbers,
        many=sum(len(row.ids) for row in rows) > MANY,
        rows=_spans(rows, full, config.search, base),
        symbols={token_id: text.symbol(token_id) for token_id in ids},
        ranking=_ranking(folder, text, config, base, ranking, progress),
    )


def render(**values: Any) -> str:
    """The template with style and script in it; a policy in the page lets no other script run and nothing load."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style += "\n".join(colour_rules())
    hashes = {f"{name}_hash": content_hash(content) for name, content in (("style", style), ("script", script))}
    return environment.get_template("page.html").render(style=style, script=script, **hashes, **values)


def _columns(config: InspectConfig, base: Base) -> list[str]:
    names = [config.reference, *([base.column] if base.column else [])]
    return ["input_ids", "doc_lengths", "doc_ids", "source", *map(logprobs_column, names)]


def _page_row(folder: ShardFolder, row: Rows, figures: TokenFigures, text: TokenText, config: InspectConfig) -> PageRow:
    manifest, number = folder.manifest, int(row.numbers[0])
    starts = (np.cumsum(row.doc_lengths) - row.doc_lengths).tolist()
    groups, exact = text.groups(row.ids.tolist())
    facts = [
        manifest.parts[number // manifest.rows_per_part].name,
        manifest.corpus[int(row.source[0])].path,
        counted(len(row.ids), "token"),
        counted(len(starts), "document piece"),
    ]
    if np.isfinite(figures.weight_T).any():
        facts.append(f"mean delta {np.nanmean(figures.delta_T):+.3f} nat")
        clipped_N = figures.clipped_T[np.isfinite(figures.weight_T)]
        if math.isfinite(config.epsilon):
            facts.append(f"clipped low {np.mean(clipped_N == -1):.0%}, high {np.mean(clipped_N == 1):.0%}")
    facts += [f"quarantined: no log-probs of {name}" for name in manifest.references if not row.scored(name)[0]]
    if not exact:
        facts.append("tokens as the vocabulary spells them: this tokenizer changes text across tokens")
    return PageRow(number, row.ids.tolist(), groups, exact, facts, list(zip(starts, row.doc_ids.tolist())), figures)


# --- tokens -----------------------------------------------------------------------------------------------


def _spans(rows: list[PageRow], full: dict[str, float], search: str | None, base: Base) -> Iterator[dict[str, Any]]:
    """The rows as the template reads them, one at a time. search: what to mark; the page shows its first match first.

    Groups are documents that begin there, tokens as pairs of the classes of their colours and their data-n, and text.
    """
    is_first_match = True
    by = ("delta", "weight") if base.name is not None else ("reference",)
    for row in rows:
        marks = find_in_groups(row.groups, search) if search else [[] for _ in row.groups]
        values = [getattr(row.figures, f"{name}_T") for name in by]
        own_steps = [steps(name, values_T, full[name]).tolist() for name, values_T in zip(by, values)]
        classes = [" ".join(filter(None, map(colour_class, by, of_token))) for of_token in zip(*own_steps)]
        classes = [own if scored else "none" for own, scored in zip(classes, np.isfinite(values[0]))]
        tokens = list(zip(classes, _numbers(row)))
        groups, place, documents = [], 0, list(row.documents)
        for (count, text), ranges in zip(row.groups, marks):
            begun = []
            while documents and documents[0][0] < place + count:  # also one that begins within a character
                begun.append(documents.pop(0)[1])
            groups.append((begun, tokens[place : place + count], _shown(text, ranges, is_first_match)))
            is_first_match = is_first_match and not ranges
            place += count
        yield {"number": row.number, "facts": row.facts, "groups": groups}


def _numbers(row: PageRow) -> list[str]:
    """data-n of each token: its position, id, and figures."""
    figures = row.figures
    columns = [
        ["-" if math.isnan(value) else f"{value + 0.0:{digits}}" for value in values_T.tolist()]  # no -0.0000
        for values_T, digits in (
            (figures.reference_T, ".4f"),
            (figures.base_T, ".4f"),
            (figures.delta_T, "+.4f"),
            (figures.centred_T, "+.4f"),
            (figures.weight_T, ".4f"),
        )
    ]
    clipped = ["-" if math.isnan(weight) else str(side) for weight, side in zip(figures.weight_T, figures.clipped_T)]
    places = map(str, range(len(row.ids)))
    return [" ".join(values) for values in zip(places, map(str, row.ids), *columns, clipped)]


def _shown(text: str, ranges: list[tuple[int, int]], is_first: bool) -> str:
    """The text of a group, as HTML where it is more than text. ranges: of its characters, what to mark; is_first: whether
    that is the page's first match."""
    if not text:  # the decoder drops this token
        return Markup('<span class="e">∅</span>')
    combines = unicodedata.category(text[0]).startswith("M")  # with a letter that is in another token
    if not ranges and not combines and text.isprintable():
        return text
    shown, end = Markup(), 0
    for start, stop in ranges:
        name = Markup(' id="match"') if is_first else ""
        shown += _visible(text[end:start]) + Markup("<mark{}>{}</mark>").format(name, _visible(text[start:stop]))
        end, is_first = stop, False
    shown += _visible(text[end:])
    return Markup('<span class="c">{}</span>').format(shown) if combines else shown


def _visible(text: str) -> Markup:
    """Escaped; what has no shape of its own, or steers the text around it, as an escape sequence in a box."""
    if text.isprintable():
        return escape(text)
    kinds = {"\n": "n", "\t": "tab"}  # these do what they do, after a sign
    return Markup().join(
        escape(character)
        if character.isprintable()
        else Markup('<span class="{}">{}</span>').format(
            kinds.get(character, "e"), character if character in kinds else printable(character)
        )
        for character in text
    )


# --- tokens of the folder ---------------------------------------------------------------------------------


def _ranking(
    folder: ShardFolder, text: TokenText, config: InspectConfig, base: Base, shown: TokenRanking, progress: Progress
) -> dict[str, Any] | None:
    """The tokens with the largest and the smallest mean weight: of the folder, where it has the base's log-probs of all
    rows, else of the rows shown. None where there are no weights."""
    if base.name is None:
        return None
    if base.column is None or folder.missing_parts():
        why = "the folder has no stored log-probs of this base" if base.column is None else "the folder is not complete"
        return _entries(text, shown, 1) | {"what": f"of the rows on this page, because {why}", "least": 1}
    manifest = folder.manifest
    chosen = choose_rows(manifest, SAMPLE_ROWS, 0)
    least = 20 if manifest.tokens / manifest.rows * len(chosen) >= 100_000 else 2
    ranking = TokenRanking(manifest.tokenizer["vocab_size"])
    for done, row in enumerate(folder.rows(chosen.tolist(), _columns(config, base))):
        _rank(ranking, row, token_figures(row, config.reference, base, config.epsilon))
        progress("rank tokens", done + 1, len(chosen))
    which = "all rows" if len(chosen) == manifest.rows else f"{len(chosen):,} random rows of {manifest.rows:,}"
    return _entries(text, ranking, least) | {"what": f"of the folder ({which})", "least": least}


def _rank(ranking: TokenRanking, row: Rows, figures: TokenFigures) -> None:
    both_T = np.isfinite(figures.weight_T)
    ranking.add(row.ids[both_T], figures.weight_T[both_T], figures.delta_T[both_T])


def _entries(text: TokenText, ranking: TokenRanking, least: int) -> dict[str, Any]:
    most = ranking.most(TOP, least)
    return {
        direction: [
            {
                "token": token_label(string),
                "count": f"{entry['count']:,}",
                "weight": "-" if entry["weight_mean"] is None else f"{entry['weight_mean']:.3f}",
                "delta": f"{entry['excess_loss_mean']:+.3f}",
            }
            for entry, string in zip(most[direction], text.strings([entry["id"] for entry in most[direction]]))
        ]
        for direction in ("up", "down")
    }
