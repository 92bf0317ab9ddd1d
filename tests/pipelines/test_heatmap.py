"""remit inspect --html in a real Chromium: colours, text, what a token says, against hand-computed and float64 figures."""

import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from annotated import annotate, by_model
from conftest import EOS, make_model, make_tokenizer, source_texts, write_corpus
from odd_rows import DELTAS, constant, deltas, write_odd_rows
from oracles import read_rows
from test_weights import annotate_several
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipelines.token_text import TokenText, find_in_groups
from scorer.config import PackConfig
from scorer.pack import pack

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Remit = Callable[..., tuple[int, str, str]]
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_odd_rows(tmp_path_factory.mktemp("heatmap"), tokenizer_folder)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def open_page(browser: "Browser", remit: Remit, tmp_path: Path) -> Iterator[Open]:
    """Run remit inspect --html and open what it wrote. At the end: no message, no error, nothing was asked for."""
    pages: list[Page] = []
    told: list[str] = []
    asked: list[str] = []

    def open_(*arguments: object, width: int = 1280, scheme: str = "light") -> "Page":
        file = tmp_path / f"{len(pages)}.html"
        code, output, error = remit("inspect", "--html", file, *arguments)
        assert code == 0, error
        assert f"-> {file}" in output
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_
    for page in pages:
        page.evaluate("() => new Promise(requestAnimationFrame)")
        page.close()
    assert told == []
    assert len(asked) == len(pages)
    assert all(re.fullmatch(r"file://.*/\d+\.html", url) for url in asked)


