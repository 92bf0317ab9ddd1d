"""remit distribution against numpy over whole columns, the divergence against full distributions, the page in Chromium."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from annotated import annotate, by_model, top_by_model
from browser import open_page
from oracles import load, read_rows, row_distributions
from playwright.sync_api import Browser
from test_conversations import CHATML, pack, tokenizer, write
from test_weights import annotate_several, invented

from pipelines.distribution.distribution import Distribution
from pipelines.distribution.divergence import divergences
from pipelines.distribution.figures import distribution_of_folder
from pipelines.distribution.settings import DistributionConfig
from shards import ShardFolder

Remit = Callable[..., tuple[int, str, str]]
SHARES = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")


def distribution(remit: Remit, shards: Path, to: Path, *options: object) -> tuple[dict, str]:
    code, output, error = remit("distribution", shards, "--json", to / "figures.json", *options)
    assert code == 0, error
    return json.loads((to / "figures.json").read_text()), output


def check(found: dict, values: np.ndarray, step: float) -> None:
    """Figures of a distribution against numpy over all of it."""
    assert found["count"] == len(values)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
    assert found["std"] == pytest.approx(values.std(), rel=1e-9, abs=1e-12)
    assert found["mean_absolute"] == pytest.approx(np.abs(values).mean(), rel=1e-9, abs=1e-12)
    assert found["share_above_0"] == (values > 0).mean()
    assert (found["min"], found["max"]) == (values.min(), values.max())
    for share in SHARES:
        exact = np.quantile(values, float(share), method="inverted_cdf")
        assert found["quantiles"][share] == pytest.approx(exact, abs=0 if step else 1 / 128 + 1e-9), share
    histogram = found["histogram"]
    edges = histogram["left"] + histogram["width"] * np.arange(len(histogram["shares"]) + 1)
    rounded = np.rint(values * 64) / 64  # what is between two bins is nearer to one of their multiples of 1/64
    counts = np.histogram(rounded, edges)[0]
    assert np.allclose(histogram["shares"], counts / len(values), atol=1e-12)
    assert len(counts) <= 129
    assert histogram["below"] == pytest.approx((rounded < edges[0]).mean())
    assert histogram["above"] == pytest.approx((rounded > edges[-1]).mean())
    assert histogram["below"] + histogram["above"] < 2e-3 + 2 / len(values)


@pytest.mark.parametrize(
    "values",
    [np.array([-0.25]), np.array([0.0, 0.0, 1 / 64]), np.random.default_rng(0).standard_cauchy(5_000), np.full(900, 3.0),
     np.random.default_rng(1).normal(-50, 1e-4, 3_000), -np.random.default_rng(2).exponential(2, 20_000)],
    ids=["one", "three", "heavy tails", "constant", "far from 0", "log-probs"],
)  # fmt: skip
def test_pieces_give_what_the_whole_gives(values: np.ndarray) -> None:
    whole, pieces = Distribution(), Distribution()
    whole.add(values)
    for piece in np.array_split(values, 7):  # some of them empty
        pieces.add(piece)
    for found in (whole.figures(), pieces.figures()):
        inside = np.abs(values).max() < 64
        if inside:
            check(found, values, 0)
        else:
            assert found["mean"] == pytest.approx(values.mean(), rel=1e-9)
            assert found["quantiles"]["0.5"] == pytest.approx(np.median(values), abs=0.02)
            assert (found["min"], found["max"]) == (values.min(), values.max())


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize("step", [1 / 64, 0.0])
def test_figures_are_those_of_numpy(tmp_path: Path, small: Path, remit: Remit, context: str, step: float) -> None:
    """Three columns over rows of unequal lengths, some of which one model left out."""

    def finer(seed: int) -> Callable[[dict], list]:
        def values(row: dict) -> list:
            noise = np.random.default_rng([9, seed, *row["input_ids"]]).uniform(-0.01, 0, len(row["input_ids"]))
            found = invented(seed, context)(row)
            return found if step else [None if v is None else v + n for v, n in zip(found, noise.tolist())]

        return values

    columns = {name: finer(seed) for seed, name in enumerate(("after", "base", "rl"))}
    settings = {name: {"context": context, "logprob_step": step} for name in columns}
    shards = annotate_several(small, tmp_path / "s", columns, {"base": {0, 7, 33}, "rl": {7, 8}}, **settings)
    options = ("--columns", "base,after", "--rows", 0)
    found, output = distribution(remit, shards, tmp_path, *options)
    rows = [row for number, row in enumerate(read_rows(shards)) if number not in (0, 7, 8, 33)]
    own = {
        name: np.array([v for row in rows for v in row[f"{name}_logprobs"] if v is not None], dtype=np.float64)
        for name in columns
    }
    assert found["columns"] == ["rl", "base", "after"]
    assert list(found["logprobs"]) == ["rl", "base", "after"]
    for name, values in own.items():
        check(found["logprobs"][name], values, step)
    pairs = [(entry["of"], entry["minus"]) for entry in found["differences"]]
    assert pairs == [("rl", "base"), ("rl", "after"), ("after", "base")]
    for one, other in pairs:
        entry = next(entry for entry in found["differences"] if (entry["of"], entry["minus"]) == (one, other))
        check(entry, own[one] - own[other], step)
    assert found["sample"]["rows_quarantined"] == 4
    assert found["sample"]["predicted_tokens"] == len(own["rl"])
    assert (found["kl"], found["no_kl"]) == ([], ["base", "after"])
    assert "No KL divergence between rl and base, after: it needs the most probable tokens of both" in output
    assert f"{own['rl'].mean():.4f}" in output
    # a sample: another seed is another one, and rows are those of remit weights
    one, other, again = (
        distribution(remit, shards, tmp_path, "--rows", 20, "--seed", seed)[0]["logprobs"]["rl"] for seed in (1, 2, 1)
    )
    assert one == again != other
    assert one["count"] < len(own["rl"])


def test_tokens_that_are_not_to_be_predicted_do_not_count(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path / "tok", template=CHATML)
    given = [
        {
            "messages": [
                {"role": "user", "content": "a question " * n},
                {"role": "assistant", "content": "yes " * (n % 5)},
            ]
        }
        for n in range(1, 30, 3)
    ]
    packed = pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "p", train_on="assistant").path
    one, other = invented(1, "document"), invented(2, "document")
    scored = annotate(annotate(packed, tmp_path / "s", one, "document"), tmp_path / "t", other, "document", name="base")
    rows = read_rows(scored)
    assert {tokens for row in rows for tokens in row["predict"]} == {True, False}
    pairs = [
        (rl, base)
        for row in rows
        for rl, base, predict in zip(row["rl_logprobs"], row["base_logprobs"], row["predict"])
        if predict and rl is not None
    ]
    found = distribution_of_folder(ShardFolder(scored), DistributionConfig(str(scored)), lambda rows, tokens: None)
    assert found["sample"]["predicted_tokens"] == len(pairs)
    rl, base = np.array(pairs).T
    assert found["logprobs"]["rl"]["mean"] == pytest.approx(rl.mean(), rel=1e-9)
    assert found["differences"][0]["mean"] == pytest.approx((rl - base).mean(), rel=1e-9)


def full(one_V: np.ndarray, other_V: np.ndarray) -> float:
    return float((one_V * np.log(one_V / other_V)).sum())


def test_divergence_by_hand() -> None:
    """Two places over the tokens 0 to 4; what each model stores of the other's tokens decides the classes."""
    p, q = np.array([0.5, 0.2, 0.15, 0.1, 0.05]), np.array([0.1, 0.3, 0.4, 0.15, 0.05])
    top, other = (
        (np.array([[0, 1], [0, 1]]), np.log(p[[[0, 1]] * 2])),
        (np.array([[2, 1]] * 2), np.log(q[[[2, 1]] * 2])),
    )
    own = np.array([1, 3])
    ((forward, backward, known),) = divergences(own, np.log(p[own]), np.log(q[own]), top, other, 1e-9)
    # place 0: token 1, which both have and is the row's own, and all others; place 1: tokens 1 and 3, and all others
    classes = [[[1], [0, 2, 3, 4]], [[1], [3], [0, 2, 4]]]
    for place, of_place in enumerate(classes):
        one, two = (np.array([v[own].sum() for own in of_place]) for v in (p, q))
        assert forward[place] == pytest.approx(full(one, two), rel=1e-9)
        assert backward[place] == pytest.approx(full(two, one), rel=1e-9)
    assert known == pytest.approx([0.2, 0.3])


