"""remit inspect --html in a real Chromium: colours, text, what a token says, against hand-computed and float64 figures;
and which rows remit inspect finds."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from annotated import annotate, by_model
from conftest import EOS, make_model, make_tokenizer, source_texts, write_corpus
from oracles import read_rows
from test_plan_weights import annotate_several
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipelines.inspect.token_text import TokenText
from scorer.config import PackConfig
from scorer.pack import pack

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Remit = Callable[..., tuple[int, str, str]]
Open = Callable[..., "Page"]

# the base's log-prob is -6 everywhere; position t of a row has delta DELTAS[t % 10]
DELTAS = [0.05, -0.05, 0.1, -0.1, 1.0, -1.0, 2.0, -2.0, 5.0, -5.0]
ATTACK = "</script><script>document.title='pwned'</script><img src=http://192.0.2.1/x onerror=alert(1)>&amp;"
HEBREW = "שלום, זה עם 123.45 מספרים"
TEXTS = [
    "x",
    "漢字かな交じり文 你好",
    "emoji 😀👩‍👩‍👧 e\u0301",
    f"The word שלום means\n{HEBREW}\r\nالسلام\n\n\tend  of  it ",
    "null \x00 \u202e\u202eturned\u2069\u2069 \ufeff\u200b",
    ATTACK,
    "needle in a row",
]


def deltas(row: dict) -> list:
    return [None, *(-6 + DELTAS[t % 10] for t in range(1, len(row["input_ids"])))]


def constant(row: dict) -> list:
    return [None, *[-6.0] * (len(row["input_ids"]) - 1)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Rows of 31 tokens, some of which begin or end within a character, the last one a single token: rl and base."""
    folder = tmp_path_factory.mktemp("heatmap")
    write_corpus(folder / "corpus" / "a.jsonl", [*TEXTS, *source_texts(20, seed=8)])
    write_corpus(folder / "corpus" / "b<b>.jsonl", ["x"] * 16)  # two tokens each: 32 = 31 + 1
    pack(PackConfig([str(folder / "corpus")], str(tokenizer_folder), folder / "packed", 31, tokens_per_shard=31 * 12))
    annotate(folder / "packed", folder / "rl", deltas, "packed")
    return annotate(folder / "rl", folder / "both", constant, "packed", name="base")


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
    page.locator(f"#row-{row} .t[data-i='{index}']").hover()
    names, values = page.locator("#detail dt").all_inner_texts(), page.locator("#detail dd").all_inner_texts()
    return dict(zip(names, values)) | {"token": page.locator("#detail .name").inner_text()}


def weight(delta: np.ndarray, epsilon: float = 0.2) -> np.ndarray:
    """Eq. 4 and 5 in float64."""
    return np.clip(2 / (1 + np.exp(-(delta - delta.mean()))), 1 - epsilon, 1 + epsilon)