def rgb(colour: str) -> np.ndarray:
    """Computed colours are rgb(255, 0, 0) or color(srgb 1 0 0); alpha is 1 on this page."""
    numbers = np.array([float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", colour)[:3]])
    return numbers * 255 if colour.startswith("color(srgb") else numbers


def backgrounds(page: "Page", row: int) -> list[np.ndarray]:
    script = "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
    return [rgb(colour) for colour in page.eval_on_selector_all(f"#row-{row} .t", script)]


def hover(page: "Page", row: int, index: int) -> dict[str, str]:
    """What the page says of a token when the pointer is on it."""
    page.locator(f"#row-{row} .t[data-n^='{index} ']").hover()
    names, values = page.locator("#detail dt").all_inner_texts(), page.locator("#detail dd").all_inner_texts()
    return dict(zip(names, values)) | {"token": page.locator("#detail .name").inner_text()}


def said_figures(page: "Page", row: int) -> list[list[float | None]]:
    """The data of each token of a row: position, id, log p of both, delta, centred delta, weight, clipped."""
    said = page.eval_on_selector_all(f"#row-{row} .t", "tokens => tokens.map(token => token.dataset.n.split(' '))")
    return [[None if value == "-" else float(value) for value in values] for values in said]


def escaped(text: str) -> str:
    """Text as the page has it: what is neither visible nor a line break or a tab stands as Python would write it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def weight(delta: np.ndarray, epsilon: float = 0.2) -> np.ndarray:
    """Eq. 4 and 5 in float64."""
    return np.clip(2 / (1 + np.exp(-(delta - delta.mean()))), 1 - epsilon, 1 + epsilon)


PALETTE = {
    "light": {"paper": (255, 255, 255), "up": (244, 116, 95), "down": (110, 164, 248)},
    "dark": {"paper": (22, 24, 29), "up": (179, 49, 42), "down": (36, 89, 184)},
}  # fmt: skip


def mixed(share: float, scheme: str = "light") -> np.ndarray:
    """Paper with that share of red, or of blue below 0, in steps of a twentieth."""
    paper, full = (np.array(PALETTE[scheme][name]) for name in ("paper", "up" if share > 0 else "down"))
    return paper + round(20 * min(1, abs(share))) / 20 * (full - paper)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_deltas(shards: Path, open_page: Open, scheme: str) -> None:
    """|delta| is 5 at six of the 30 tokens, so that is the 99th percentile, from which on a colour is full."""
    page = open_page("--shards", shards, "--row", 0, scheme=scheme)
    colours = backgrounds(page, 0)
    assert len(colours) == 31
    assert colours[0] == pytest.approx(PALETTE[scheme]["paper"], abs=1)
    assert colours[8] == pytest.approx(PALETTE[scheme]["up"], abs=1)
    for t, colour in enumerate(colours[1:], start=1):
        assert colour == pytest.approx(mixed(DELTAS[t % 10] / 5, scheme), abs=1), t
    legend = page.locator(".legend.delta")
    assert legend.locator(".ticks span").all_inner_texts() == ["-5", "-2.5", "0", "+2.5", "+5 nat"]
    assert "full colour from ±5 nat on, the 99th percentile of |delta| on this page" in legend.inner_text()
    assert not page.locator(".legend.weight").is_visible()


def test_a_close_reference_is_not_white(shards: Path, tmp_path: Path, open_page: Open) -> None:
    """Nine rows have deltas of 0.2 and -0.1; one delta of 5 changes nothing for the others."""

    def close(row: dict) -> list:
        deltas = [(0.2, -0.1)[t % 2] for t in range(len(row["input_ids"]))]
        if len(deltas) > 8 and row["doc_ids"][0] == 0 and row["source"] == 0:
            deltas[4] = 5.0
        return [None, *(-6 + delta for delta in deltas[1:])]

    annotate(shards.parent / "packed", tmp_path / "rl", close, "packed")
    page = open_page(annotate(tmp_path / "rl", tmp_path / "both", constant, "packed", name="base"), "--rows", "0..8")
    colours = backgrounds(page, 3)
    for t in range(1, 31):
        assert colours[t] == pytest.approx(mixed((0.2, -0.1)[t % 2] / 0.2), abs=1)
    assert backgrounds(page, 0)[4] == pytest.approx(mixed(1), abs=1)
    assert "±0.2 nat" in page.locator(".legend.delta").inner_text()


def test_equal_models_are_white(shards: Path, tmp_path: Path, open_page: Open) -> None:
    """Noise far below the step that log-probs are rounded to is not scaled up."""
    noise = lambda row: [None, *[-6.0 + 1e-5 * (-1) ** t for t in range(1, len(row["input_ids"]))]]  # noqa: E731
    annotate(shards.parent / "packed", tmp_path / "rl", noise, "packed")
    page = open_page(annotate(tmp_path / "rl", tmp_path / "both", constant, "packed", name="base"), "--row", 0)
    assert np.array(backgrounds(page, 0)).min() == 255
    assert "±0.016 nat on, the step that log-probs are rounded to" in page.locator(".legend.delta").inner_text()


def test_colours_of_weights(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards, "--rows", "0..1", "--epsilon", 0.5)
    page.get_by_label("weight").check()
    colours = backgrounds(page, 1)
    shares = (weight(np.array([DELTAS[t % 10] for t in range(1, 31)]), 0.5) - 1) / 0.5
    assert {-1.0, 1.0} < set(shares.tolist())
    for share, colour in zip(shares, colours[1:]):
        assert colour == pytest.approx(mixed(share), abs=1)
    legend = page.locator(".legend.weight")
    assert legend.locator(".ticks span").all_inner_texts() == ["0.5", "0.75", "1", "1.25", "1.5"]
    assert "full colour from 1 ± 0.5 on" in legend.inner_text()
    assert not page.locator(".legend.delta").is_visible()
    page.get_by_label("delta").check()
    assert backgrounds(page, 1)[4] == pytest.approx(mixed(1 / 5), abs=1)


def undecided(row: dict) -> list:
    return [None, *(t % 10 / 2 for t in range(1, len(row["input_ids"])))]


@pytest.mark.parametrize(("scheme", "full"), [("light", (83, 184, 131)), ("dark", (31, 122, 77))])
def test_colours_of_entropies(shards: Path, tmp_path: Path, open_page: Open, scheme: str, full: tuple) -> None:
    """The largest of 30 values, 4.5, is there three times, so that it is the 99th percentile; with a base and without."""
    annotate(shards.parent / "packed", tmp_path / "rl", constant, "packed", entropy=undecided)
    annotate(tmp_path / "rl", tmp_path / "both", deltas, "packed", name="base")
    for folder, ways in (("rl", ["log-prob", "entropy"]), ("both", ["delta", "weight", "entropy"])):
        page = open_page("--shards", tmp_path / folder, "--row", 0, scheme=scheme)
        assert [label.strip() for label in page.locator("fieldset label").all_inner_texts()] == ways
        assert not page.locator(".legend.entropy").is_visible()
        page.get_by_label("entropy").check()
        paper = np.array(PALETTE[scheme]["paper"])
        for t, colour in enumerate(backgrounds(page, 0)[1:], start=1):
            step = round(20 * (t % 10 / 2) / 4.5) / 20
            assert colour == pytest.approx(paper + step * (np.array(full) - paper), abs=1), t
        legend = page.locator(".legend.entropy")
        assert legend.is_visible()
        assert page.locator(".legend:visible").count() == 1
        assert legend.locator(".ticks span").all_inner_texts() == ["0", "1.1", "2.2", "3.4", "4.5 nat"]
        assert hover(page, 0, 4)["entropy of rl"] == "2.0000 nat"
        assert hover(page, 0, 0)["entropy of rl"] == "none"


def test_what_a_token_says(shards: Path, open_page: Open, tokenizer: AutoTokenizer) -> None:
    page = open_page("--shards", shards, "--row", 1)
    row = read_rows(shards)[1]
    delta = np.array([DELTAS[t % 10] for t in range(1, 31)])
    weights = weight(delta)
    for t in (1, 4, 5, 8, 9, 30):
        d, w = delta[t - 1], weights[t - 1]
        raw = 2 / (1 + np.exp(-(d - delta.mean())))
        said = hover(page, 1, t)
        said.pop("piece", None)
        assert said == {
            "token": tokenizer.convert_ids_to_tokens(row["input_ids"][t]),
            "token id": str(row["input_ids"][t]),
            "position": str(t),
            "log p rl": f"{-6 + d:.4f} nat",
            "log p base": "-6.0000 nat",
            "delta": f"{d:+.4f} nat",
            "centred delta": f"{d - delta.mean():+.4f} nat",
            "weight": f"{w:.4f}",
            "clipped": "low, to 0.8" if raw < 0.8 else "high, to 1.2" if raw > 1.2 else "no",
        }
    assert {hover(page, 1, 0)[name] for name in ("log p rl", "delta", "weight", "clipped")} == {"none"}


def test_text_is_the_decoded_row(shards: Path, open_page: Open, tokenizer: AutoTokenizer) -> None:
    rows = read_rows(shards)
    page = open_page("--shards", shards, "--rows", f"0..{len(rows) - 1}")
    cut = pieces = 0
    for number, row in enumerate(rows):
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert page.locator(f"#row-{number} .text").evaluate("shown => shown.textContent") == escaped(text)
        figures = said_figures(page, number)
        assert [said[:2] for said in figures] == [[t, token_id] for t, token_id in enumerate(row["input_ids"])]
        labels = page.eval_on_selector_all(
            f"#row-{number} .document", "marks => marks.map(mark => mark.dataset.document)"
        )
        assert labels == [str(document) for document in row["doc_ids"]]
        cut += "\ufffd" in text
        pieces += page.locator(f"#row-{number} .g").count()
    assert cut
    assert pieces > 20
    assert {len(row["input_ids"]) for row in rows} >= {31, 1}
    assert "b<b>.jsonl" in page.locator(f"#row-{len(rows) - 1} .facts").text_content()
    assert page.title() == "rl against base, token by token"


def test_pieces_of_a_character_can_be_pointed_at(shards: Path, open_page: Open, tokenizer: AutoTokenizer) -> None:
    page = open_page("--shards", shards, "--search", "你")
    groups = page.locator(".g").filter(has_text=re.compile("^你$"))
    assert groups.count() == 1
    symbols = tokenizer.tokenize("你")
    assert len(symbols) == 3
    groups.scroll_into_view_if_needed()
    said = []
    pieces = []
    for place in range(3):
        box = groups.locator(".t").nth(place).bounding_box()
        assert box["width"] > 4
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        said.append(page.locator("#detail .name").inner_text())
        pieces.append(page.locator("#detail dd").nth(3).inner_text())
    assert said == symbols
    assert pieces == ["1 of 3", "2 of 3", "3 of 3"]


# each of these has no shape, and is alone with a space in a token of the tokenizer below
SHAPELESS = (
    "\u200b \u200c \u200d \u00ad \u034f \ufe0f \u2028 \u0085 \u009b \x00 \x1b \u0301 \u0928 \u093f \u00a0 \u3000 \u202f"
)


def test_every_token_can_be_seen_and_pointed_at(tmp_path: Path, open_page: Open) -> None:
    """Joiners, selectors, combining marks and controls have a width, whether one token or several make them up."""
    for vocabulary, name in ((300, "bytes"), (3000, "whole")):
        folder = tmp_path / name
        tokenizer = make_tokenizer(folder / "tokenizer", [SHAPELESS] * 9, vocabulary=vocabulary)
        write_corpus(folder / "corpus" / "a.jsonl", [SHAPELESS, "👩‍👩‍👧 e\u0301"])
        pack(PackConfig([str(folder / "corpus")], str(tokenizer), folder / "packed", 256))
        annotate(folder / "packed", folder / "rl", deltas, "packed")
        page = open_page("--shards", folder / "rl", "--row", 0)
        widths = page.eval_on_selector_all("#rows .t", "tokens => tokens.map(t => t.getBoundingClientRect().width)")
        assert len(widths) == len(read_rows(folder / "rl")[0]["input_ids"])
        assert min(widths) >= 4
        shown = page.locator(".text").evaluate("text => text.textContent")
        for character in SHAPELESS.split(" "):
            assert (character if character.isprintable() else repr(character)[1:-1]) in shown


def test_no_text_steers_what_is_around_it(shards: Path, open_page: Open) -> None:
    """Tokens of a line stand from left to right, whatever direction their own letters have; a line break breaks it."""
    number = next(n for n, row in enumerate(read_rows(shards)) if row["source"] == 0 and 4 in row["doc_ids"])
    page = open_page("--shards", shards, "--rows", f"0..{number + 1}")
    assert page.locator(".text").count() == number + 2
    script = """texts => texts.map(text => [...text.querySelectorAll('.text > .t, .g')].map(token =>
        [token.getClientRects()[0].x, token.getClientRects()[0].y, getComputedStyle(token).unicodeBidi,
         token.textContent]))"""
    lines = 0
    for tokens in page.eval_on_selector_all(".text", script):
        assert {bidi for _, _, bidi, _ in tokens} == {"isolate"}
        for (x, y, _, text), (next_x, next_y, _, _) in pairwise(tokens):
            assert next_x > x or next_y > y + 5
            assert next_y > y + 5 or "\n" not in text
            lines += next_y > y + 5
    assert lines > 5
    controls = set(page.locator(".e").all_inner_texts())
    assert controls >= {"\\x00", "\\u202e", "\\u2069", "\\ufeff", "\\u200b", "\\r"}
    # a combining mark whose letter is another token has a circle to stand on
    assert "\u0301" in page.eval_on_selector_all(".c", "marks => marks.map(mark => mark.textContent)")
    assert page.locator(".n").first.evaluate("mark => getComputedStyle(mark, '::before').content") == '"↵"'


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_can_be_read(shards: Path, open_page: Open, width: int, scheme: str) -> None:
    page = open_page("--shards", shards, "--rows", "0..9", width=width, scheme=scheme)
    hover(page, 3, 30)
    assert page.evaluate("() => document.scrollingElement.scrollWidth <= innerWidth")
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert 0 <= box["y"] <= 900 - box["height"]
    channels = np.array([backgrounds(page, row) for row in range(10)]).reshape(-1, 3) / 255
    ink = rgb(page.locator("body").evaluate("body => getComputedStyle(body).color")) / 255

    def luminance(colour: np.ndarray) -> np.ndarray:  # of WCAG 2
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return linear @ np.array([0.2126, 0.7152, 0.0722])

    light, dark = np.maximum(luminance(channels), luminance(ink)), np.minimum(luminance(channels), luminance(ink))
    assert ((light + 0.05) / (dark + 0.05)).min() >= 4.5
    assert (luminance(ink) > 0.5) == (scheme == "dark")


def test_keyboard_goes_from_token_to_token(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards, "--rows", "0..1", "--epsilon", "inf")
    focused = "() => [document.activeElement.closest('.row').id, document.activeElement.dataset.n.split(' ')[0]]"
    page.get_by_label("delta").focus()
    for _ in range(3):  # two links to rows
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == ["row-0", "0"]
    for key, index in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowDown", 12), ("ArrowLeft", 11), ("End", 30), ("ArrowRight", 30), ("Home", 0), ("ArrowUp", 0), ("ArrowRight", 1)]:  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused) == ["row-0", str(index)]
        assert page.locator("#detail dd").nth(1).inner_text() == str(index)
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == ["row-1", "0"]
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == ["row-0", "1"]
    assert page.locator("#detail").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


@pytest.mark.parametrize("context", ["packed", "document"])
def test_base_that_runs_now(annotated: dict[str, Path], models: dict[str, Path], open_page: Open, context: str) -> None:
    """Against a transformers forward in the context that the reference was scored in."""
    page = open_page("--shards", annotated[context], "--rows", "2..4", "--model", models["base"])
    logprobs = by_model(models["base"], context, 0)
    for number, row in list(enumerate(read_rows(annotated[context])))[2:5]:
        expected, said = logprobs(row), said_figures(page, number)
        assert [figures[3] is None for figures in said] == [value is None for value in expected]
        predicted = [t for t, value in enumerate(expected) if value is not None]
        for t in predicted:
            assert said[t][3] == pytest.approx(expected[t], abs=1e-3)
        delta = np.array([row["rl_logprobs"][t] - expected[t] for t in predicted])
        assert [said[t][6] for t in predicted] == pytest.approx(weight(delta).tolist(), abs=1e-3)
    assert "computed for this page" in page.locator(".about").inner_text()
    assert "of the rows on this page" in page.locator("#ranking").inner_text()


def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], remit: Remit
) -> None:
    other = make_model(tmp_path / "other")
    make_tokenizer(other, ["entirely other text"] * 9, vocabulary=300)
    cases = {
        "its tokenizer": other,
        "embedding rows": make_model(tmp_path / "few", vocabulary=100),
        "takes at most 8 tokens": make_model(tmp_path / "short", positions=8),
        "no such folder": tmp_path / "none",
    }
    for message, model in cases.items():
        html = tmp_path / "x.html"
        code, _, error = remit("inspect", "--shards", annotated["packed"], "--row", 0, "--html", html, "--model", model)
        assert (code, message in error) == (1, True), error
        assert not html.exists()


def test_without_a_base(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards.parent / "rl", "--row", 0)
    assert "coloured by the reference's log-prob alone" in page.locator(".no-base").inner_text()
    assert page.locator("input").count() == 0
    assert page.locator("#ranking").count() == 0
    colours = backgrounds(page, 0)
    # log p is -5 at t = 4: 5 / 8, in twentieths 12, of (217, 164, 65)
    assert colours[4] == pytest.approx(255 + 12 / 20 * (np.array([217, 164, 65]) - 255), abs=1)
    assert colours[9] == pytest.approx((217, 164, 65), abs=1)  # -11
    assert set(hover(page, 0, 4)) - {"piece"} == {"token", "token id", "position", "log p rl"}
    named = open_page("--shards", shards, "--row", 0, "--reference", "base")
    assert named.locator(".no-base").count() == 1


def spellings(tokenizer: AutoTokenizer, token_id: int) -> set[str]:
    """What a table may show for a token: its text with · for spaces, escaped or not, or its bytes as <0xE5>."""
    text, symbol = tokenizer.decode([token_id]), tokenizer.convert_ids_to_tokens(token_id)
    if "\ufffd" not in text:
        return {text.replace(" ", "·"), repr(text)[1:-1].replace(" ", "·"), symbol}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    data = [byte_of[letter] for letter in symbol]
    return {"".join(f"<0x{byte:02X}>" if byte > 127 else chr(byte) for byte in data).replace(" ", "·")}


def test_tokens_of_the_folder_are_ranked(shards: Path, open_page: Open, tokenizer: AutoTokenizer) -> None:
    page = open_page("--shards", shards, "--row", 0)
    weights, all_deltas = defaultdict(list), defaultdict(list)
    for row in read_rows(shards):
        if len(row["input_ids"]) > 1:
            delta = np.array([DELTAS[t % 10] for t in range(1, len(row["input_ids"]))])
            for token_id, w, d in zip(row["input_ids"][1:], weight(delta), delta):
                weights[token_id].append(w)
                all_deltas[token_id].append(d)
    often = [token_id for token_id, values in weights.items() if len(values) >= 2]
    means = sorted(np.mean(weights[token_id]) for token_id in often)
    assert "of the folder (all rows); tokens that occur at least 2 times" in page.locator("#ranking").inner_text()
    for table, expected in (("up", means[::-1][:15]), ("down", means[:15])):
        lines = page.locator(f"#{table} tbody tr").all()
        cells = [line.locator("td").all_inner_texts() for line in lines]
        assert [float(cell[2]) for cell in cells] == pytest.approx(expected, abs=1e-3)
        for string, count, shown, delta in cells:
            matches = [token_id for token_id in often if string in spellings(tokenizer, token_id)]
            assert any(
                len(weights[token_id]) == int(count)
                and np.mean(weights[token_id]) == pytest.approx(float(shown), abs=1e-3)
                and np.mean(all_deltas[token_id]) == pytest.approx(float(delta), abs=1e-3)
                for token_id in matches
            ), string


def test_quarantined_row(small: Path, tmp_path: Path, open_page: Open) -> None:
    """Without log-probs of one of the two there is no delta, and the page says which is missing."""
    values = {"rl": deltas, "base": constant}
    exact = {"logprob_step": 0.0}
    both = annotate_several(
        small, tmp_path / "both", values, quarantined={"rl": {1}, "base": {2}}, rl=exact, base=exact
    )
    page = open_page("--shards", both, "--rows", "0..2")
    has_deltas = [any(figures[4] is not None for figures in said_figures(page, row)) for row in range(3)]
    assert has_deltas == [True, False, False]
    facts = page.locator(".facts").all_inner_texts()
    assert [re.findall("quarantined: no log-probs of [a-z]+", fact) for fact in facts] == [
        [], ["quarantined: no log-probs of rl"], ["quarantined: no log-probs of base"],
    ]  # fmt: skip
    assert hover(page, 2, 3)["log p base"] == "none"
    assert hover(page, 2, 3)["log p rl"] == "-6.1000 nat"


def test_a_row_of_one_token_is_not_called_quarantined(shards: Path, open_page: Open) -> None:
    last = len(read_rows(shards)) - 1
    page = open_page("--shards", shards, "--row", last)
    assert page.locator(f"#row-{last} .facts").inner_text().endswith("· 1 token · 1 document piece")
    assert hover(page, last, 0)["log p rl"] == "none"


def test_page_says_which_rows_it_shows(shards: Path, open_page: Open) -> None:
    assert "both: rows 3 to 5." in open_page("--shards", shards, "--rows", "3..5").locator(".about").inner_text()
    about = open_page("--shards", shards, "--search", EOS, "--limit", 2).locator(".about").inner_text()
    assert f"each row that has '{EOS}' in its text; only the first 2 found are shown" in about
    about = open_page("--shards", shards, "--doc", 15, "--source", 1).locator(".about").inner_text()
    assert "each row that has document 15, of corpus file b<b>.jsonl." in about


def test_log_probs_of_the_fake_engine_are_refused(
    small: Path, tmp_path: Path, remit: Remit, models: dict[str, Path]
) -> None:
    fake = annotate_several(small, tmp_path / "fake", {"rl": deltas}, rl={"engine": "fake"})
    for options in ((), ("--model", models["base"])):
        code, _, error = remit("inspect", "--shards", fake, "--row", 0, "--html", tmp_path / "x.html", *options)
        assert (code, "rl_logprobs comes from the fake engine" in error) == (1, True), error


def test_a_base_called_like_the_reference(
    annotated: dict[str, Path], models: dict[str, Path], tmp_path: Path, open_page: Open
) -> None:
    shutil.copytree(models["base"], tmp_path / "rl")
    page = open_page("--shards", annotated["packed"], "--row", 1, "--model", tmp_path / "rl")
    assert page.title() == "rl against rl (base), token by token"
    assert {"log p rl", "log p rl (base)"} <= set(hover(page, 1, 2))


def test_many_rows_are_laid_out_when_seen_and_printed_whole(shards: Path, open_page: Open) -> None:
    """A page of few tokens draws all at once; rows of a large one wait, but not on paper."""
    visibility = "row => getComputedStyle(row).contentVisibility"
    page = open_page("--shards", shards, "--rows", "0..9")
    assert page.locator(".row").last.evaluate(visibility) == "visible"
    page.evaluate("() => document.getElementById('rows').classList.add('many')")  # as of 20,000 tokens on
    assert page.locator(".row").last.evaluate(visibility) == "auto"
    page.emulate_media(media="print")
    assert page.locator(".row").last.evaluate(visibility) == "visible"


def test_long_row(tmp_path: Path, tokenizer_folder: Path, open_page: Open, tokenizer: AutoTokenizer) -> None:
    write_corpus(tmp_path / "corpus" / "a.jsonl", ["".join(source_texts(60, seed=9)), "e" * 3000])
    pack(PackConfig([str(tmp_path / "corpus")], str(tokenizer_folder), tmp_path / "packed", 4096))
    annotate(tmp_path / "packed", tmp_path / "rl", deltas, "packed")
    both = annotate(tmp_path / "rl", tmp_path / "both", constant, "packed", name="base")
    page = open_page("--shards", both, "--row", 0, width=400)
    ids = read_rows(both)[0]["input_ids"]
    assert page.locator("#rows .t").count() == len(ids) == 4096
    assert page.locator(".text").evaluate("shown => shown.textContent") == escaped(tokenizer.decode(ids))
    page.locator("#rows .t").first.focus()
    page.keyboard.press("End")
    assert page.locator("#detail dd").nth(1).inner_text() == "4095"
    assert page.evaluate("() => document.scrollingElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("decoder", "vocabulary", "expected"),
    [
        (decoders.Metaspace(), ["▁a", "b", "▁c"], ([(1, "a"), (1, "b"), (1, " c")], True)),
        (decoders.WordPiece(), ["a", "##b", "."], ([(1, "a"), (1, "b"), (1, ".")], True)),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), ["a", "<0xC3>", "<0xA9>"], ([(1, "a"), (2, "é")], True)),
        # text that changes across tokens: none of them has a text of its own
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "x")]), ["a", "b", "c"], ([(1, "a"), (1, "b"), (1, "c")], False)),
    ],
)  # fmt: skip
def test_other_tokenizers(decoder: decoders.Decoder, vocabulary: list[str], expected: tuple) -> None:
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.decoder = decoder
    folder = SimpleNamespace(tokenizer_json=lambda: json.loads(tokenizer.to_str()))
    groups, exact = TokenText(folder).groups([0, 1, 2])
    assert (groups, exact) == expected
    assert not exact or "".join(text for _, text in groups) == tokenizer.decode([0, 1, 2])


# --- --search -------------------------------------------------------------------------------------------


def marked(text: str, wanted: str) -> list[bool]:
    """For each character of a row's text on the page, whether it is part of a match."""
    flags = [False] * len(text)
    for match in re.finditer(re.escape(wanted), text):
        flags[match.start() : match.end()] = [True] * len(wanted)
    return [flag for flag, character in zip(flags, text) for _ in escaped(character)]


MARKED = """text => {
    const flags = [], walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    while (walker.nextNode())
        flags.push(...[...walker.currentNode.data].map(() => Boolean(walker.currentNode.parentElement.closest('mark'))));
    return flags;
}"""


@pytest.mark.parametrize(
    "wanted",
    [
        "needle in a",  # several tokens
        "e",  # within tokens, several in a row
        "你",  # bytes of one character
        "ord ש",  # the end of a token, and a piece of a character's bytes after it
        "e\u0301",  # as it is written: no é
        "means\nש",  # over a line break
        "\u202eturned\u2069",  # what is escaped on the page
        "\ufffd",  # where a row begins or ends within a character
        EOS,
        "/script>",
    ],
)
def test_matches_are_marked(shards: Path, open_page: Open, tokenizer: AutoTokenizer, wanted: str) -> None:
    texts = [tokenizer.decode(row["input_ids"]) for row in read_rows(shards)]
    page = open_page("--shards", shards, "--search", wanted, "--limit", 100)
    found = [number for number, text in enumerate(texts) if wanted in text]
    assert [int(section[4:]) for section in page.eval_on_selector_all(".row", "all => all.map(row => row.id)")] == found
    for number in found:
        assert page.locator(f"#row-{number} .text").evaluate(MARKED) == marked(texts[number], wanted)
    assert page.title() == "rl against base, token by token"


def test_page_opens_at_the_first_match(tmp_path: Path, tokenizer_folder: Path, open_page: Open) -> None:
    text = "".join(source_texts(60, seed=9))[:9000] + " needle " + "e" * 900
    write_corpus(tmp_path / "corpus" / "a.jsonl", [text])
    pack(PackConfig([str(tmp_path / "corpus")], str(tokenizer_folder), tmp_path / "packed", 16384))
    page = open_page(annotate(tmp_path / "packed", tmp_path / "rl", deltas, "packed"), "--search", "needle")
    assert page.evaluate("() => scrollY") > 900
    box = page.locator("mark").first.bounding_box()
    assert 0 < box["y"] < 900


def test_ranges_of_matches_in_groups() -> None:
    """Against a mark for each character, over texts of two letters cut into groups at random."""
    rng = random.Random(0)
    for _ in range(500):
        texts = ["".join(rng.choices("ab", k=rng.choice([0, 1, 1, 2, 5]))) for _ in range(rng.randint(1, 9))]
        wanted = "".join(rng.choices("ab", k=rng.randint(1, 4)))
        flags = []
        for text, ranges in zip(texts, find_in_groups([(1, text) for text in texts], wanted), strict=True):
            assert all(0 <= start < stop <= len(text) for start, stop in ranges)
            flags += [any(start <= place < stop for start, stop in ranges) for place in range(len(text))]
        assert flags == marked("".join(texts), wanted)
