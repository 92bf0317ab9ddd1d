"""remit train --mix: what the file may say, what is refused, what is logged, and the same rows through kills and ranks."""

import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from annotated import annotate, by_model, run
from built_once import BuiltOnce
from conftest import source_texts, write_corpus
from inline_ray import pack_inline
from oracles import load, read_rows, remit_step
from test_distributed import assert_same, finish, kill_tree, launch, metrics_of, wait_for

import trainer.tokenizer
from pipelines.commands.plan import run as run_plan
from pipelines.plan.settings import PlanConfig
from pipelines.ray_train import _absolute_shards
from scorer.config import PackConfig
from shards.folder import ShardFolder
from shards.manifest import Manifest
from trainer.config import TrainConfig
from trainer.dataset import RowDataset
from trainer.mixed_shards import MixedShards, block_rows, most_steps, table
from trainer.mixture import Mixture, given_mixture, read_mix
from trainer.tokenizer import check_tokenizer

Remit = Callable[..., tuple[int, str, str]]
STAGES = [{"after_step": 3, "weights": {"text": 0.1, "code": 0.9, "odd": 0}}]


@pytest.fixture(scope="module")
def folders(
    built_once: BuiltOnce, annotated: dict[str, Path], models: dict[str, Path], tokenizer_folder: Path
) -> dict[str, Path]:
    """Three folders that can be mixed: rows of other texts, of other lengths, in blocks of another size."""

    def build(folder: Path) -> None:
        for name, count, tokens in (("code", 60, 24 * 7), ("odd", 9, 24 * 4)):
            write_corpus(
                folder / name / "corpus" / "é.jsonl", [text[:90] for text in source_texts(count, seed=len(name))]
            )
            corpus, packed = str(folder / name / "corpus"), folder / name / "packed"
            pack_inline(PackConfig([corpus], str(tokenizer_folder), packed, 24, tokens_per_shard=tokens))
            values = by_model(models["reference"], "packed", 1 / 64)
            annotate(packed, folder / name / "scored", values, "packed", 1 / 64)

    built = built_once("for-mixtures", build)
    return {"text": annotated["packed"], "code": built / "code/scored", "odd": built / "odd/scored"}


def write_mix(path: Path, folders: dict[str, Path], weights: dict[str, float], stages: list | None = None) -> Path:
    sources = {name: {"shards": str(folders[name]), "weight": weight} for name, weight in weights.items()}
    path.write_text(yaml.safe_dump({"sources": sources} | ({"stages": stages} if stages else {}), sort_keys=False))
    return path


@pytest.fixture
def mix(tmp_path: Path, folders: dict[str, Path]) -> Path:
    return write_mix(tmp_path / "mix.yaml", folders, {"text": 0.6, "code": 0.3, "odd": 0.1}, STAGES)


def rows_of(mix: Path, batch: int, steps: int, seed: int = 0) -> list[list[dict]]:
    """The rows of each step, looked up by pyarrow at the places that the order names, each with the name of its source."""
    mixed = MixedShards.open(read_mix(mix))
    order = mixed.order(seed, batch)
    everything = []
    for name, folder in zip(mixed.names, mixed.folders):
        rows, starts = read_rows(Path(folder.path)), iter(block_rows(folder.manifest).tolist())
        first = 0
        for count in starts:
            everything.append([row | {"name": name} for row in rows[first : first + count]])
            first += count
    return [[everything[block][row] for block, row in order.rows(step * batch, batch)] for step in range(steps)]


def test_shares_are_of_tokens(folders: dict[str, Path], mix: Path) -> None:
    steps = rows_of(mix, 16, 400)
    tokens = {
        name: [sum(len(row["input_ids"]) for row in rows if row["name"] == name) for rows in steps] for name in folders
    }
    for first, last, shares in ((0, 3, None), (3, 400, {"text": 0.1, "code": 0.9, "odd": 0.0})):
        of_stage = {name: sum(values[first:last]) for name, values in tokens.items()}
        for name, share in (shares or {}).items():
            assert of_stage[name] / sum(of_stage.values()) == pytest.approx(share, abs=0.02)
    assert {row["name"] for rows in steps[:3] for row in rows} == {"text", "code", "odd"}