# hand-mixed: delta / 2 of the colour, the rest paper
PALETTE = {
    "light": {"paper": (255, 255, 255), "red": (244, 116, 95), "half red": (249.5, 185.5, 175), "blue": (110, 164, 248)},
    "dark": {"paper": (22, 24, 29), "red": (179, 49, 42), "half red": (100.5, 36.5, 35.5), "blue": (36, 89, 184)},
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_deltas(shards: Path, open_page: Open, scheme: str) -> None:
    colours = backgrounds(open_page("--shards", shards, "--row", 0, scheme=scheme), 0)
    assert len(colours) == 31
    expected = PALETTE[scheme]
    paper, red, blue = (np.array(expected[name]) for name in ("paper", "red", "blue"))
    for t, name in [
        (0, "paper"),
        (1, "paper"),
        (10, "paper"),
        (4, "half red"),
        (6, "red"),
        (8, "red"),
        (7, "blue"),
        (9, "blue"),
    ]:
        assert colours[t] == pytest.approx(expected[name], abs=1), t
    # a twentieth at 0.1 nat, a half at -1
    assert colours[2] == pytest.approx(paper + (red - paper) / 20, abs=1)
    assert colours[3] == pytest.approx(paper + (blue - paper) / 20, abs=1)
    assert colours[5] == pytest.approx((paper + blue) / 2, abs=1)
    assert np.abs(colours[2] - paper).max() > 2


def test_colours_of_weights(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards, "--rows", "0..1", "--epsilon", 0.5)
    page.get_by_label("weight").check()
    colours = backgrounds(page, 1)
    shares = (weight(np.array([DELTAS[t % 10] for t in range(1, 31)]), 0.5) - 1) / 0.5
    assert {-1.0, 1.0} < set(shares.tolist())
    for share, colour in zip(shares, colours[1:]):
        full = np.array(PALETTE["light"]["red" if share > 0 else "blue"])
        assert colour == pytest.approx(255 + abs(share) * (full - 255), abs=1)
    assert page.locator(".ticks span").all_inner_texts() == ["0.5", "0.75", "1", "1.25", "1.5"]
    page.get_by_label("delta").check()
    assert backgrounds(page, 1)[4] == pytest.approx(PALETTE["light"]["half red"], abs=1)


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
        assert page.locator(f"#row-{number} .text").evaluate("shown => shown.textContent") == text
        indices = page.eval_on_selector_all(f"#row-{number} .t", "tokens => tokens.map(t => Number(t.dataset.i))")
        assert indices == list(range(len(row["input_ids"])))
        labels = page.eval_on_selector_all(f"#row-{number} .d", "marks => marks.map(mark => mark.dataset.doc)")
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


def test_invisible_characters_are_marked_and_lines_break(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards, "--doc", 3, "--source", 0)
    mark = "mark => getComputedStyle(mark, '::before').content"
    for character, drawn in {"\n": "↵", "\r": "CR", "\t": "⇥"}.items():
        found = [m for m in page.locator(".m").all() if m.evaluate("mark => mark.textContent") == character]
        assert found
        assert found[0].evaluate(mark) == f'"{drawn}"'
    dots = page.locator(".s").first.evaluate("space => getComputedStyle(space).backgroundImage")
    assert dots.startswith("radial-gradient")
    tops = [
        page.locator(f".t:has-text('{word}'), .g:has-text('{word}')").first.bounding_box()["y"] for word in ("T", "ז")
    ]
    assert tops[0] + 10 < tops[1]
    other = open_page("--shards", shards, "--doc", 4, "--source", 0)
    marks = set(other.eval_on_selector_all(".m", "marks => marks.map(mark => mark.dataset.mark)"))
    assert marks >= {"NUL", "U+202E", "U+2069", "BOM", "ZWSP"}


# each character that has no shape stands alone in a token of the tokenizer below
SHAPELESS = (
    "\u200b \u200c \u200d \u00ad \u034f \ufe0f \u2028 \u0085 \u009b \x00 \x1b \u0301 \u0928 \u093f \u00a0 \u3000 \u202f"
)


def test_every_token_can_be_pointed_at_and_copied(tmp_path: Path, open_page: Open) -> None:
    """Joiners, selectors, combining marks and controls have a width, whether one token or several make them up."""
    characters = SHAPELESS.split(" ")
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
        marks = page.eval_on_selector_all(".m", "marks => marks.map(mark => [mark.textContent, mark.dataset.mark])")
        assert {"\u200d": "ZWJ", "\ufe0f": "VS16", "\u034f": "U+034F", "\x1b": "ESC", "\x9b": "U+009B"}.items() <= dict(
            marks
        ).items()
        assert page.eval_on_selector_all(".w", "spaces => spaces.map(space => space.textContent)") == characters[-3:]
        copied = page.locator(".text").evaluate(
            "text => { getSelection().selectAllChildren(text); return String(getSelection()); }"
        )
        for character in characters:
            assert character in copied or character == "\x00"
        # a drawn sign takes the place of the character: no second box beside it
        escape = page.locator(".m[data-mark=ESC]").first
        assert escape.evaluate("mark => getComputedStyle(mark).fontSize") == "0px"


def test_right_to_left_text_reads_right_to_left(shards: Path, open_page: Open) -> None:
    page = open_page("--shards", shards, "--search", "123", width=1280)
    letters = {}
    for shown in page.locator(".r[dir=rtl] > .t, .r[dir=rtl] > .g, .r[dir=ltr] > .t").all():
        box, text = shown.bounding_box(), shown.evaluate("shown => shown.textContent")
        letters.setdefault(text.strip(), box["x"] + box["width"])
        assert shown.evaluate("shown => getComputedStyle(shown).unicodeBidi") == "isolate"
    # of "עם 123 מספרים", in the order of reading
    first, number, last = letters["ע"], letters["1"], letters["פ"]
    assert first > number > last
    assert letters["1"] < letters["2"] < letters["3"] < letters["4"] < letters["5"]


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
    focused = "() => [document.activeElement.closest('.row').id, document.activeElement.dataset.i]"
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


def said_data(page: "Page") -> dict:
    return json.loads(page.locator("#data").evaluate("block => block.textContent"))


@pytest.mark.parametrize("context", ["packed", "document"])
def test_base_that_runs_now(annotated: dict[str, Path], models: dict[str, Path], open_page: Open, context: str) -> None:
    """Against a transformers forward in the context that the reference was scored in."""
    page = open_page("--shards", annotated[context], "--rows", "2..4", "--model", models["base"])
    logprobs = by_model(models["base"], context, 0)
    for row, said in zip(read_rows(annotated[context])[2:5], said_data(page)["rows"]):
        expected = logprobs(row)
        assert [value is None for value in said["base"]] == [value is None for value in expected]
        predicted = [t for t, value in enumerate(expected) if value is not None]
        for t in predicted:
            assert said["base"][t] == pytest.approx(expected[t], abs=1e-3)
        delta = np.array([row["rl_logprobs"][t] - expected[t] for t in predicted])
        assert [said["weight"][t] for t in predicted] == pytest.approx(weight(delta).tolist(), abs=1e-3)
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
    # log p is -5 at t = 4: 5 / 8 of (217, 164, 65)
    assert colours[4] == pytest.approx(255 + 5 / 8 * (np.array([217, 164, 65]) - 255), abs=1)
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
    both = annotate_several(small, tmp_path / "both", values, quarantined={"rl": {1}, "base": {2}})
    page = open_page("--shards", both, "--rows", "0..2")
    rows = said_data(page)["rows"]
    assert [any(value is not None for value in row["delta"]) for row in rows] == [True, False, False]
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


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (lambda row: [None, *[0.5] * (len(row["input_ids"]) - 1)], "base_logprobs is not a log-prob"),
        (lambda row: [None, math.nan, *constant(row)[2:]], "base_logprobs is not a log-prob"),
        (lambda row: [None, None, *constant(row)[2:]], "base_logprobs is not a log-prob"),
        (lambda row: [*constant(row), -1.0], "base_logprobs is not a log-prob"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    shards: Path, tmp_path: Path, remit: Remit, values: Callable, what: str
) -> None:
    bad = annotate(shards.parent / "rl", tmp_path / "bad", values, "packed", name="base")
    code, _, error = remit("inspect", "--shards", bad, "--row", 2, "--html", tmp_path / "x.html")
    assert (code, f"row 2: {what}" in error) == (1, True), error
    assert not (tmp_path / "x.html").exists()


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
    page.evaluate("() => document.getElementById('rows').classList.add('many')")
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
    assert page.locator(".text").evaluate("shown => shown.textContent") == tokenizer.decode(ids)
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


# --- which rows ------------------------------------------------------------------------------------------


def shown_rows(remit: Remit, *arguments: object) -> list[int]:
    code, output, error = remit("inspect", "--tokens", 1, *arguments)
    assert code == 0, error
    return [int(number) for number in re.findall(r"^row (\d+) \(part", output, re.MULTILINE)]


def test_rows_are_found(shards: Path, remit: Remit, tokenizer: AutoTokenizer) -> None:
    rows = read_rows(shards)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert shown_rows(remit, "--shards", shards, "--rows", "10..13") == [10, 11, 12, 13]
    assert shown_rows(remit, "--shards", shards, "--row", 12) == [12]
    for source, document in ((0, 3), (1, 15), (0, len(TEXTS) + 4)):
        expected = [n for n, row in enumerate(rows) if row["source"] == source and document in row["doc_ids"]]
        assert expected
        arguments = ("--shards", shards, "--doc", document, "--source", source, "--limit", 500)
        assert shown_rows(remit, *arguments) == expected
    for text in ("needle", EOS, "漢字", " "):
        expected = [number for number, shown in enumerate(texts) if text in shown]
        assert expected
        assert shown_rows(remit, "--shards", shards, "--search", text, "--limit", 10**6) == expected
        assert shown_rows(remit, "--shards", shards, "--search", text, "--limit", 2) == expected[:2]
    own = [number for number, row in enumerate(rows) if row["source"] == 1 and EOS in texts[number]]
    assert shown_rows(remit, "--shards", shards, "--search", EOS, "--source", 1) == own


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--row", 1, "--doc", 2), 2, "--row and --doc are given, expected one of them"),
        (("--rows", "3"), 2, "expected the first and the last row, for instance 8..11"),
        (("--rows", "4..3"), 2, "expected the first and the last row"),
        (("--row", -1), 2, "--row is -1, expected at least 0"),
        (("--search", ""), 2, "--search is empty"),
        (("--search", "x", "--limit", 0), 2, "--limit is 0, expected at least 1"),
        (("--source", 1), 2, "--source is given without --doc or --search"),
        (("--html", "{tmp}/x.html"), 2, "--html is given without rows"),
        (("--row", 0, "--base", "base"), 2, "give --html FILE too"),
        (("--row", 0, "--html", "{tmp}/no/x.html"), 2, "its folder does not exist"),
        (("--row", 0, "--html", "{tmp}"), 2, "is a folder, expected a file"),
        (("--row", 0, "--html", "{tmp}/x.arrow"), 2, "x.arrow, expected the name of a page"),
        (("--row", 0, "--html", "{tmp}/x.html", "--epsilon", 1.5), 2, "--epsilon is 1.5"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "rl"), 2, "--reference and --base are both 'rl'"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "b", "--model", "m"), 2, "are both given, expected one"),
        (("--row", 10**6), 1, "--row is 1000000, "),
        (("--rows", "0..1000000"), 1, "--rows is 0..1000000, "),
        (("--doc", 1), 1, "add --source, one of: 0 a.jsonl, 1 b<b>.jsonl"),
        (("--doc", 1, "--source", 2), 1, "has corpus files 0..1"),
        (("--doc", 9999, "--source", 1), 1, "no row from corpus file 1, b<b>.jsonl, has document 9999"),
        (("--search", "haystack"), 1, "no row has 'haystack' in its text"),
        (("--row", 0, "--html", "{tmp}/x.html", "--reference", "sft"), 1, "no log-probs of a reference named 'sft'"),
        (("--row", 0, "--html", "{tmp}/x.html", "--base", "other"), 1, "no log-probs of a reference named 'other'"),
    ],
)
def test_what_is_refused(
    shards: Path, tmp_path: Path, remit: Remit, options: tuple[object, ...], code: int, message: str
) -> None:
    found, _, error = remit("inspect", "--shards", shards, *(str(option).format(tmp=tmp_path) for option in options))
    assert found == code, error
    assert message in " ".join(error.replace("│", " ").split())  # bad usage comes in a box
    assert not list(tmp_path.glob("*.html"))


def test_columns_of_different_contexts(shards: Path, tmp_path: Path, remit: Remit) -> None:
    other = annotate(shards.parent / "rl", tmp_path / "both", constant, "document", name="base")
    html = tmp_path / "x.html"
    code, _, error = remit("inspect", "--shards", other, "--row", 0, "--html", html)
    assert code == 1
    assert "expected the same" in error