def test_divergence_is_below_that_of_the_vocabulary_and_nears_it() -> None:
    random = np.random.default_rng(3)
    size, places = 40, 60
    p, q = (random.dirichlet(np.full(size, 0.3), places) for _ in range(2))
    q = 0.7 * p + 0.3 * q + 1e-5
    q /= q.sum(axis=1, keepdims=True)
    own = random.integers(0, size, places)
    at = np.arange(places)
    exact = np.array([full(one + 1e-300, two) for one, two in zip(p, q)])
    means = []
    for k in (1, 2, 5, 20, size):
        tops = []
        for v in (p, q):
            ids = np.argsort(-v, axis=1, kind="stable")[:, :k]
            tops.append((ids, np.log(np.take_along_axis(v, ids, axis=1))))
        pieces = list(divergences(own, np.log(p[at, own]), np.log(q[at, own]), *tops, 1e-12))
        forward, backward, known = map(np.concatenate, zip(*pieces))
        assert (forward <= exact + 1e-9).all()
        assert (backward >= -1e-12).all()
        assert (known <= 1).all()
        means.append(forward.mean())
    assert means == sorted(means)
    assert means[-1] == pytest.approx(exact.mean(), rel=1e-6)
    same = next(iter(divergences(own, np.log(p[at, own]), np.log(p[at, own]), tops[0], tops[0], 1e-6)))
    assert np.abs(same[0]).max() < 1e-12