def test_a_mixture_trains_and_says_so(
    tmp_path: Path, folders: dict[str, Path], mix: Path, models: dict[str, Path], remit: Remit
) -> None:
    out = tmp_path / "out"
    arguments = ["train", "--mix", mix, "--model", models["base"], "--out", out, "--max-steps", 5, "--global-batch-size", 16,
                 "--dtype", "float32", "--learning-rate", 1e-6]  # fmt: skip
    code, _, error = remit(*arguments)
    assert code == 0, error
    assert "mixture of 3 sources, 5 steps" in error
    assert "from step 1: text 60.0%, code 30.0%, odd 10.0%" in error
    assert "after step 3: text 10.0%, code 90.0%, odd 0.0%" in error
    assert "to predict" not in error
    base, lines = load(models["base"]).double(), metrics_of(out)
    for line, rows in zip(lines, rows_of(mix, 16, 5), strict=True):
        want = remit_step(base, rows, "packed", "rl_logprobs", 0.2)
        for key in ("loss", "ntp_loss", "weight_mean"):
            assert line[key] == pytest.approx(float(want[key]), rel=1e-3)
        assert line["tokens"] - (lines[line["step"] - 2]["tokens"] if line["step"] > 1 else 0) == sum(
            len(row["input_ids"]) for row in rows
        )
        for name, figures in line["sources"].items():
            own = [row for row in rows if row["name"] == name]
            want = remit_step(base, own, "packed", "rl_logprobs", 0.2)
            assert figures["ntp_loss"] == pytest.approx(float(want["ntp_loss"]), rel=1e-3)
    seen = [row["name"] for rows in rows_of(mix, 16, 5) for row in rows]
    for name, figures in lines[-1]["mixture"].items():
        rows = Manifest.read(folders[name]).rows
        assert figures == {"rows": seen.count(name), "epochs": pytest.approx(seen.count(name) / rows)}
    settings = json.loads((out / "run.json").read_text())
    assert settings["mixture"]["stages"][1] == {"after_step": 3, "weights": {"text": 0.1, "code": 0.9, "odd": 0.0}}
    assert settings["mixture"]["sources"]["odd"]["manifest_sha256"] == Manifest.read(folders["odd"]).checksum
    (out / "model").rename(tmp_path / "model")  # another mixture is refused by field
    write_mix(mix, folders, {"text": 0.5, "code": 0.4, "odd": 0.1}, STAGES)
    code, _, error = remit(*arguments)
    assert code == 1
    assert ("holds another run: weights (as shares) is 'code 0.3, odd 0.1, text 0.6' there, 'code 0.4, odd 0.1, text 0.5' asked "
            "for now; choose another --out") in error  # fmt: skip
    write_mix(mix, folders, {"odd": 0.2, "text": 1.2, "code": 0.6}, [STAGES[0] | {"after_step": 4}])
    code, _, error = remit(*arguments)
    assert (code, "stage after step 4 (as shares) is not set there, 'code 0.9, odd 0, text 0.1' asked" in error) == (
        1,
        True,
    )
    assert "(also: stage after step 3 (as shares))" in error, error
    code, _, error = remit(*arguments[:1], "--shards", folders["text"], *arguments[3:])
    assert (code, "holds another run" in error) == (1, True), error


def limit(mix: Path, name: str, most: float) -> None:
    value = yaml.safe_load(mix.read_text())
    value["sources"][name]["max_epochs"] = most
    mix.write_text(yaml.safe_dump(value, sort_keys=False))


