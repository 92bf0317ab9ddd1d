"""remit inspect --html: rows of a folder as one page that colours each token by what ReMiT makes of it.

In: rows with the log-probs of a reference and, stored or computed now, of the base. Out: HTML that stands alone: its
style and script are in it, it loads nothing, and text of the corpus is escaped. A token is a span whose class is its
colour and whose data-n holds its figures. T = tokens of a row. Nats.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipelines.inspect.colours import LOW, classes, colour_rules, legends, scale
from pipelines.inspect.find_rows import Found
from pipelines.inspect.places import field_lines
from pipelines.inspect.ranking import ranking_for_page
from pipelines.inspect.settings import InspectConfig
from pipelines.inspect.token_deltas import TokenFigures, choose_base, entropy_column, token_figures
from pipelines.pages import content_hash
from pipelines.terminal import counted
from pipelines.token_text import TokenText, find_in_groups, printable
from shards.folder import ShardFolder
from shards.rows import Rows
from shards.schema import logprobs_column

MAX_TOKENS = 500_000  # of a page: about 45 MB, and seconds until a browser has laid it out
MANY = 20_000  # tokens: above, rows are laid out as they come into view
HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageRow:
    """A row for the template, without the columns that it was read from. facts: about it, for its head; tokens: the data-n
    of each; groups: documents that begin in one, its first token and one past its last, and its text."""

    number: int
    ids: list[int]
    facts: list[str]
    figures: TokenFigures
    tokens: list[str]
    groups: list[tuple[list[int], int, int, str]]


def page_of_rows(
    folder: ShardFolder, config: InspectConfig, found: Found, model: Path | None, progress: Callable[[int, int], None]
) -> str:
    """The page of the rows. model: folder of the base that computes its log-probs now. progress(rows done, rows)."""
    numbers, seq_len = found.rows, folder.manifest.seq_len
    if len(numbers) > 1 and len(numbers) * seq_len > MAX_TOKENS:
        raise ValueError(
            f"{len(numbers):,} rows of up to {seq_len} tokens are too many for one page, expected at most "
            f"{max(1, MAX_TOKENS // seq_len):,} rows; choose fewer with --rows or --limit"
        )
    base = choose_base(folder, config.reference, config.base, model)
    names = [config.reference, *([base.column] if base.column else [])]
    columns = ["input_ids", "doc_lengths", "doc_ids", "source", *map(logprobs_column, names)]
    entropy = entropy_column(folder.manifest, config.reference)
    columns += [entropy] if entropy else []
    text = TokenText(folder)
    rows: list[PageRow] = []
    for row in folder.rows(numbers, columns):
        rows.append(_page_row(folder, row, token_figures(row, config.reference, base, config.epsilon), text, config))
        progress(len(rows), len(numbers))
    full: dict[str, float] = {"reference": LOW}
    if base.name is not None:
        delta = scale([row.figures.delta_T for row in rows])
        full = {"delta": delta, "weight": config.epsilon if math.isfinite(config.epsilon) else 1.0}
    if entropy:
        full["entropy"] = scale([row.figures.entropy_T for row in rows])
    ids = set().union(*(row.ids for row in rows))
    shown = [(np.array(row.ids), row.figures) for row in rows]
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
        has_entropy=entropy is not None,
        has_predict=folder.manifest.predict,
        rows=((row, _classes(row, full)) for row in rows),
        symbols={token_id: text.symbol(token_id) for token_id in sorted(ids)},
        ranking=ranking_for_page(folder, text, config.reference, base, config.epsilon, shown),
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


def _page_row(folder: ShardFolder, row: Rows, figures: TokenFigures, text: TokenText, config: InspectConfig) -> PageRow:
    ids = row.ids.tolist()
    groups, exact = text.groups(ids)
    marks = find_in_groups(groups, config.search) if config.search else [[] for _ in groups]
    starts = (np.cumsum(row.doc_lengths) - row.doc_lengths).tolist()
    documents = list(zip(starts, row.doc_ids.tolist()))
    shown, place = [], 0
    for (count, own_text), ranges in zip(groups, marks):
        begun = []
        while documents and documents[0][0] < place + count:  # also one that begins within a character
            begun.append(documents.pop(0)[1])
        shown.append((begun, place, place + count, _shown(own_text, ranges)))
        place += count
    facts = _facts(folder, row, figures, config.epsilon)
    if not exact:
        facts.append("tokens as the vocabulary spells them: this tokenizer changes text across tokens")
    return PageRow(int(row.numbers[0]), ids, facts, figures, _numbers(ids, figures), shown)


def _classes(row: PageRow, full: dict[str, float]) -> list[str]:
    """Of each token, by its colours; full: of each way to colour the value that has all of a colour."""
    values = {by: getattr(row.figures, f"{by}_T") for by in full}
    of_each = [classes(by, values_T, full[by]) for by, values_T in values.items()]
    scored_T = np.isfinite(next(iter(values.values())))
    scored_T |= ~row.figures.predict_T & np.isfinite(row.figures.reference_T)  # which have no delta
    kinds = ["" if predict else "unpredicted" for predict in row.figures.predict_T]
    return [
        " ".join(filter(None, (*own, kind))) if scored else "none"
        for own, kind, scored in zip(zip(*of_each), kinds, scored_T)
    ]


def _facts(folder: ShardFolder, row: Rows, figures: TokenFigures, epsilon: float) -> list[str]:
    manifest = folder.manifest
    facts = [
        manifest.parts[int(row.numbers[0]) // manifest.rows_per_part].name,
        manifest.corpus[int(row.source[0])].path,
        counted(len(row.ids), "token"),
        counted(len(row.doc_ids), "document piece"),
        *field_lines(folder, row),
    ]
    if manifest.predict:
        facts.append(f"{counted(int(figures.predict_T.sum()), 'token')} to predict")
    clipped_N = figures.clipped_T[np.isfinite(figures.weight_T)]
    if len(clipped_N):
        facts.append(f"mean delta {np.nanmean(figures.delta_T):+.3f} nat")
        if math.isfinite(epsilon):
            facts.append(f"clipped low {np.mean(clipped_N == -1):.0%}, high {np.mean(clipped_N == 1):.0%}")
    return facts + [f"quarantined: no log-probs of {name}" for name in manifest.references if not row.scored(name)[0]]


def _numbers(ids: list[int], figures: TokenFigures) -> list[str]:
    """data-n of each token: its position, id, and figures."""
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
    entropies = ["-" if math.isnan(value) else f"{value:.4f}" for value in figures.entropy_T.tolist()]
    more = [] if all(entropy == "-" for entropy in entropies) else [entropies]
    return [" ".join(map(str, values)) for values in zip(range(len(ids)), ids, *columns, clipped, *more)]


def _shown(text: str, ranges: list[tuple[int, int]]) -> str:
    """The text of a group, as HTML where it is more than text. ranges: of its characters, what to mark."""
    if not text:  # the decoder drops this token
        return Markup('<span class="e">∅</span>')
    combines = unicodedata.category(text[0]).startswith("M")  # with a letter that is in another token
    if not ranges and not combines and text.isprintable():
        return text
    shown, end = Markup(), 0
    for start, stop in ranges:
        shown += _visible(text[end:start]) + Markup("<mark>{}</mark>").format(_visible(text[start:stop]))
        end = stop
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
