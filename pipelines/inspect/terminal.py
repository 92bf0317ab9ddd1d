"""remit inspect: what a shard folder is, and a readable view of its rows in the terminal."""

import sys

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.inspect.places import document_lines
from pipelines.inspect.settings import InspectConfig
from pipelines.provenance import print_lines, print_references, selection_line
from pipelines.terminal import counted, tokens_summary
from pipelines.token_text import TokenText, find_in_groups, printable, token_label
from shards.entropy import entropy_columns
from shards.folder import ShardFolder
from shards.rows import Rows

MAX_LABEL = 24  # characters of a token
BAR = 12  # marks, one per nat
ENTROPY_STYLE = "green"
MARK = "> "  # before the position of a token with text that was looked for
TEXT, BARS = "token", ""  # headers of columns


def show(folder: ShardFolder, config: InspectConfig, rows: list[int]) -> None:
    """Print the rows, or the folder's provenance where there are none."""
    console = Console(file=sys.stdout, highlight=False)
    if not rows:
        _show_folder(folder, console)
        return
    text = TokenText(folder)
    for row in folder.rows(rows):
        _show_row(folder, row, text, config, console)


def _show_row(folder: ShardFolder, row: Rows, text: TokenText, config: InspectConfig, console: Console) -> None:
    number, names, ids = int(row.numbers[0]), list(folder.manifest.references), row.ids.tolist()
    part = folder.manifest.parts[number // folder.manifest.rows_per_part].name
    line = f"row {number} ({part}): {counted(len(ids), 'token')}, {counted(len(row.doc_ids), 'document piece')}"
    line += f", from {printable(folder.manifest.corpus[int(row.source[0])].path)}"
    line += f", {counted(int(row.predict.sum()), 'token')} to predict" if folder.manifest.predict else ""
    line += "".join(f"; quarantined: no log-probs of {name}" for name in names if not row.scored(name)[0])
    console.print(Text(line), soft_wrap=True)
    for document in document_lines(folder, row):
        console.print(Text(document), soft_wrap=True)
    marked = [] if config.search is None else _marked_tokens(text, ids, config.search)
    places = _window(len(ids), config.tokens or len(ids), marked)
    console.print(_table(row, text, places, set(marked), console))
    before, after = places.start, len(ids) - places.stop
    if before or after:
        left_out = (
            f"{counted(before, 'token')} before and {after:,} after these"
            if before
            else f"{counted(after, 'more token')}"
        )
        console.print(Text(f"... {left_out}; --tokens 0 shows all"))
    if beyond := [place for place in marked if place not in places]:
        console.print(Text(f"... more of {config.search!r} from token {beyond[0]} on"), soft_wrap=True)
    if config.search is not None and not marked:
        console.print(Text("... the match is not marked: this tokenizer changes text across tokens"), soft_wrap=True)


def _marked_tokens(text: TokenText, ids: list[int], search: str) -> list[int]:
    """Places of the tokens that have some of the text that was looked for, ascending."""
    groups, _ = text.groups(ids)
    ends = np.cumsum([count for count, _ in groups]).tolist()
    ranges = find_in_groups(groups, search)
    return [place for end, (count, _), own in zip(ends, groups, ranges) if own for place in range(end - count, end)]


def _window(length: int, tokens: int, marked: list[int]) -> range:
    """Which tokens of a row to show: the first ones, or those around the first that is marked."""
    first = max(0, min(marked[0] - tokens // 2, length - tokens)) if marked else 0
    return range(first, min(length, first + tokens))


def _table(row: Rows, text: TokenText, places: range, marked: set[int], console: Console) -> Table:
    shown = slice(places.start, places.stop)
    documents = np.repeat(row.doc_ids, row.doc_lengths).tolist()
    piece_starts = set((np.cumsum(row.doc_lengths) - row.doc_lengths).tolist())
    ids = row.ids[shown].tolist()
    columns = {
        "pos": [MARK * (place in marked) + str(place) for place in places],
        "doc": [str(documents[place]) if place in piece_starts or place == places.start else "" for place in places],
        "id": list(map(str, ids)),
        TEXT: [token_label(string) for string in text.strings(ids)],
    }
    if row.part.manifest.predict:
        columns["predict"] = ["yes" if predict else "no" for predict in row.predict[shown]]
    plain = len(columns)
    nats: dict[str, list[float]] = {}
    for name, reference in row.part.manifest.references.items():
        nats[f"log p {name}"] = row.logprobs(name)[shown].tolist()
        for column in list(entropy_columns(name, reference))[:1]:  # those at another temperature are left out
            nats[f"entropy {name}"] = row.values(column)[shown].tolist()
    columns |= {header: list(map(_number, values)) for header, values in nats.items()}

    # the bars get what the numbers leave, which are never cut: a line may be wider than the terminal
    widths = [
        min(MAX_LABEL if header == TEXT else 99, max(map(cell_len, [*header.split(), *cells])))
        for header, cells in columns.items()
    ]
    taken = sum(widths) + 3 * (len(widths) - 1) + 2  # two more than releases of rich from 14 on need
    bar = min(BAR, (console.width - taken) // max(1, len(nats)) - 3)
    if bar < 4:
        bar = 0
        console.width = max(console.width, taken)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for header, width in zip(columns, widths):
        is_text = header == TEXT
        table.add_column(
            header, justify="left" if is_text else "right", min_width=width, max_width=width, no_wrap=is_text
        )
        if header in nats and bar:
            table.add_column(BARS, width=bar, no_wrap=True)
    for index, (place, cells) in enumerate(zip(places, zip(*columns.values()))):
        texts = [Text(cell) for cell in cells[:plain]]
        for cell, (header, values) in zip(cells[plain:], nats.items()):
            marks = 0 if np.isnan(values[index]) else round(abs(values[index]))
            style = ENTROPY_STYLE if header.startswith("entropy") else "red"
            texts += [Text(cell), *([Text("▪" * min(bar, marks), style=style)] if bar else [])]
        if place in piece_starts and index:
            table.add_section()
        table.add_row(*texts, style="bold" if place in marked else None)
    return table


def _number(nats: float) -> str:
    return "-" if np.isnan(nats) else f"{nats:.4f}"


def _show_folder(folder: ShardFolder, console: Console) -> None:
    manifest = folder.manifest
    missing = len(folder.missing_parts())
    print_lines(
        console,
        f"{folder.path}: {manifest.tokens:,} tokens in {counted(manifest.rows, 'row')} of at most {manifest.seq_len}, "
        f"{counted(len(manifest.parts), 'part')}" + (f", {missing} of them missing" if missing else ", complete"),
        ("documents as packed: " if manifest.selections else "documents: ")
        + ", ".join(f"{kind} {count:,}" for kind, count in manifest.documents.items()),
        f"tokenizer: {manifest.tokenizer['fingerprint'][:12]}.., ids 0 to {manifest.tokenizer['vocab_size'] - 1}",
        tokens_summary(manifest),
        *(
            f"corpus file {index}: {file.path}, {counted(file.tokens, 'token')}"
            for index, file in enumerate(manifest.corpus)
        ),
        *(f"read as {name.replace('_', ' ')}: {value!r}" for name, value in manifest.reading.items()),
        *([f"kept fields: {', '.join(manifest.kept_fields)} (--row shows them)"] if manifest.kept_fields else []),
        *map(selection_line, manifest.selections),
    )
    print_references(console, manifest)