@pytest.fixture(scope="module")
def with_top(tmp_path_factory: pytest.TempPathFactory, small: Path, models: dict[str, Path]) -> Path:
    """Columns rl, base and far with eight and twelve tokens of the first two, rounded."""
    folder, step = tmp_path_factory.mktemp("top"), 1 / 64
    shards = small
    for name, model, k in (("rl", "reference", 8), ("base", "base", 12), ("far", "base", 0)):
        top = top_by_model(models[model], "packed", k, step) if k else None
        values = by_model(models[model], "packed", step) if k else invented(5, "packed")
        shards = annotate(shards, folder / name, values, "packed", step, name, top)
    return shards


def test_divergence_of_a_folder(tmp_path: Path, with_top: Path, models: dict[str, Path], remit: Remit) -> None:
    found, output = distribution(remit, with_top, tmp_path, "--html", tmp_path / "page.html", "--columns", "base,far")
    (own,) = found["kl"]
    assert (own["reference"], own["other"], found["no_kl"]) == ("rl", "base", ["far"])
    assert own["forward"]["count"] == own["backward"]["count"] == found["sample"]["predicted_tokens"]
    loaded, exact, known = [load(models[name]) for name in ("reference", "base")], [], []
    for row in read_rows(with_top):
        for token, (p_V, q_V) in enumerate(zip(*(row_distributions(model, row, "packed") for model in loaded))):
            if p_V is not None:
                p, q = (v.detach().double().exp().numpy() for v in (p_V, q_V))
                exact.append(full(p, q))
                both = set(np.argsort(-p)[:8]) & set(np.argsort(-q)[:12]) | {row["input_ids"][token]}
                known.append(p[list(both)].sum())
    assert own["known_probability"] == pytest.approx(np.mean(known), abs=0.01)
    assert 0 < own["forward"]["mean"] < np.mean(exact) + 0.02
    assert "KL(rl || base)" in output
    assert "KL(base || rl)" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_refusals(tmp_path: Path, small: Path, with_top: Path, annotated: dict[str, Path], remit: Remit) -> None:
    mixed = annotate_several(
        small, tmp_path / "mixed", {"rl": invented(1, "packed"), "base": invented(2, "document")},
        base={"context": "document"},
    )  # fmt: skip
    for shards, options, code, message in (
        (small, (), 1, "has no log-probs of a reference named 'rl'"),
        (with_top, ("--columns", "base,none"), 1, "has no log-probs of a reference named 'none'"),
        (with_top, ("--columns", "rl"), 2, "--columns is 'rl', expected names of columns beside the reference 'rl'"),
        (with_top, ("--columns", "base,base"), 2, "each once"),
        (with_top, ("--html", tmp_path / "page.txt"), 2, "expected the name of a page"),
        (with_top, ("--rows", -1), 2, "--rows is -1"),
        (mixed, (), 1, "rl_logprobs was scored in packed context, base_logprobs in document context"),
        (tmp_path / "none", (), 1, "none"),
    ):
        got, _, error = remit("distribution", shards, *options)
        assert (got, message in " ".join(error.replace("│", " ").split())) == (code, True), error
    alone = annotate_several(small, tmp_path / "alone", {"rl": invented(1, "packed")})
    code, _, error = remit("distribution", alone)
    assert (code, "has the log-probs of 'rl' alone, expected those of another model" in error) == (1, True), error
    damaged = shutil.copytree(with_top, tmp_path / "damaged")
    part = sorted(damaged.glob("*.arrow"))[-1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    code, _, error = remit("distribution", damaged, "--rows", 0)
    assert (code, "differs from its commit record" in error) == (1, True), error


@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(tmp_path: Path, browser: Browser, with_top: Path, remit: Remit, width: int) -> None:
    page = tmp_path / "page.html"
    assert remit("distribution", with_top, "--html", page)[0] == 0
    with open_page(browser, page, width) as opened:
        drawn = "[...document.querySelectorAll('.js-plotly-plot')].map(b => b.querySelectorAll('.scatterlayer .js-line').length)"
        assert opened.page.evaluate(drawn) == [3, 3, 2]
        assert opened.overflow == 0
        assert (opened.problems, opened.requests) == ([], [])
        opened.page.get_by_text("log", exact=True).first.click()
        axis = "document.querySelector('.js-plotly-plot')._fullLayout.yaxis.type"
        opened.page.wait_for_timeout(200)
        assert opened.page.evaluate(axis) == "log"
        assert opened.problems == []