def test_a_mixture_goes_on_without_some_steps(
    tmp_path: Path, folders: dict[str, Path], mix: Path, models: dict[str, Path]
) -> None:
    """Longer than it began, past the begin of a stage: each step has its own rows, and the ones left out do not count."""
    settings: dict = {
        "mix": mix,
        "global_batch_size": 16,
        "schedule": "constant",
        "warmup_steps": 0,
        "checkpoint_every": 2,
    }
    first = run(tmp_path / "out", (), models["base"], max_steps=5, skip_steps=("3..4",), **settings)
    lines = run(tmp_path / "out", (), models["base"], max_steps=8, skip_steps=("6",), **settings)
    assert lines[: len(first)] == first
    assert [line["step"] for line in lines] == [1, 2, 5, 7, 8]
    steps, trained, tokens = rows_of(mix, 16, 8), list[str](), 0
    for line in lines:
        trained += [row["name"] for row in steps[line["step"] - 1]]
        tokens += sum(len(row["input_ids"]) for row in steps[line["step"] - 1])
        assert line["tokens"] == tokens
        assert {name: of["rows"] for name, of in line["mixture"].items()} == {
            name: trained.count(name) for name in folders
        }
    base = load(models["base"]).double()
    assert lines[0]["ntp_loss"] == pytest.approx(
        float(remit_step(base, steps[0], "packed", None, 0.2)["ntp_loss"]), rel=1e-5
    )
    code = sum(row["name"] == "code" for rows in steps for row in rows)
    rows_there = Manifest.read(folders["code"]).rows
    limit(mix, "code", (code + 0.5) / rows_there)  # what the first eight steps take is within it
    assert run(tmp_path / "out", (), models["base"], max_steps=8, **settings) == lines
    with pytest.raises(ValueError, match=r"code: 9 steps go through it .* at most --max-steps 8"):
        run(tmp_path / "out", (), models["base"], max_steps=9, **settings)

    source = tmp_path / "out/checkpoints/step-000006"
    same = run(tmp_path / "same", (), models["base"], max_steps=8, resume_from=source, **settings)
    assert [line["loss"] for line in same] == [line["loss"] for line in lines if line["step"] > 6]
    assert sum(of["rows"] for of in same[0]["mixture"].values()) == 7 * 16
    with pytest.raises(ValueError, match="code: 9 steps go through it"):
        run(tmp_path / "more", (), models["base"], max_steps=9, resume_from=source, **settings)
    other = write_mix(tmp_path / "other.yaml", folders, {"code": 0.9, "odd": 0.1})
    limit(other, "code", (31.5 + 1) / rows_there)
    settings |= {"mix": other, "resume_from": source}
    branch = run(tmp_path / "branch", (), models["base"], max_steps=8, **settings)  # of its own rows two steps alone
    assert [sum(of["rows"] for of in line["mixture"].values()) for line in branch] == [16, 32]
    assert json.loads((tmp_path / "branch/run.json").read_text())["resumed_from"]["rows_from"] == 6
    with pytest.raises(ValueError, match="code: 20 steps go through it"):
        run(tmp_path / "twenty", (), models["base"], max_steps=20, **settings)


def test_one_folder_is_the_same_with_a_weight(
    tmp_path: Path, folders: dict[str, Path], models: dict[str, Path]
) -> None:
    plain = run(tmp_path / "plain", folders["text"], models["base"], max_steps=2)
    weighted = run(tmp_path / "weighted", f"{folders['text']}=0.3", models["base"], max_steps=2)
    assert [line["loss"] for line in plain] == [line["loss"] for line in weighted]
    assert "mixture" not in json.loads((tmp_path / "weighted/run.json").read_text())


def test_rows_for_other_loops_are_the_same(mix: Path) -> None:
    wanted = [row["input_ids"] for rows in rows_of(mix, 16, 6) for row in rows]
    rows = RowDataset(reference="rl", mix=mix, global_batch_size=16)
    assert [row.input_ids.tolist() for row, _ in zip(rows, wanted)] == wanted
    ranks = [
        iter(RowDataset(reference="rl", mix=mix, global_batch_size=16, rank=rank, world_size=3)) for rank in range(3)
    ]
    assert [next(ranks[place % 3]).input_ids.tolist() for place in range(len(wanted))] == wanted
    with pytest.raises(ValueError, match="give global_batch_size too"):
        RowDataset(reference="rl", mix=mix)
    with pytest.raises(ValueError, match="a mixture has no passes"):
        RowDataset(reference="rl", mix=mix, global_batch_size=16, epochs=1)


