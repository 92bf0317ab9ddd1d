"""Runs of remit rmt with scripted engines: what it writes, that it goes on exactly, and what it refuses."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from annotated import annotate
from built_once import BuiltOnce
from conftest import make_model
from fake_rollouts import FakeEngines
from oracles import contexts, load, read_rows
from rmt_shards import THRESHOLDS, made_up_entropy, made_up_logprobs, places_by_tier, with_entropy
from safetensors.torch import load_file

import pipelines.rmt.run as running
from pipelines.rmt import setup, tier_index
from pipelines.rmt.settings import TIERS, RmtConfig

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def shards(built_once: BuiltOnce, packed: Path) -> Path:
    return built_once("rmt-rows", lambda out: with_entropy(packed, out))


@contextlib.contextmanager
def scripted(run: Any, session: Any) -> Iterator[FakeEngines | None]:
    yield FakeEngines(run.prompter.close_ids, 500)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngines]:
    made: list[FakeEngines] = []

    @contextlib.contextmanager
    def engines(run: Any, session: Any) -> Iterator[FakeEngines | None]:
        made.append(FakeEngines(run.prompter.close_ids, 500))
        yield made[-1]

    monkeypatch.setattr(running, "engines", engines)
    return made


@pytest.fixture(scope="module")
def of_documents(built_once: BuiltOnce, packed: Path) -> Path:
    """The same rows, scored in document context."""

    def without_starts(values: Callable[[dict], list]) -> Callable[[dict], list]:
        def found(row: dict) -> list:
            starts = {start for start, _ in contexts(row, "document")}
            return [None if place in starts else value for place, value in enumerate(values(row))]

        return found

    return built_once(
        "rmt-documents",
        lambda out: annotate(
            packed, out, without_starts(made_up_logprobs), "document", entropy=without_starts(made_up_entropy)
        ),
    )


@pytest.fixture
def settings(shards: Path, reference_model: Path) -> dict[str, Any]:
    return {
        "shards": str(shards), "model": str(reference_model), "first_budget": 6, "budget_decay": 0.5,
        "positions_per_step": 4, "num_generations": 2, "max_steps": 5, "format_steps": 2, "micro_batch_size": 3,
        "learning_rate": 1e-3, "checkpoint_every": 2,
    }  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_writes_what_it_did_and_a_model(
    tmp_path: Path, shards: Path, settings: dict, started: list[FakeEngines], reference_model: Path
) -> None:
    out, noted = tmp_path / "run", []
    held_out = {"eval_shards": str(shards), "eval_positions": 5}
    result = running.rmt(RmtConfig(out=out, **settings, **held_out), note=noted.append)
    assert result.finished
    metrics = lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 8))
    assert [line["phase"] for line in metrics] == ["format"] * 2 + ["policy"] * 5
    assert [line["budget"] for line in metrics[2:]] == [5, 4, 3, 3, 3]  # floor(6 * 0.5 ** (t / 5))
    for line in metrics[2:]:
        assert line["loss"] == pytest.approx(line["rl_loss"] + 0.1 * line["ntp_loss"])
        assert line["rollouts"] == 8
        assert sum(tier["positions"] for tier in line["tiers"].values()) == 4
    places = places_by_tier(shards)
    for line in lines(out / "positions.jsonl"):
        assert len({(row, place) for row, place, _ in line["positions"]}) == 4
        assert all((row, place) in places[tier] for row, place, tier in line["positions"])
    record = json.loads((out / "run.json").read_text())
    open_in_the_paper = ("first_distribution", "last_distribution", "length_weight", "length_most", "thresholds")
    open_in_the_paper += ("positions_per_step", "clip", "kl", "temperature")
    assert {*open_in_the_paper} <= record.keys()
    assert record["resolved"]["max_prefix"] + 12 < 64
    names = ("below", "easy", "medium", "hard")
    assert record["resolved"]["tiers"] == {name: len(tier) for name, tier in zip(names, places, strict=True)}
    assert any("0.6/0.3/0.1 until 30 %" in line for line in noted)
    assert any("2 steps of supervised learning" in line for line in noted)
    evaluations = lines(out / "evaluation.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 7]
    for line in evaluations:
        assert {name: tier["positions"] for name, tier in line["tiers"].items()} == dict.fromkeys(
            ("easy", "medium", "hard"), 5
        )
    base, model = load(reference_model), load(out / "model")
    moved = [
        (ours - theirs).abs().max().item() for ours, theirs in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert min(moved) > 0
    transformers.AutoTokenizer.from_pretrained(out / "model")


def test_a_run_that_dies_goes_on_with_the_same_positions_and_weights(
    tmp_path: Path, settings: dict, started: list[FakeEngines], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.rmt(RmtConfig(out=tmp_path / "whole", **settings))
    config, sample, calls = RmtConfig(out=tmp_path / "killed", **settings), FakeEngines.sample, []

    def dies(self: FakeEngines, *asked: Any) -> Any:
        calls.append(1)
        if len(calls) in (6, 9):
            raise RuntimeError("the engine is gone")
        return sample(self, *asked)

    monkeypatch.setattr(FakeEngines, "sample", dies)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the engine is gone"):
            running.rmt(config)
    assert running.rmt(config).finished
    for file in ("positions.jsonl", "metrics.jsonl"):
        whole, killed = (lines(tmp_path / name / file) for name in ("whole", "killed"))
        timed = [name for name in whole[-1] if name.endswith("seconds") or "memory" in name or "per_second" in name]
        assert [{k: v for k, v in line.items() if k not in timed} for line in killed] == [
            {k: v for k, v in line.items() if k not in timed} for line in whole
        ]
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert running.rmt(config).finished  # nothing to do


def test_a_run_that_is_killed_before_its_settings_are_written_begins_again(
    tmp_path: Path, settings: dict, started: list[FakeEngines], monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    """A copy of OUT at each point holds what a kill would leave there, the lease of a dead process aside."""
    short = settings | {"model": str(models["base"]), "format_steps": 0, "max_steps": 1}
    out, left = tmp_path / "run", dict[frozenset, Path]()

    def watch(module: Any, name: str) -> None:
        call = getattr(module, name)

        def copied(*arguments: Any, **named: Any) -> Any:
            files = frozenset(path.relative_to(out) for path in out.rglob("*") if path.is_file())
            if not (out / "run.json").exists() and files not in left:
                left[files] = tmp_path / f"killed in {name} {len(left)}"
                shutil.copytree(out, left[files], ignore=shutil.ignore_patterns("_lease"))
            return call(*arguments, **named)

        monkeypatch.setattr(module, name, copied)

    for name in ("load_tokenizer", "token_bytes", "PositionReader", "resume"):
        watch(setup, name)
    watch(tier_index, "sha256_file")
    watch(np, "save")
    assert running.rmt(RmtConfig(out=out, **short)).finished
    monkeypatch.undo()
    assert len(left) >= 5  # nothing, the tokenizer, the counts under two names, their record
    monkeypatch.setattr(running, "engines", scripted)
    for path in left.values():
        is_last = path == [*left.values()][-1]
        thresholds = (0.25, 0.75, 1.25) if is_last else THRESHOLDS  # the counts that are there are not of this command
        assert running.rmt(RmtConfig(out=path, **short, thresholds=thresholds)).finished
        places = places_by_tier(Path(short["shards"]), thresholds)
        found = json.loads((path / "run.json").read_text())["resolved"]["tiers"]
        assert [found[name] for name in TIERS] == [len(tier) for tier in places]


def test_a_command_that_was_refused_can_be_given_again(
    tmp_path: Path, settings: dict, started: list[FakeEngines]
) -> None:
    short = settings | {"format_steps": 0, "max_steps": 1}
    with pytest.raises(ValueError, match="change --thresholds"):
        running.rmt(RmtConfig(out=tmp_path / "run", **short, thresholds=(0.5, 1.0, 2.5)))
    assert running.rmt(RmtConfig(out=tmp_path / "run", **short)).finished


def test_a_run_stops_where_the_engines_get_new_weights(
    tmp_path: Path, settings: dict, started: list[FakeEngines]
) -> None:
    changed = settings | {"sync_every": 2, "format_steps": 0, "max_steps": 6}
    running.rmt(RmtConfig(out=tmp_path / "whole", **changed))
    assert len(started[0].loaded) == 3
    done: list[int] = []
    config = RmtConfig(out=tmp_path / "stopped", **changed)
    result = running.rmt(config, lambda step, *_: done.append(step), should_stop=lambda: len(done) >= 2)
    assert not result.finished
    assert done == [1, 2, 3, 4]
    assert running.rmt(config).finished
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_engines_get_the_weights_by_their_names_in_the_files(
    tmp_path: Path, settings: dict, started: list[FakeEngines], reference_model: Path
) -> None:
    running.rmt(RmtConfig(out=tmp_path / "run", **(settings | {"format_steps": 0, "max_steps": 1})))
    files, (given,) = load_file(reference_model / "model.safetensors"), started[0].loaded
    assert given.keys() == files.keys()
    assert all(torch.equal(given[name], files[name].float()) for name in files)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "prefix", "budget": "off", "curriculum": "filter", "max_answer": 5},
        {"reward": "gain", "baseline": "rl", "curriculum": "off", "shards": "of_documents", "max_prefix": 9},
        {"ntp_weight": 0.0, "kl": 0.05, "loss_type": "dapo"},
    ],
)
def test_every_ablation_runs(
    tmp_path: Path, settings: dict, started: list[FakeEngines], changes: dict, of_documents: Path
) -> None:
    short, noted = settings | {"max_steps": 2, "format_steps": 1} | changes, []
    if "shards" in changes:
        short["shards"] = str(of_documents)
    assert running.rmt(RmtConfig(out=tmp_path / "run", **short), note=noted.append).finished
    rows = read_rows(Path(short["shards"]))
    drawn = [place for line in lines(tmp_path / "run" / "positions.jsonl") for place in line["positions"]]
    if changes.get("reward") == "prefix":
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
        # "}{" is the one token with braces that are balanced in number and not in order
        cannot = lambda text: text.count("{") != text.count("}") or "}{" in text or text == "<|endoftext|>"  # noqa: E731
        places = [place for tier in places_by_tier(Path(short["shards"])) for place in tier]
        beyond = sum(cannot(tokenizer.decode([rows[row]["input_ids"][place]])) for row, place in places)
        assert beyond > 0
        assert any(f"and {beyond:,} more are not drawn: no \\boxed{{}} can hold" in line for line in noted)
        assert not any(cannot(tokenizer.decode([rows[row]["input_ids"][place]])) for row, place, _ in drawn)
    if changes.get("reward") == "gain":
        assert any(
            "more are not drawn: a prompt does not hold the text before them (9 tokens)" in line for line in noted
        )
        for row, place, _ in drawn:
            assert place - max(start for start, _ in contexts(rows[row], "document") if start <= place) <= 9
        everything = [place for tier in places_by_tier(of_documents) for place in tier]
        within = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["tiers"]
        assert 0 < within["all"] < len(everything)
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["ntp_loss"] == 0) == (changes.get("ntp_weight") == 0)
    assert (last["budget"] is None) == (changes.get("budget") == "off")
    assert ("kl" in last) == ("kl" in changes)
    if changes.get("curriculum") == "filter":
        assert last["tier_probabilities"] == {"below": 0, "above": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_budget": 40}, "--first-budget is 40: .* of the model's 64 positions"),
        ({"prompt": "chat"}, "--prompt is chat, and the tokenizer of --model has no chat template"),
        ({"positions_per_step": 10**6}, r"positions of the tier 'easy' .*at least 1,000,000"),
        ({"reward": "gain", "baseline": "rl"}, "--reward gain .* scored in packed context, .*--context document"),
        ({"reference": "sft"}, "has no log-probs of a reference named 'sft'"),
        ({"max_prefix": 60}, "--max-prefix is 60"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_step(
    tmp_path: Path, settings: dict, started: list[FakeEngines], changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        running.rmt(RmtConfig(out=tmp_path / "run", **(settings | changes)))
    assert not started
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_held_out_rows_without_entropy_are_refused(
    tmp_path: Path, settings: dict, started: list[FakeEngines], annotated: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="has no entropy of the reference 'rl'"):
        running.rmt(RmtConfig(out=tmp_path / "run", **settings, eval_shards=str(annotated["packed"])))
    assert not started


def test_other_settings_are_refused_by_name(tmp_path: Path, settings: dict, started: list[FakeEngines]) -> None:
    short = settings | {"max_steps": 1, "format_steps": 0}
    running.rmt(RmtConfig(out=tmp_path / "run", **short))
    with pytest.raises(ValueError, match=r"holds another run: --clip is 0\.2 there, 0\.3 asked for now"):
        running.rmt(RmtConfig(out=tmp_path / "run", **short, clip=0.3))


def test_a_chat_template_that_changed_is_refused(
    tmp_path: Path, settings: dict, started: list[FakeEngines], reference_model: Path
) -> None:
    model = make_model(tmp_path / "model", seed=1, positions=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model / name, model / name)
    described = json.loads((model / "tokenizer_config.json").read_text())

    def template(text: str) -> None:
        (model / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": text}))

    whole = settings | {"model": str(model), "format_steps": 0, "max_steps": 3, "checkpoint_every": 1, "max_prefix": 32}
    config, done = RmtConfig(out=tmp_path / "run", **whole), list[int]()
    template("{{ messages[0].content }}")
    assert not running.rmt(config, lambda step, *_: done.append(step), should_stop=lambda: bool(done)).finished
    template("In Latin: {{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"holds another run: resolved\.prompt_sha256 is"):
        running.rmt(config)
    template("{{ messages[0].content }}{# said otherwise #}")
    assert running.rmt(config).finished


def test_without_a_curriculum_there_is_one_tier(tmp_path: Path, settings: dict, started: list[FakeEngines]) -> None:
    """A lone position above the threshold is no reason to refuse, since no tier is drawn from."""
    short = settings | {"curriculum": "off", "thresholds": (1.99, 3.0, 4.0), "max_steps": 1, "format_steps": 0}
    assert running.rmt(RmtConfig(out=tmp_path / "run", **short, first_distribution=(0.0, 0.0, 1.0))).finished
    places = places_by_tier(Path(settings["shards"]))
    found = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["tiers"]
    assert found == {"all": sum(map(len, places))}
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["tier_probabilities"] == {"all": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--first-distribution", "nan", 0.5, 0.5],
            "--first-distribution is nan 0.5 0.5, expected three probabilities",
        ),
        (["--last-distribution", 0.5, 0.5, "nan"], "--last-distribution is 0.5 0.5 nan, expected three probabilities"),
        (["--thresholds", 0.5, 1, "inf"], "--thresholds are 0.5 1 inf, expected three rising numbers"),
        (["--loss-type", "bnpo"], "loss-type"),
        (["--thresholds", 1, 0.5, 2], "--thresholds are 1 0.5 2, expected three rising numbers"),
        (["--last-distribution", 0.5, 0.5, 0.5], "--last-distribution is 0.5 0.5 0.5, expected three probabilities"),
        (["--reward", "gain"], "--baseline is None with --reward gain"),
        (["--baseline", "base"], "--baseline is 'base' with --reward match"),
        (["--length-weight", 1], "--length-weight is 1"),
        (["--num-generations", 1], "--num-generations is 1"),
        (["--checkpoint-every", 5, "--sync-every", 2], "--checkpoint-every is 5, expected a multiple of --sync-every"),
        (["--least-budget", 900], "--least-budget is 900, expected at most --first-budget"),
        (["--curriculum", "hard"], "curriculum"),
    ],
)
def test_settings_are_refused_by_option(tmp_path: Path, remit: Run, options: list, message: str) -> None:
    code, _, err = remit("rmt", "--shards", "s", "--model", "m", "--out", tmp_path / "run", *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
