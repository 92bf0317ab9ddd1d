"""remit weights against float64 over pyarrow rows, a case done by hand, and what it refuses."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from annotated import by_model, run
from conftest import write_corpus
from oracles import contexts, read_rows

from pipelines.choose_rows import choose_rows
from pipelines.cli import parse
from scorer.config import PackConfig
from scorer.pack import pack
from shards import PartPlan, ShardFolder, row_schema, write_part
from shards.manifest import Manifest, part_name

Remit = Callable[..., tuple[int, str, str]]
Values = Callable[[dict], list]
MAPS = {
    "sigmoid": lambda x: 2 / (1 + np.exp(-x)),
    "exp": lambda x: np.exp(x / 2),
    "linear": lambda x: max(0, 1 + x / 2),
}


def annotate_several(
    shards: Path,
    out: Path,
    columns: dict[str, Values],
    quarantined: dict[str, set[int]] | None = None,
    **settings: dict[str, object],
) -> Path:
    """Write `shards` again with a column of each name. quarantined: rows of the folder that a reference left out;
    settings: of a reference, by its name."""
    old, quarantined = Manifest.read(shards), quarantined or {}
    columns = dict(sorted(columns.items()))  # the order that a manifest is read in
    entry = {"context": "packed", "logprob_step": 1 / 64, "model": "oracle"}
    references = {name: entry | settings.get(name, {}) for name in columns}
    plan = Manifest(**{f: getattr(old, f) for f in old.__dataclass_fields__} | {"references": references})
    shutil.copytree(shards / "_tokenizer", out / "_tokenizer")
    plan.write(out)
    schema = row_schema(columns)
    first = 0
    for index, part in enumerate(plan.parts):
        rows_left_out = {
            name: sorted(row - first for row in rows if first <= row < first + part.rows)
            for name, rows in quarantined.items()
        }
        batches, row_of_part = [], 0
        for batch in pa.ipc.open_file(shards / part.name).read_all().to_batches():
            rows = batch.to_pylist()
            arrays = [
                pa.array(
                    [
                        [None] * len(row["input_ids"])
                        if row_of_part + place in rows_left_out.get(name, [])
                        else values(row)
                        for place, row in enumerate(rows)
                    ],
                    pa.list_(pa.float32()),
                )
                for name, values in columns.items()
            ]
            batches.append(pa.record_batch([*batch.columns, *arrays], schema=schema))
            row_of_part += len(rows)
        kept = {name: rows for name, rows in rows_left_out.items() if rows}
        write_part(out, part.name, schema, plan.part_metadata(index), batches, kept)
        first += part.rows
    return out


def invented(seed: int, context: str) -> Values:
    """Log-probs in steps of 1/64 that depend on the row; None where nothing precedes."""

    def values(row: dict) -> list:
        random = np.random.default_rng([seed, *row["input_ids"]])
        logprobs = (-np.round(random.exponential(2.0, len(row["input_ids"])) * 64) / 64).tolist()
        for start, _ in contexts(row, context):
            logprobs[start] = None
        return logprobs

    return values


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, small: Path) -> dict[str, Path]:
    """Folders with the columns rl and base, by context."""
    folder = tmp_path_factory.mktemp("both")
    return {
        context: annotate_several(
            small,
            folder / context,
            {"rl": invented(1, context), "base": invented(2, context)},
            rl={"context": context},
            base={"context": context},
        )
        for context in ("packed", "document")
    }


def plan(remit: Remit, shards: Path, to: Path, *options: object) -> tuple[dict, str]:
    code, output, error = remit("weights", "--shards", shards, "--json", to / "plan.json", *options)
    assert code == 0, error
    return json.loads((to / "plan.json").read_text()), output


def expected(rows: list[dict], context: str, centring: str, weight_map: str, epsilon: float, min_count: int) -> dict:
    """The figures in float64 from the rows of pyarrow, token by token."""
    weights, deltas, low, high = [], [], 0, 0
    by_token: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        groups: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for number, (start, end) in enumerate(contexts(row, "document")):
            for t in range(start, end):
                if row["rl_logprobs"][t] is not None and row["base_logprobs"][t] is not None:
                    delta = row["rl_logprobs"][t] - row["base_logprobs"][t]
                    groups[number if centring == "document" else 0].append((row["input_ids"][t], delta))
        for group in groups.values():
            mean = 0 if centring == "none" else sum(delta for _, delta in group) / len(group)
            for token, delta in group:
                raw = MAPS[weight_map](delta - mean)
                low, high = low + (raw < 1 - epsilon), high + (raw > 1 + epsilon)
                weights.append(min(max(raw, 1 - epsilon), 1 + epsilon))
                deltas.append(delta)
                by_token[token].append((weights[-1], delta))
    w = np.array(weights)
    means = {token: np.mean(pairs, axis=0) for token, pairs in by_token.items() if len(pairs) >= min_count}
    return {
        "predicted": len(w),
        "line": {
            "clipped_low": low / len(w),
            "clipped_high": high / len(w),
            "in_between": 1 - (low + high) / len(w),
            "effective_share": w.sum() ** 2 / (w**2).sum() / len(w),
            "weight_mean": w.mean(),
            "weight_std": w.std(),
        },
        "deltas": np.array(deltas),
        "means": means,
        "counts": {token: len(pairs) for token, pairs in by_token.items()},
    }


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize(
    ("centring", "weight_map"), [("row", "sigmoid"), ("document", "exp"), ("none", "linear"), ("none", "sigmoid")]
)
def test_figures_are_those_of_float64(
    both: dict[str, Path], tmp_path: Path, remit: Remit, context: str, centring: str, weight_map: str
) -> None:
    options = ("--rows", 0, "--centring", centring, "--weight-map", weight_map, "--min-count", 5, "--top", 4)
    found, _ = plan(remit, both[context], tmp_path, *options, "--show-epsilon", 0.4)
    rows = read_rows(both[context])
    assert {len(row["input_ids"]) for row in rows} > {1, 24}  # one-token rows predict nothing
    assert found["sample"] == {
        "rows": len(rows),
        "rows_total": len(rows),
        "rows_quarantined": 0,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "tokens_total": sum(len(row["input_ids"]) for row in rows),
        "predicted_tokens": expected(rows, context, centring, weight_map, 0.2, 5)["predicted"],
        "seed": 0,
    }
    assert [*found["epsilons"]] == ["0.05", "0.1", "0.2", "0.3", "0.5", "inf"]
    for epsilon, line in found["epsilons"].items():
        truth = expected(rows, context, centring, weight_map, float(epsilon), 5)
        assert line == pytest.approx(truth["line"], abs=2e-6, rel=2e-6), epsilon

    truth = expected(rows, context, centring, weight_map, 0.4, 5)
    assert found["excess_loss"]["mean"] == pytest.approx(truth["deltas"].mean(), abs=1e-6)
    for share, value in found["excess_loss"]["quantiles"].items():
        assert value == pytest.approx(np.quantile(truth["deltas"], float(share), method="inverted_cdf"), abs=1 / 64)
    vocabulary = found["vocabulary"]
    assert (vocabulary["tokens"], vocabulary["epsilon"]) == (len(truth["means"]), "0.4")
    for direction, sign in (("up", -1), ("down", 1)):
        best = sorted(truth["means"].values(), key=lambda pair: (sign * round(pair[0], 5), sign * pair[1]))[:4]
        assert len(vocabulary[direction]) == 4
        for entry, (weight, _) in zip(vocabulary[direction], best):
            assert entry["weight_mean"] == pytest.approx(weight, abs=2e-6)
            own = truth["means"][entry["id"]]
            assert (entry["weight_mean"], entry["excess_loss_mean"]) == pytest.approx(tuple(own), abs=2e-6)
            assert entry["count"] == truth["counts"][entry["id"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """x e x | e x e | x e x | e, with e the end of a document: nine tokens and a row of one token."""
    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder / "c.jsonl", ["x"] * 5)
    pack(PackConfig([str(folder / "c.jsonl")], str(tokenizer_folder), folder / "packed", 3, tokens_per_shard=6))
    return folder / "packed"


def test_case_done_by_hand(tiny: Path, tmp_path: Path, remit: Remit) -> None:
    """Every e has an excess loss of 1 + ln 3, every x of 1 - ln 3: centred +-ln 3, weights 3/2 and 1/2."""

    def stored(excess: bool) -> Values:
        def values(row: dict) -> list:
            signs = [1 if token == 0 else -1 for token in row["input_ids"]]
            return [None, *(-4.0 + excess * (1 + sign * math.log(3)) for sign in signs[1:])]

        return values

    columns = {"base": stored(False), "rl": stored(True)}
    folder = annotate_several(tiny, tmp_path / "both", columns, rl={"logprob_step": 0})
    assert [len(row["input_ids"]) for row in read_rows(folder)] == [3, 3, 3, 1]
    found, output = plan(remit, folder, tmp_path, "--epsilons", "0.2,inf", "--min-count", 3, "--top", 5)
    assert found["sample"]["predicted_tokens"] == 6
    line = {"clipped_low": 0.5, "clipped_high": 0.5, "in_between": 0, "weight_mean": 1}
    assert found["epsilons"]["0.2"] == pytest.approx(line | {"effective_share": 1 / 1.04, "weight_std": 0.2}, abs=1e-6)
    line = {"clipped_low": 0, "clipped_high": 0, "in_between": 1, "weight_mean": 1}
    assert found["epsilons"]["inf"] == pytest.approx(line | {"effective_share": 0.8, "weight_std": 0.5}, abs=1e-6)
    up, down = found["vocabulary"]["up"], found["vocabulary"]["down"]
    assert [(entry["token"], entry["count"]) for entry in up] == [("<|endoftext|>", 3), ("x", 3)]
    assert [entry["token"] for entry in down] == ["x", "<|endoftext|>"]
    assert [entry["weight_mean"] for entry in up] == pytest.approx([1.2, 0.8])
    assert [entry["excess_loss_mean"] for entry in up] == pytest.approx([1 + math.log(3), 1 - math.log(3)], abs=1e-6)
    assert re.search(r"0\.2 .*50\.0% .*50\.0% .*0\.0% .*96\.2% .*1\.000 .*0\.200", output)
    assert "rounded to 0.015625 nat" in " ".join(output.split())
    found, output = plan(remit, folder, tmp_path, "--min-count", 4)
    assert found["vocabulary"]["up"] == found["vocabulary"]["down"] == []


def test_a_weight_beyond_float32_is_no_number(tiny: Path, tmp_path: Path, remit: Remit) -> None:
    columns: dict[str, Values] = {
        "rl": lambda row: [None, *[-1.0] * (len(row["input_ids"]) - 1)],
        "base": lambda row: [None, *[-500.0, -1.0][: len(row["input_ids"]) - 1]],
    }
    folder = annotate_several(tiny, tmp_path / "both", columns)
    found, output = plan(
        remit, folder, tmp_path, "--weight-map", "exp", "--min-count", 1, "--centring", "none", "--show-epsilon", "inf"
    )
    assert found["epsilons"]["inf"]["weight_mean"] is None
    assert found["epsilons"]["0.5"]["weight_mean"] == pytest.approx(1.25)
    assert found["vocabulary"]["up"][0]["weight_mean"] is None
    assert re.search(r"inf .* - .* - .* -", output)


def test_figures_are_those_of_the_first_step_of_training(
    small: Path, models: dict[str, Path], tmp_path: Path, remit: Remit
) -> None:
    columns = {"rl": models["reference"], "base": models["base"]}
    folder = annotate_several(
        small,
        tmp_path / "both",
        {name: by_model(model, "packed", 0) for name, model in columns.items()},
        rl={"logprob_step": 0},
        base={"logprob_step": 0},
    )
    found, output = plan(remit, folder, tmp_path, "--rows", 0, "--centring", "document", "--epsilons", "0.3")
    rows = found["sample"]["rows"]
    (step,) = run(tmp_path / "run", folder, models["base"], global_batch_size=rows, centring="document", epsilon=0.3)
    assert found["sample"]["predicted_tokens"] == step["predicted_tokens"]
    line = found["epsilons"]["0.3"]
    # a token in a thousand may stand so near to a clip that another forward pass decides otherwise
    assert (line["clipped_low"], line["clipped_high"]) == pytest.approx(
        (step["clipped_low"], step["clipped_high"]), abs=1e-3
    )
    assert (line["weight_mean"], line["weight_std"]) == pytest.approx(
        (step["weight_mean"], step["weight_std"]), abs=1e-5
    )
    assert line["effective_share"] * step["predicted_tokens"] == pytest.approx(step["effective_tokens"], rel=1e-5)
    assert found["excess_loss"]["mean"] == pytest.approx(step["delta_mean"], abs=1e-5)
    assert "rounded" not in output


def test_sample_is_a_function_of_the_seed(both: dict[str, Path], tmp_path: Path, remit: Remit) -> None:
    first, _ = plan(remit, both["packed"], tmp_path, "--rows", 30)
    again, _ = plan(remit, both["packed"], tmp_path, "--rows", 30)
    other, _ = plan(remit, both["packed"], tmp_path, "--rows", 30, "--seed", 1)
    assert first == again
    assert first["sample"]["rows"] == other["sample"]["rows"] == 30
    assert first["epsilons"] != other["epsilons"]
    everything, output = plan(remit, both["packed"], tmp_path, "--rows", 10**9)
    assert everything["sample"]["rows"] == everything["sample"]["rows_total"]
    assert f"rows: {everything['sample']['rows']:,} of {everything['sample']['rows']:,} (all)" in output


def test_each_part_is_opened_once(
    both: dict[str, Path], tmp_path: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    inner = ShardFolder.open_rows
    monkeypatch.setattr(ShardFolder, "open_rows", lambda self, *a: (opened.append(a[0]), inner(self, *a))[1])
    plan(remit, both["packed"], tmp_path, "--rows", 60)
    assert opened == sorted(set(opened))
    assert len(opened) > 2


def test_quarantined_rows_are_left_out(small: Path, tmp_path: Path, remit: Remit) -> None:
    total = len(read_rows(small))
    left_out = {"rl": {0, 3}, "base": {3, total - 1}}
    columns = {"rl": invented(1, "packed"), "base": invented(2, "packed")}
    folder = annotate_several(small, tmp_path / "both", columns, left_out)
    found, output = plan(remit, folder, tmp_path, "--rows", 0)
    kept = [row for place, row in enumerate(read_rows(folder)) if place not in {0, 3, total - 1}]
    truth = expected(kept, "packed", "row", "sigmoid", 0.2, 20)
    assert found["sample"]["rows_quarantined"] == 3
    assert found["sample"]["predicted_tokens"] == truth["predicted"]
    assert found["sample"]["tokens"] == sum(len(row["input_ids"]) for row in kept)
    assert found["epsilons"]["0.2"] == pytest.approx(truth["line"], abs=2e-6)
    assert "3 of them quarantined and left out" in output
    everything = {"rl": set(range(total))}
    folder = annotate_several(small, tmp_path / "none", columns, everything)
    code, _, error = remit("weights", "--shards", folder)
    assert (code, "none of the" in error and "raise --rows" in error) == (1, True)


def test_tables_show_what_json_holds(both: dict[str, Path], tmp_path: Path, remit: Remit) -> None:
    found, output = plan(remit, both["document"], tmp_path, "--rows", 50, "--top", 7, "--min-count", 3)
    assert "clipped high ┃ in between" in output  # no header is broken in two
    assert max(map(len, output.splitlines())) <= 80
    assert str(tmp_path) not in output
    assert str(both["document"]) not in output + (tmp_path / "plan.json").read_text()
    cells = [[cell.strip() for cell in line.split("│")] for line in output.splitlines() if "│" in line]
    for epsilon, line in found["epsilons"].items():
        shares = [f"{line[key]:.1%}" for key in ("clipped_low", "clipped_high", "in_between", "effective_share")]
        assert [epsilon, *shares, f"{line['weight_mean']:.3f}", f"{line['weight_std']:.3f}"] in cells
    excess = found["excess_loss"]
    assert [*(f"{value:+.2f}" for value in excess["quantiles"].values()), f"{excess['mean']:+.3f}"] in cells
    for entry in found["vocabulary"]["up"] + found["vocabulary"]["down"]:
        string = "".join(c if c in "'\"" else repr(c)[1:-1] for c in entry["token"]).replace(" ", "·")
        line = [f"{entry['count']:,}", f"{entry['weight_mean']:.3f}", f"{entry['excess_loss_mean']:+.3f}"]
        assert [string, *line] in cells
    assert len(found["vocabulary"]["up"]) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows=-1",), "--rows is -1, expected 0 (all) or more"),
        (("--top", "0"), "--top is 0, expected at least 1"),
        (("--min-count", "0"), "--min-count is 0, expected at least 1"),
        (("--seed=-1",), "--seed is -1, expected at least 0"),
        (("--epsilons", "0.1;0.2"), "--epsilons is '0.1;0.2', expected numbers"),
        (("--epsilons", ""), "--epsilons is '', expected numbers"),
        (("--epsilons", "0.1,1"), "--epsilons has 1, expected"),
        (("--epsilons", "0,0.2"), "--epsilons has 0, expected"),
        (("--epsilons", "nan"), "--epsilons has nan, expected"),
        (("--show-epsilon", "2"), "--show-epsilon is 2, expected"),
        (("--base", "rl"), "--reference and --base are both 'rl'"),
        (("--json", "no-such-folder/plan.json"), "its folder does not exist"),
        (("--json", "."), "is a folder, expected a file"),
        (("--centring", "column"), "column"),
        (("--weight-map", "square"), "square"),
    ],
)
def test_bad_options_are_bad_usage(remit: Remit, options: tuple[str, ...], message: str) -> None:
    code, _, error = remit("weights", "--shards", "anywhere", *options)
    error = " ".join(re.sub("│", "", error).split())
    assert (code, message in error, "remit weights --help" in error) == (2, True, True), error


def test_each_epsilon_is_shown_once() -> None:
    config = parse(["weights", "--shards", "anywhere", "--epsilons", "0.2, inf,0.2"])
    assert config.epsilon_values == (0.2, math.inf)


def test_columns_that_cannot_be_compared(small: Path, both: dict[str, Path], tmp_path: Path, remit: Remit) -> None:
    def fails(folder: Path, message: str, *options: object) -> None:
        code, _, error = remit("weights", "--shards", folder, *options)
        assert (code, message in error) == (1, True), error

    fails(both["packed"], "no log-probs of a base named 'sft' (it has: base, rl); add them", "--base", "sft")
    fails(both["packed"], "or choose another --base", "--base", "sft")
    fails(both["packed"], "no log-probs of a reference named 'sft'", "--reference", "sft")
    fails(tmp_path / "nowhere", "no such folder")
    columns = {"rl": invented(1, "packed"), "base": invented(2, "document")}
    mixed = annotate_several(small, tmp_path / "mixed", columns, base={"context": "document"})
    fails(mixed, "rl_logprobs was scored in packed context, base_logprobs in document context")
    columns = {"rl": invented(1, "packed"), "base": invented(2, "packed")}
    for name in columns:
        fake = annotate_several(small, tmp_path / f"fake-{name}", columns, **{name: {"engine": "fake"}})
        fails(fake, f"{name}_logprobs comes from the fake engine")
    (fake / "_commits" / "part-00001.json").unlink()
    fails(fake, "are not committed")


def test_a_large_folder_is_sampled_from_some_of_its_parts() -> None:
    """Each part that is touched is hashed whole: 200 of 50,000 rows come from at most 64 of 5,000 parts."""
    plans = tuple(PartPlan(part_name(index), 10, 100) for index in range(5000))
    manifest = Manifest(10, 10, 10, {}, (), plans)
    chosen = choose_rows(manifest, 200, seed=1)
    assert len(np.unique(chosen)) == 200
    assert np.all(np.diff(chosen) > 0)
    assert 30 < len(np.unique(chosen // 10)) <= 64
    assert np.array_equal(chosen, choose_rows(manifest, 200, seed=1))
    assert not np.array_equal(chosen, choose_rows(manifest, 200, seed=2))
    assert len(choose_rows(manifest, 2000, seed=1)) == 2000  # as many parts as it takes
    assert len(choose_rows(manifest, 0, seed=1)) == 50_000