@pytest.mark.usefixtures("starts_processes")
def test_kills_and_other_ranks_under_a_mixture(tmp_path: Path, mix: Path, models: dict[str, Path]) -> None:
    """2 -> 1 -> 3 processes, killed before and after a stage begins, end in the losses of one that was left alone."""
    options = ("--mix", mix, "--checkpoint-every", 1, "--max-steps", 8)
    finish(launch(tmp_path / "whole", None, models["base"], 1, *options))
    out = tmp_path / "out"
    for ranks, stop_at in ((2, 2), (1, 5)):
        process = launch(out, None, models["base"], ranks, *options)
        wait_for(lambda stop_at=stop_at: (out / f"checkpoints/step-{stop_at:06d}").exists(), process)
        kill_tree(process)
        assert (out / f"checkpoints/step-{stop_at:06d}").exists()
        assert not (out / "model").exists()
    finish(launch(out, None, models["base"], 3, *options))
    assert_same(metrics_of(out), metrics_of(tmp_path / "whole"))
    assert [line["mixture"] for line in metrics_of(out)] == [line["mixture"] for line in metrics_of(tmp_path / "whole")]


def newest_checkpoint(out: Path) -> int:
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("starts_processes")
def test_many_kills_under_a_mixture(tmp_path: Path, mix: Path, models: dict[str, Path]) -> None:
    """Fifteen kills at random moments, 2 -> 1 -> 3 processes in turn, some of them within a step or as a checkpoint is written."""
    options = ("--mix", mix, "--checkpoint-every", 1, "--max-steps", 40)
    finish(launch(tmp_path / "whole", None, models["base"], 1, *options))
    rng, out = random.Random(3), tmp_path / "out"
    for number in range(15):
        process = launch(out, None, models["base"], (2, 1, 3)[number % 3], *options)
        wait_for(lambda step=2 * number + 1: newest_checkpoint(out) >= step, process)
        time.sleep(rng.uniform(0, 0.1))
        kill_tree(process)
        assert not (out / "model").exists()
    finish(launch(out, None, models["base"], 2, *options))
    assert_same(metrics_of(out), metrics_of(tmp_path / "whole"))
    assert [line["mixture"] for line in metrics_of(out)] == [line["mixture"] for line in metrics_of(tmp_path / "whole")]


@pytest.mark.usefixtures("starts_processes")
def test_a_bad_part_of_one_rank_stops_all_with_its_message(
    tmp_path: Path, folders: dict[str, Path], models: dict[str, Path]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folders["code"], bad)
    part = sorted(bad.glob("*.arrow"))[-1]
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 16
    part.write_bytes(data)
    options = ("--shards", f"{folders['text']}=0.5", f"{bad}=0.5", "--max-steps", 60)
    process = launch(tmp_path / "out", None, models["base"], 3, *options)
    output, _ = process.communicate(timeout=120)
    errors = [line.split(": ", 3)[-1] for line in output.splitlines() if "remit train: error: rank" in line]
    assert process.returncode != 0
    assert errors, output
    assert len({*errors}) == 1
    assert part.name in errors[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {shards: x, weight: -1}}", "sources.a.weight: is -1, expected a number of 0 or more"),
        ("sources: {a: {shards: x, weight: .nan}}", "sources.a.weight: is nan, expected"),
        ("sources: {a: {shards: x, weight: yes}}", "sources.a.weight: is True, expected"),
        ("sources: {a: {shards: x}}", "sources.a: has no weight"),
        ("sources: {a: {weight: 1}}", "sources.a.shards: is missing, expected a shard folder"),
        ("sources: {a: {shards: x, weight: 1, epochs: 2}}", "'epochs' is not known, expected one of shards, weight, max_epochs"),
        ("sources: {a: {shards: x, weight: 1, max_epochs: 0}}", "max_epochs: is 0, expected a number above 0"),
        ("sources: {a: {shards: x, weight: 0}}", "all weights after step 0 are 0"),
        ("sources: {a: {shards: x, weight: 0}, b: {shards: y, weight: 1}}", "a never has a weight above 0"),
        ("sources: {a: {shards: x, weight: 1}, a: {shards: y, weight: 1}}", "'a' is there twice"),
        ("sources: {1: {shards: x, weight: 1}}", "sources.1: is named 1, expected a word"),
        ("sources: [a]", "sources: is ['a'], expected a mapping"),
        ("weights: {a: 1}", "'weights' is not known, expected one of sources, stages"),
        ("", "is missing, expected sources:"),
        ("sources: {a: [", "cannot be read"),
        ("sources: {a: {shards: x, weight: 1}}\nstages: [{after_step: 0, weights: {a: 1}}]", "after step 0, expected more than 0"),
        ("sources: {a: {shards: x, weight: 1}}\nstages: [{after_step: 1.5, weights: {a: 1}}]", "after_step: is 1.5"),
        ("sources: {a: {shards: x, weight: 1}}\nstages: [{after_step: 2, weights: {b: 1}}]", "'b' is not known, expected one of a"),
        ("sources: {a: {shards: x, weight: 1}, b: {shards: y, weight: 1}}\nstages: [{after_step: 2, weights: {b: 1}}]",
         "weights: has none for a, expected one for each source; 0 leaves it out"),
        ("sources: {a: {shards: x, weight: 1}}\nstages: {a: 1}", "expected a list of"),
    ],
)  # fmt: skip
def test_files_that_say_something_else(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_mix(tmp_path / "mix.yaml")
    assert "\n" not in str(error.value)


def test_folders_on_the_command_line(tmp_path: Path) -> None:
    for shards, message in (
        (("a=1", "b"), "--shards b: has no weight, expected PATH=WEIGHT"),
        (("a=x", "b=1"), "--shards a=x: weight: is 'x', expected a number"),
        (("one/a=1", "two/a=1"), "another folder is called 'a' too; name them in a file"),
        ((), "neither --shards nor --mix is given"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            given_mixture(shards, None)
    with pytest.raises(ValueError, match="are both given"):
        given_mixture(("a",), tmp_path / "mix.yaml")
    (tmp_path / "lang=2").mkdir()
    assert not given_mixture((f"{tmp_path}/lang=2",), None).is_mixed
    assert given_mixture((f"{tmp_path}/lang=2",), None).folders == [f"{tmp_path}/lang=2"]
    found = given_mixture(("s3://bucket/a=0.4", "b=0.6"), None)
    assert [(source.name, source.shards, source.weight) for source in found.sources] == [
        ("a", "s3://bucket/a", 0.4), ("b", "b", 0.6),
    ]  # fmt: skip
    config = TrainConfig(("s3://bucket/a=0.4", "b=0.6"), "m", tmp_path / "out", max_steps=1)
    assert _absolute_shards(config) == ("s3://bucket/a=0.4", f"{Path('b').absolute()}=0.6")
    with pytest.raises(ValueError, match="a mixture has no passes of its own; give --max-steps"):
        TrainConfig(("a=1", "b=1"), "m", tmp_path / "out", epochs=2)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixes/a").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "mixes/mix.yaml").write_text("sources: {x: {shards: a, weight: 1}, y: {shards: b, weight: 1}}")
    monkeypatch.chdir(tmp_path)
    assert read_mix(Path("mixes/mix.yaml")).folders == [str(tmp_path / "mixes/a"), "b"]


def mixed(folders: dict[str, Path], weights: dict[str, float], **most: float) -> MixedShards:
    mixture = given_mixture([f"{folders[name]}={weight}" for name, weight in weights.items()][:1], None)
    sources = tuple(
        replace(mixture.sources[0], name=name, shards=str(folders[name]), weight=weight, max_epochs=most.get(name))
        for name, weight in weights.items()
    )
    return MixedShards.open(Mixture(sources, (replace(mixture.stages[0], weights=weights),)))


def test_max_epochs_says_how_many_steps_there_are(
    tmp_path: Path, folders: dict[str, Path], models: dict[str, Path], remit: Remit
) -> None:
    """The largest number that it allows passes, one more is refused; asked by brute force."""
    shards = mixed(folders, {"text": 0.7, "odd": 0.3}, odd=2.5)
    order, rows = shards.order(0, 8), shards.folders[1].manifest.rows
    allowed, name = most_steps(shards, order, 8)
    source = order.split(0, 8 * 3000)[0] == 1
    assert name == "odd"
    assert allowed == next(n for n in range(3000) if source[: 8 * (n + 1)].sum() > 2.5 * rows)
    path = write_mix(tmp_path / "mix.yaml", folders, {"text": 0.7, "odd": 0.3})
    value = yaml.safe_load(path.read_text())
    value["sources"]["odd"]["max_epochs"] = 2.5
    path.write_text(yaml.safe_dump(value))
    arguments = ["train", "--mix", path, "--model", models["base"], "--out", tmp_path / "out", "--global-batch-size", 8]
    code, _, error = remit(*arguments, "--max-steps", int(allowed) + 1)
    assert (code, f"odd: {int(allowed) + 1:,} steps go through it 2." in error) == (1, True), error
    assert f"max_epochs is 2.5; at most --max-steps {int(allowed)}" in error
    assert not (tmp_path / "out").exists()
    code, _, error = remit(*arguments)
    assert (code, "a mixture of 2 sources needs --max-steps" in error) == (1, True), error
    lines = table(shards, order, 3000, 8)
    assert "more than 4 epochs are rarely worth it" in next(line for line in lines if line.strip().startswith("odd"))


def test_the_table_has_the_tokens_to_predict(folders: dict[str, Path]) -> None:
    shards = mixed(folders, {"text": 0.5, "code": 0.3, "odd": 0.2})
    text, code, _ = shards.folders
    counted = [replace(file, predicted_tokens=file.tokens // 4) for file in text.manifest.corpus]
    text.manifest = replace(text.manifest, predict=True, corpus=tuple(counted))
    code.manifest = replace(code.manifest, predict=True)  # rows were selected, nothing was counted
    head, *lines = table(shards, shards.order(0, 8), 100, 8)
    assert re.search(r"3 sources, 100 steps, about [\d,]+ tokens; of the whole run", head)
    found = [re.search(r"([\d,]+) tokens +(\S+) to predict", line).groups() for line in lines[:3]]  # type: ignore[union-attr]
    tokens = [int(of.replace(",", "")) for of, _ in found]
    share = sum(file.tokens // 4 for file in text.manifest.corpus) / text.manifest.tokens
    assert int(found[0][1].replace(",", "")) == pytest.approx(tokens[0] * share, abs=1)
    assert (found[1][1], found[2][1]) == ("unknown", found[2][0])
    assert not any("from step 1" in line for line in lines)


def test_a_tokenizer_is_compared_once_for_all_folders(
    tmp_path: Path, folders: dict[str, Path], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison takes a second with a large vocabulary. Two ids that change places matter to the rows that have one."""
    ids = {name: {token for row in read_rows(path) for token in row["input_ids"]} for name, path in folders.items()}
    text = (tokenizer_folder / "tokenizer.json").read_text()
    nobodys = sorted({*json.loads(text)["model"]["vocab"].values()} - set.union(*ids.values()))
    texts = sorted(ids["text"] - ids["code"] - ids["odd"])
    opened = [ShardFolder(folders[name]) for name in ("odd", "code", "text")]

    def with_exchanged(one: int, other: int) -> Path:
        value = json.loads(text)
        exchange = {one: other, other: one}
        value["model"]["vocab"] = {token: exchange.get(at, at) for token, at in value["model"]["vocab"].items()}
        folder = tmp_path / f"{one}-{other}"
        shutil.copytree(tokenizer_folder, folder)
        (folder / "tokenizer.json").write_text(json.dumps(value))
        (folder / "config.json").write_text("{}")
        return folder

    compared, inner = [], trainer.tokenizer.disagreement
    monkeypatch.setattr("trainer.tokenizer.disagreement", lambda *given: compared.append(given) or inner(*given))
    found = check_tokenizer(with_exchanged(*nobodys[:2]), *opened)
    assert [line.split(" is ")[0] for line in found] == [f"id {index}" for index in nobodys[:2]]
    assert len(compared) == 1
    with pytest.raises(ValueError, match=re.escape(f"{folders['text']}: id {texts[0]} is")):
        check_tokenizer(with_exchanged(texts[0], nobodys[0]), *opened)


def test_what_cannot_be_mixed(tmp_path: Path, folders: dict[str, Path]) -> None:
    pair = {"text": 0.5, "code": 0.5}
    whole = mixed(folders, pair)
    assert whole.require_alike("rl") == []
    second = whole.folders[1]

    def refusal(
        change: Callable[[Manifest], Manifest], reference: str | None = "rl", columns: tuple[str, ...] = ("logprobs",)
    ) -> str | list[str]:
        manifest = second.manifest
        second.manifest = change(manifest)
        try:
            return whole.require_alike(reference, columns)
        except ValueError as error:
            return str(error)
        finally:
            second.manifest = manifest

    def of_reference(**changes: object) -> Callable[[Manifest], Manifest]:
        return lambda manifest: replace(manifest, references={"rl": manifest.references["rl"] | changes})

    assert "seq_len is 24 in text, 25 in code; pack" in refusal(lambda manifest: replace(manifest, seq_len=25))
    other = second.manifest.tokenizer | {"fingerprint": "0" * 64}
    assert "tokenizer.fingerprint is" in refusal(lambda manifest: replace(manifest, tokenizer=other))
    for field, value in (
        ("context", "document"),
        ("logprob_step", 0.5),
        ("weights_sha256", "1" * 64),
        ("dtype", "float16"),
    ):
        assert f"text and code cannot be mixed: references.rl.{field} is" in refusal(of_reference(**{field: value}))
        assert refusal(of_reference(**{field: value}), None) == []  # not read
    assert refusal(of_reference(engine_version="9")) == [
        "references.rl.engine_version is not set in text, '9' in code; the weights are the same"
    ]
    own = {"top_k_below_entropy": 1.5, "top_k_quantile": {"quantile": 0.2}}  # of a source scored by itself
    kd = ("logprobs", "topk_ids", "topk_logprobs")
    for field, value in own.items():
        (noted,) = refusal(of_reference(**{field: value}), columns=(*kd, "log_partition_t2", "entropy_t2"))
        assert f"{field} is not set in text" in noted
        assert noted.endswith("in code; the gate counts the tokens whose top k it misses")
        assert f"cannot be mixed: references.rl.{field}" in refusal(of_reference(**{field: value}), columns=kd)
        assert refusal(of_reference(**{field: value})) == []
    gate = (*kd, "entropy_t2")
    assert "cannot be mixed: references.rl.top_k is" in refusal(of_reference(top_k=7), columns=gate)
    with pytest.raises(ValueError, match="has no log-probs of a reference named 'sft'"):
        whole.require_alike("sft")
    with pytest.raises(ValueError, match=r"comes to less than one row of 65,536"):
        mixed(folders, {"text": 1.0, "code": 1e-6}).stages(8)
    (tmp_path / "link").symlink_to(folders["text"])
    with pytest.raises(ValueError, match="two and text are one folder"):
        mixed(folders | {"two": tmp_path / "link"}, {"text": 1, "two": 1})
    shutil.copytree(folders["text"], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"two and text have the same rows"):
        mixed(folders | {"two": tmp_path / "copy"}, {"text": 1, "two": 1})


def test_plan_counts_what_is_drawn(tmp_path: Path, folders: dict[str, Path], remit: Remit) -> None:
    """As counted over the rows of so many steps; the corpus is all there is, and is scored once."""
    path = write_mix(tmp_path / "mix.yaml", folders, {"text": 0.7, "odd": 0.3})
    options = ["--base", "olmo2-1b", "--reference", "olmo2-1b", "--tokens", 4000, "--global-batch-size", 8]
    code, out, error = remit("plan", "--mix", path, *options, "--json", tmp_path / "plan.json")
    assert code == 0, error
    assert "Mixture, up to step" in out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["job"]["tokens"] == sum(Manifest.read(folders[name]).tokens for name in ("text", "odd"))
    mixture = figures["mixture"]
    rows = [row for step in rows_of(path, 8, mixture["steps"]) for row in step]
    assert sum(len(row["input_ids"]) for row in rows) == pytest.approx(4000, abs=400)
    for name, of in mixture["sources"].items():
        own = [row for row in rows if row["name"] == name]
        assert (of["rows"], of["epochs"]) == (len(own), pytest.approx(len(own) / Manifest.read(folders[name]).rows))
        assert of["tokens"] == pytest.approx(sum(len(row["input_ids"]) for row in own), rel=0.1)
    assert any(line.startswith("odd is repeated") for line in figures["warnings"])
    assert figures["job"]["steps"] == mixture["steps"]
    # 0.7 of the tokens in rows of the mean length of one folder, 0.3 in those of the other
    of_row = 1 / sum(share * (of := Manifest.read(folders[name])).rows / of.tokens for name, share in
                     (("text", 0.7), ("odd", 0.3)))  # fmt: skip
    assert mixture["steps"] == math.ceil(4000 / (8 * of_row))
    assert f"--max-steps {mixture['steps']}: steps of 8 rows of {of_row:.1f} tokens on average" in out


def test_plan_allows_the_tokens_that_it_names(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """So many tokens are not warned about, one more is, and their steps are what remit train allows; with stages too."""
    for stages in (None, [{"after_step": 3, "weights": {"text": 0.2, "odd": 0.8}}]):
        path = write_mix(tmp_path / "mix.yaml", folders, {"text": 0.7, "odd": 0.3}, stages)
        limit(path, "odd", 2.5)
        shards = MixedShards.open(read_mix(path))
        allowed = int(most_steps(shards, shards.order(0, 8), 8)[0])

        def plan(tokens: int, path: Path = path) -> tuple[int, str]:
            to = tmp_path / "plan.json"
            config = PlanConfig("olmo2-1b", "olmo2-1b", str(tokens), mix=path, global_batch_size=8, json=to)
            assert run_plan(config, lambda: False) == 0
            figures = json.loads(to.read_text())
            return figures["job"]["steps"], "\n".join(line for line in figures["warnings"] if "max_epochs" in line)

        _, warning = plan(10**9)
        assert f"remit train allows {allowed} steps of 8 rows" in warning
        most = int(re.search(r"--tokens (\d+) at most", warning)[1])  # type: ignore[index]
        assert plan(most) == (allowed, "")
        assert plan(most - 1) == (allowed, "")
        steps, warning = plan(most + 1)
        assert (steps, f"--tokens {most} at most" in warning) == (allowed + 1, True)
        printed = capsys.readouterr().out
        assert not re.search(r"\de[+-]\d+ ?(B|tokens)", printed), printed


def test_weights_of_a_mixture(tmp_path: Path, folders: dict[str, Path], models: dict[str, Path], remit: Remit) -> None:
    """In proportion to their tokens all rows are read: means over all of them, by source, with pyarrow."""
    both = {}
    for name in ("text", "code"):
        values = by_model(models["base"], "packed", 1 / 64)
        both[name] = annotate(folders[name], tmp_path / name, values, "packed", 1 / 64, name="base")
    path = write_mix(tmp_path / "mix.yaml", both, {name: Manifest.read(both[name]).tokens for name in both})
    code, out, error = remit("weights", "--mix", path, "--json", tmp_path / "weights.json", "--min-count", 1)
    assert code == 0, error
    assert "Sources, at epsilon" in out
    figures = json.loads((tmp_path / "weights.json").read_text())
    assert figures["sample"]["rows"] == sum(Manifest.read(folder).rows for folder in both.values())
    excess = {
        name: [
            theirs - ours
            for row in read_rows(folder)
            for ours, theirs in zip(row["base_logprobs"], row["rl_logprobs"])
            if ours is not None
        ]
        for name, folder in both.items()
    }
    for name, values in excess.items():
        assert figures["sources"][name]["predicted_tokens"] == len(values)
        assert figures["sources"][name]["excess_loss_mean"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    together = [value for values in excess.values() for value in values]
    assert figures["excess_loss"]["mean"] == pytest.approx(sum(together) / len(together), abs=1e-4)
    code, _, error = remit("weights", "--mix", path, "--rows", 0)
    assert (code, "a mixture is sampled by its weights" in error) == (1, True)
