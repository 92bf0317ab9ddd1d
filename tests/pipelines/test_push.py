"""remit push and hf:// against a hub on loopback that huggingface_hub itself talks to."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from annotated import annotate
from conftest import make_model
from hub_blobs import Blob
from hub_repos import READ_TOKEN, TOKEN, HubRepos, use
from oracles import read_rows

from pipelines.commands import push
from pipelines.push.files import Files, small_file
from pipelines.push.markdown import LICENSE, NO_LICENSE, code, merge
from pipelines.push.repository import Repository
from pipelines.push.revealing import revealing, reveals, told, without_place
from pipelines.push.settings import PushConfig
from shards import ShardFolder
from shards.fingerprint import weights_fingerprint
from shards.hub import HubStore, Place, parse_place
from shards.store import LocalStore, absolute, is_remote, open_store
from trainer.config import TrainConfig
from trainer.train import train

Remit = Callable[..., tuple[int, str, str]]
DATASET = "org/olmo.2_scored"
URL = f"hf://datasets/{DATASET}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepos]:
    server = HubRepos()
    use(server, monkeypatch)
    yield server
    server.close()


@pytest.fixture(scope="module")
def annotated(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log-probs from a hash of the ids; three rows of the second part have none."""

    def values(row: dict) -> list:
        rng = np.random.default_rng(sum(row["input_ids"]))
        return [None, *(-np.round(rng.gamma(2, 64, len(row["input_ids"]) - 1)) / 64).tolist()]

    out = tmp_path_factory.mktemp("annotated") / "scored"
    return annotate(small, out, values, "packed", step=1 / 64, unscored=[31, 32, 40], model="org/olmo|rl", dtype="float16",
                    engine="vllm", engine_version="0.32.0", revision="c0ffee" * 6 + "beef")  # fmt: skip


@pytest.fixture(scope="module")
def trained(annotated: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A run of three steps with a held-out loss."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_model(folder / "base", seed=3)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(base)
    train(
        TrainConfig(
            (str(annotated),), str(base), folder / "run", max_steps=3, global_batch_size=4, eval_shards=str(annotated)
        )
    )  # fmt: skip
    return folder / "run"


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_pushed_folder_is_read_verified_and_trained_from_the_hub(
    hub: HubRepos, remit: Remit, annotated: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    code_, output, error = remit("push", annotated, DATASET, "--path", "mid/web")
    assert code_ == 0, error
    assert "(private)" in output
    assert hub.repos["datasets", DATASET].private
    pushed = hub.files("datasets", DATASET)
    ours = {
        f"mid/web/{file.relative_to(annotated)}": file.read_bytes() for file in annotated.rglob("*") if file.is_file()
    }
    assert {path: data for path, data in pushed.items() if path.startswith("mid/")} == ours
    commit = hub.repos["datasets", DATASET].branches["main"]
    assert f"{URL}@{commit}/mid/web" in output

    # row by row what Arrow reads from the local folder
    remote = ShardFolder(f"{URL}/mid/web/")
    rows = [row for batch in remote.batches() for row in batch.batch.to_pylist()]
    assert rows == read_rows(annotated)

    for command in (["verify"], ["inspect"], ["inspect", "--row", 33]):
        code_, output, error = remit(*command, f"{URL}@main/mid/web")
        assert code_ == 0, (command, error)
    losses = []
    for name, shards in (("here", str(annotated)), ("hub", f"{URL}@{commit}/mid/web")):
        base = make_model(tmp_path / f"base-{name}", seed=3)
        run = tmp_path / name
        train(TrainConfig((shards,), str(base), run, max_steps=4, global_batch_size=4))
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


def test_only_the_columns_that_train_come_over_the_network(hub: HubRepos, remit: Remit, annotated: Path) -> None:
    assert remit("push", annotated, DATASET)[0] == 0
    hub.served.clear()
    folder = ShardFolder(URL)
    for part in folder.manifest.parts:
        rows = folder.open_rows(part.name, ["input_ids"])
        for number in range(len(rows)):
            rows.batch(number)
    served = sum(size for path, size in hub.served.items() if path.endswith(".arrow"))
    whole = sum((annotated / part.name).stat().st_size for part in folder.manifest.parts)
    assert 0 < served < 0.8 * whole


def test_what_is_read_stays_that_of_the_commit_it_was_opened_at(
    hub: HubRepos, remit: Remit, annotated: Path, small: Path
) -> None:
    assert remit("push", annotated, DATASET)[0] == 0
    store = HubStore(URL)
    repo = hub.repos["datasets", DATASET]
    files = repo.commits[repo.branches["main"]]
    repo.commit("main", {path: blob for path, blob in files.items() if not path.startswith("part-")}, "deleted")
    other = pickle.loads(pickle.dumps(store))  # as workers get it
    assert other.commit == store.commit != repo.branches["main"]
    for one in (store, other):
        assert ShardFolder(one).open_rows("part-00000.arrow") is not None
        assert (
            one.sha256("part-00000.arrow") == hashlib.sha256((annotated / "part-00000.arrow").read_bytes()).hexdigest()
        )
    with pytest.raises((ValueError, FileNotFoundError), match=r"part-00000\.arrow"):
        ShardFolder(HubStore(URL)).open_rows("part-00000.arrow")


def test_a_push_goes_on_where_it_was_stopped(
    hub: HubRepos, remit: Remit, annotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between groups of files; no file is sent twice, and readers see no folder before all of it is there."""
    for name, value in (("COMMIT_FILES", 3), ("UPLOAD_FILES", 2)):
        monkeypatch.setattr(f"pipelines.push.repository.{name}", value)
    answers = iter([False, False, False, False, True])
    assert push.run(PushConfig(str(annotated), DATASET), lambda: next(answers)) == 3
    there = hub.files("datasets", DATASET)
    assert 0 < len(there) < len(list(annotated.rglob("*"))) - 3
    with pytest.raises(ValueError, match=r"_manifest\.json"):
        ShardFolder(URL)
    hub.lose = 2  # answers of commits that were made
    assert remit("push", annotated, DATASET)[0] == 0
    assert hub.lose == 0
    parts = [file.read_bytes() for file in annotated.glob("part-*")]
    sent = {oid: size for oid, size in hub.uploaded.items() if oid in hub.lfs}
    assert sent == {hashlib.sha256(data).hexdigest(): len(data) for data in parts}
    commits = len(hub.repos["datasets", DATASET].messages)
    assert ShardFolder(URL).manifest.checksum == ShardFolder(annotated).manifest.checksum
    # nothing is left to do
    assert remit("push", annotated, DATASET)[0] == 0
    assert len(hub.repos["datasets", DATASET].messages) == commits


def test_bytes_that_the_hub_lost_are_noticed_before_readers_see_a_folder(
    hub: HubRepos, remit: Remit, annotated: Path
) -> None:
    hub.alter = hashlib.sha256((annotated / "part-00001.arrow").read_bytes()).hexdigest()
    code_, _, error = remit("push", annotated, DATASET)
    assert (code_, "part-00001.arrow: was pushed and the hub holds other bytes" in error) == (1, True), error
    assert "_manifest.json" not in hub.files("datasets", DATASET)
    hub.alter = None
    assert remit("push", annotated, DATASET)[0] == 0
    assert remit("verify", URL)[0] == 0


def test_other_branches_and_more_folders_in_one_dataset(
    hub: HubRepos, remit: Remit, annotated: Path, small: Path
) -> None:
    assert remit("push", annotated, DATASET, "--path", "scored", "--revision", "try/1")[0] == 0
    repo = hub.repos["datasets", DATASET]
    assert "_manifest.json" not in {path.rpartition("/")[2] for path in repo.commits[repo.branches["main"]]}
    assert ShardFolder(f"{URL}@try%2F1/scored").manifest.references
    assert remit("push", small, DATASET, "--path", "packed", "--revision", "try/1", "--license", "odc-by")[0] == 0
    card = hub.files("datasets", DATASET, "try/1")["README.md"].decode()
    assert [config["config_name"] for config in front(card)["configs"]] == ["scored", "packed"]
    assert front(card)["license"] == "odc-by"
    assert (card.count("\n## scored\n"), card.count("\n## packed\n"), card.count("## Licence")) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"no revision 'try-1'.*near it: try/1"):
        open_store(f"{URL}@try-1/scored")
    code_, _, error = remit("push", small, DATASET, "--path", "scored", "--revision", "try/1")
    assert (code_, "of other rows or another scoring" in error) == (1, True), error


def test_what_was_rejected_stays_here(
    hub: HubRepos, remit: Remit, annotated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(annotated, tmp_path / "scored")
    (folder / "_rejected.jsonl").write_text('{"path": "a", "reason": "/data/a.jsonl:3: not JSON: secret"}\n')
    assert remit("push", folder, DATASET, "--path", "a")[0] == 0
    repo = hub.repos["datasets", DATASET]
    assert not any("_rejected" in path for files in repo.commits.values() for path in files)
    # an earlier version pushed it
    pushed = repo.commits[repo.branches["main"]]
    earlier = {f"{place}/_rejected.jsonl": pushed[".gitattributes"] for place in ("a", "b")}
    repo.commit("main", pushed | earlier, "earlier")
    assert remit("push", folder, DATASET, "--path", "a")[0] == 0
    assert {*hub.files("datasets", DATASET)} == {*pushed, "b/_rejected.jsonl"}
    assert remit("verify", f"{URL}/a")[0] == 0


@pytest.mark.parametrize("is_made_already", [False, True])
def test_a_new_branch_never_shows_the_manifest_of_main_over_other_parts(
    hub: HubRepos, remit: Remit, annotated: Path, small: Path, monkeypatch: pytest.MonkeyPatch, is_made_already: bool
) -> None:
    for path in ("a", "b"):
        assert remit("push", annotated, DATASET, "--path", path)[0] == 0
    for name, value in (("COMMIT_FILES", 3), ("UPLOAD_FILES", 2)):
        monkeypatch.setattr(f"pipelines.push.repository.{name}", value)
    repo, main = hub.repos["datasets", DATASET], hub.files("datasets", DATASET)
    if is_made_already:  # by a push that was killed right after
        repo.branches["v2"] = repo.branches["main"]
    before = set(repo.commits)
    hub.lose = 1  # of the commit that takes it out
    answers = iter([False, True])
    assert push.run(PushConfig(str(small), DATASET, "a", "v2"), lambda: next(answers)) == 3
    ours = {f"a/{file.relative_to(small)}": file.read_bytes() for file in small.rglob("*") if file.is_file()}
    assert 0 < len([path for path in hub.files("datasets", DATASET, "v2") if path.startswith("a/")]) < len(ours)
    for commit in set(repo.commits) - before:  # at no time
        there = {path: blob.data for path, blob in repo.commits[commit].items() if path.startswith("a/")}
        assert there.items() <= ours.items()
        assert "a/_manifest.json" not in there
    code_, _, error = remit("push", small, DATASET, "--path", "a", "--revision", "v2")
    assert code_ == 0, error
    files = hub.files("datasets", DATASET, "v2")
    assert {path: data for path, data in files.items() if path.startswith("a/")} == ours
    assert {path: data for path, data in files.items() if path.startswith("b/")} == {
        path: data for path, data in main.items() if path.startswith("b/")
    }
    assert hub.files("datasets", DATASET) == main
    # it has a folder of its own now
    code_, _, error = remit("push", annotated, DATASET, "--path", "a", "--revision", "v2")
    assert (code_, "of other rows or another scoring" in error) == (1, True), error
    assert hub.files("datasets", DATASET, "v2") == files


def test_a_folder_that_comes_while_ours_is_hashed_is_not_overwritten(
    hub: HubRepos, remit: Remit, annotated: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Repository.make

    def late(self: Repository, public: bool) -> bool:
        monkeypatch.setattr(Repository, "make", make)
        assert remit("push", annotated, DATASET)[0] == 0
        return make(self, public)

    monkeypatch.setattr(Repository, "make", late)
    code_, _, error = remit("push", small, DATASET)
    assert (code_, "of other rows or another scoring" in error) == (1, True), error
    assert remit("verify", URL)[0] == 0


@pytest.mark.parametrize("when", ["while files are sent", "after the card was read", "all the time"])
def test_what_others_do_to_the_card_meanwhile_stays(
    hub: HubRepos, remit: Remit, annotated: Path, small: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    assert remit("push", annotated, DATASET, "--path", "first")[0] == 0
    repo, edits = hub.repos["datasets", DATASET], []

    def edit() -> None:
        """Of the owner, who fills in the licence; and another push, into another folder."""
        if edits and when != "all the time":
            return
        files = repo.commits[repo.branches["main"]]
        card = files["README.md"].data.decode().replace(NO_LICENSE, "license: mit\n") + f"Edited {len(edits)}.\n"
        repo.commit("main", files | {"README.md": Blob(card.encode(), False)}, "edit")
        edits.append(card)
        if when != "all the time":
            assert push.run(PushConfig(str(small), DATASET, "second"), lambda: False) == 0

    def should_stop() -> bool:
        if when == "while files are sent":
            edit()
        return False

    read = Repository.read_card

    def read_card(self: Repository, revision: str | None = None) -> str | None:
        found = read(self, revision)
        if when != "while files are sent" and revision is not None:
            edit()
        return found

    monkeypatch.setattr(Repository, "read_card", read_card)
    monkeypatch.setattr("pipelines.push.repository.FINISH_TRIES", 2)
    if when == "all the time":
        with pytest.raises(OSError, match="others commit to it all the time"):
            push.run(PushConfig(str(small), DATASET, "third"), should_stop)
        return
    assert push.run(PushConfig(str(small), DATASET, "third"), should_stop) == 0
    card = hub.files("datasets", DATASET)["README.md"].decode()
    assert len(edits) == 1
    assert front(card)["license"] == "mit"
    assert {config["config_name"] for config in front(card)["configs"]} == {"first", "second", "third"}
    assert [card.count(f"\n## {name}\n") for name in ("first", "second", "third")] == [1, 1, 1]
    assert "Edited 0." in card


@pytest.mark.parametrize(
    ("value", "shown"),
    [("/data/me/base", "base"), ("~/x/y", "y"), ("../x/y", "y"), ("s3://bucket/x/y.jsonl", "y.jsonl"), ("file:///a/b", "b"),
     ("org/name", "org/name"), ("hf://o/n@main:c:train", "hf://o/n@main:c:train"), ("0.5", "0.5")],
)  # fmt: skip
def test_places_of_the_owner_are_not_shown(value: str, shown: str) -> None:
    assert without_place(value) == shown
    assert reveals(f"cannot be opened (FileNotFoundError: {value})") == (value != shown and not value.startswith(".."))


def test_what_the_manifest_and_configs_reveal_is_told(tmp_path: Path) -> None:
    """A corpus of files here and in a bucket, of which the manifest has whole paths; and vocabularies, which name no place."""
    corpus = [{"path": "s3://bucket/x.jsonl"}, {"path": "web/x.jsonl", "left_out": "begins with b'My secret'"}, {"path": "a/b.jsonl"},
              {"path": "hf://o/n@abc:c:train"}]  # fmt: skip
    (tmp_path / "_tokenizer").mkdir()
    for name, value in {
        "_manifest.json": {"corpus": corpus, "url": "https://arxiv.org/abs/2602.03075"},
        "_tokenizer/tokenizer_config.json": {"name_or_path": "/data/me/base", "chat_template": "/a/b" + " " * 1000},
        "_tokenizer/tokenizer.json": {"model": {"vocab": {"/usr/bin/env": 1}, "merges": ["/usr/bin /env"]}},
    }.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "_tokenizer" / "special_config.json").write_text("no JSON")
    store = LocalStore(tmp_path)
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json"))
    files = Files(store, tuple(small_file(store, name, "") for name in names), (), ())
    found = revealing(files)
    assert found == [
        "_manifest.json: corpus[0].path is 's3://bucket/x.jsonl'",
        "_manifest.json: corpus[1].left_out is \"begins with b'My secret'\"",
        "_tokenizer/tokenizer_config.json: name_or_path is '/data/me/base'",
    ]
    assert told([*found, "x"]).endswith("/base'; and 1 more. See whether others may read this")


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"token": None}, [], "no token of the hub is set here"),
        ({"token": "hf_wrong"}, [], "does not know the token"),
        ({"token": READ_TOKEN}, [], "may not write there"),
        ({"repo": "other/name"}, [], "may not write there"),
        ({"public": True}, [], "is public, and --public is not given"),
        ({"missing": "_commits/part-00001.json"}, [], "1 of 3 parts are not committed (first: part-00001.arrow)"),
        ({"flip": "part-00000.arrow"}, [], "differs from its commit record"),
        ({"flip": "_tokenizer/tokenizer.json"}, [], "differs from the manifest"),
        ({}, ["--results", "x.json"], "--results is given"),
        ({"folder": "nothing"}, [], "no such folder, expected a shard folder, a run"),
    ],
)
def test_what_is_refused(
    hub: HubRepos,
    remit: Remit,
    annotated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    words: list[str],
    message: str,
) -> None:
    folder = shutil.copytree(annotated, tmp_path / "scored")
    if "token" in change:
        use(hub, monkeypatch, change["token"])
    if "missing" in change:
        (folder / change["missing"]).unlink()
    if "flip" in change:
        data = bytearray((folder / change["flip"]).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / change["flip"]).write_bytes(data)
    if change.get("public"):
        hub.create({"organization": "org", "name": DATASET.rpartition("/")[2], "type": "dataset"}, TOKEN)
    code_, _, error = remit("push", tmp_path / change.get("folder", "scored"), change.get("repo", DATASET), *words)
    assert (code_, message in error) == (1, True), error
    assert len(error.strip().splitlines()) <= 2
    assert not hub.lfs  # nothing went out


@pytest.mark.parametrize(
    "words",
    [["name"], ["a/b/c"], ["a/b--c"], ["../b"], ["a/b", "--path", "../c"], ["a/b", "--path", "/c"], ["a/b", "--revision", "f" * 40],
     ["a/b", "--revision", "a b"], ["a/b", "--path", "_c"]],
)  # fmt: skip
def test_bad_names(remit: Remit, words: list[str]) -> None:
    code_, _, error = remit("push", "x", *words)
    assert (code_, "expected" in error) == (2, True), error


def test_a_model_goes_with_its_run(hub: HubRepos, remit: Remit, trained: Path, tmp_path: Path) -> None:
    (trained / "model" / "modeling_x.bin").write_bytes(b"pickle")
    result = {
        "value": 0.4321,
        "stderr": 0.01,
        "label": "GSM8K",
        "metric": "exact_match,strict-match",
        "settings": {"num_fewshot": 8},
    }
    values = {"format": 3, "model": {"weights": weights_fingerprint(trained / "model")}, "suite": "paper",
              "settings": {"versions": {"lm_eval": "0.4.13"}, "dtype": "auto", "limit": None},
              "averages": {"paper": {"value": 0.4321, "num_tasks": 1, "whole": False}},
              "tasks": {"gsm8k": {"task": "gsm8k", **result}}}  # fmt: skip
    results = tmp_path / "results.json"
    results.write_text(json.dumps(values))
    code_, _, error = remit("push", trained, "lab/mid", "--results", results)
    (trained / "model" / "modeling_x.bin").unlink()
    assert code_ == 0, error
    assert "not pushed: modeling_x.bin" in error
    files = hub.files("models", "lab/mid")
    card = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    assert len(hub.repos["models", "lab/mid"].messages) == 2  # its own first, and one with everything
    facts = front(card)
    assert facts["model-index"][0]["results"][0]["metrics"][0]["value"] == 43.21
    assert facts["tags"] == ["remit"]
    held_out = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    for expected in ("| `learning_rate` | `0.0003` |", "org/olmo\\|rl", "| objective | `remit` |", "| GSM8K | `gsm8k` |", "43.21 ± 1.00",
                     f"{held_out[0]['loss']:.4f}", f"{held_out[-1]['loss']:.4f}", NO_LICENSE.strip(), "of 1 tasks"):  # fmt: skip
        assert expected in card, expected
    assert str(tmp_path) not in card
    assert str(trained.parent) not in card
    # the model that comes back is the one that went
    back = transformers.AutoModelForCausalLM.from_pretrained("lab/mid", cache_dir=tmp_path / "cache")
    ours = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)

    values["model"]["weights"] = "0" * 64
    results.write_text(json.dumps(values))
    code_, _, error = remit("push", trained, "lab/mid", "--results", results)
    assert (code_, "is of weights 000000000000.." in error) == (1, True), error


def test_files_of_an_earlier_model_go(hub: HubRepos, remit: Remit, trained: Path, tmp_path: Path) -> None:
    """One of two files first, then in one: the two of the first would load beside it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "model")
    transformers.AutoTokenizer.from_pretrained(trained / "model").save_pretrained(tmp_path / "cut")
    model.save_pretrained(tmp_path / "cut", max_shard_size="200KB")
    assert (tmp_path / "cut" / "model.safetensors.index.json").exists()
    for name, data in (("additional_chat_templates/tool.jinja", "{{ tools }}"), ("additional_chat_templates/notes.txt", "x"),
                       ("original/params.json", "{}")):  # fmt: skip
        (tmp_path / "cut" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_text(data)
    config = json.loads((tmp_path / "cut" / "config.json").read_text()) | {"_name_or_path": "/home/me/base"}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    code_, _, error = remit("push", tmp_path / "cut", "org/mid")
    assert code_ == 0, error
    assert "not pushed: additional_chat_templates/notes.txt, original/; a model" in error
    assert "pushed as it stands: config.json: _name_or_path is '/home/me/base'. See" in error
    assert hub.files("models", "org/mid")["additional_chat_templates/tool.jinja"] == b"{{ tools }}"
    hub.repos["models", "org/mid"].commits[hub.repos["models", "org/mid"].branches["main"]]["notes/a.safetensors"] = (
        next(iter(hub.repos["models", "org/mid"].commits[hub.repos["models", "org/mid"].branches["main"]].values()))
    )
    assert remit("push", trained / "model", "org/mid")[0] == 0
    names = set(hub.files("models", "org/mid"))
    assert {name for name in names if "safetensors" in name} == {"model.safetensors", "notes/a.safetensors"}
    assert not any("additional_chat_templates" in name for name in names)


def test_an_unfinished_run_has_no_model(hub: HubRepos, remit: Remit, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes((trained / "run.json").read_bytes())
    code_, _, error = remit("push", tmp_path / "run", "org/mid")
    assert (code_, "is a run that has not finished" in error) == (1, True), error


def test_the_card_is_of_the_manifest(remit: Remit, annotated: Path) -> None:
    """Without a hub: --dry-run."""
    code_, card, error = remit("push", annotated, DATASET, "--dry-run")
    assert code_ == 0, error
    folder = ShardFolder(annotated)
    unscored = 3
    table = read_rows(annotated)
    for expected in (f"{sum(len(row['input_ids']) for row in table):,} tokens in {len(table):,} rows", "`org/olmo\\|rl`", "float16",
                     "vllm 0.32.0", "packed", "0.007812", f"| {unscored} |", folder.manifest.checksum, "nothing was pushed",
                     f"hf://datasets/{DATASET}", NO_LICENSE.strip(), "To be filled in by the owner"):  # fmt: skip
        assert expected in card, expected
    for column in folder.manifest.schema.names:
        assert f"| `{column}` |" in card


def test_datasets_reads_what_was_pushed(
    hub: HubRepos, remit: Remit, annotated: Path, tmp_path: Path, starts_processes: None
) -> None:
    """The snippet of the card, run with `datasets` in a process that knows this hub from the start."""
    assert remit("push", annotated, DATASET, "--path", "mid/web")[0] == 0
    card = hub.files("datasets", DATASET)["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    script = f"{snippet}\nimport json\nprint(json.dumps([[row['input_ids'], row['rl_logprobs']] for row in rows]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows == [[row["input_ids"], row["rl_logprobs"]] for row in read_rows(annotated)]


def test_what_others_wrote_into_the_card_stays() -> None:
    first = merge(None, "name", {"tags": ["remit"], "configs": [{"config_name": "a"}]}, "a", "## a\nold", "Rights.")
    assert (first.count(LICENSE[:10]), front(first)) == (1, {"tags": ["remit"], "configs": [{"config_name": "a"}]})
    edited = first.replace(NO_LICENSE, "license: mit\n").replace("**To be filled in", "MIT. **Not to be filled in")
    edited = edited.replace("tags:\n- remit", "tags:\n- mine\n- remit") + "\nA last word.\n"
    again = merge(
        edited, "other", {"tags": ["remit"], "configs": [{"config_name": "a", "x": 1}]}, "a", "## a\nnew", "R"
    )
    assert front(again) == {"tags": ["mine", "remit"], "configs": [{"config_name": "a", "x": 1}], "license": "mit"}
    assert ("old" in again, "new" in again, "MIT. **Not" in again, "A last word." in again) == (False, True, True, True)
    assert merge(again, "other", {}, "a", "## a\nnew", "R") == again
    # a card of somebody else's, without any metadata
    assert merge("# Hello\n", "x", {"tags": ["remit"]}, "b", "text", "R").endswith(
        "# Hello\n\n<!-- remit push: begins b -->\ntext\n<!-- remit push: ends b -->\n"
    )
    with pytest.raises(ValueError, match="its metadata is no YAML"):
        merge("---\na: [\n---\n", "x", {}, "b", "text", "R")
    assert code("a`|\n\ud800b") == "`a'\\|\ufffd\ufffdb`"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hf://datasets/o/n", Place("o/n", None, "")),
        ("hf://datasets/o/n/a//b/", Place("o/n", None, "a/b")),
        ("hf://datasets/o.x/n-y@v1.0/a", Place("o.x/n-y", "v1.0", "a")),
        ("hf://datasets/o/n@a%2Fb/c", Place("o/n", "a/b", "c")),
        ("hf://datasets/o/n@refs/pr/3/c", Place("o/n", "refs/pr/3", "c")),
    ],
)
def test_urls_of_the_hub(url: str, place: Place) -> None:
    assert parse_place(url) == place
    assert is_remote(url)
    assert absolute(url) == url


@pytest.mark.parametrize(
    "url", ["hf://o/n/folder", "hf://datasets/o", "hf://datasets/o/n/../x", "hf://models/o/n", "hf://datasets//n"]
)
def test_what_is_no_folder_of_the_hub(remit: Remit, url: str) -> None:
    code_, _, error = remit("verify", url)
    assert (code_, "expected hf://datasets/OWNER/NAME/FOLDER" in error) == (1, True), error


def test_reading_refusals(
    hub: HubRepos, remit: Remit, annotated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remit("push", annotated, DATASET, "--path", "a")[0] == 0
    for url, message in (
        (f"{URL}@gone/a", "has no revision 'gone'"),
        (f"{URL}/b", "has no _manifest.json"),
        (
            "hf://datasets/org/none/a",
            "the hub has no dataset org/none, or it is private and the token here may not read it",
        ),
    ):
        code_, _, error = remit("inspect", url)
        assert (code_, message in error) == (1, True), error
    for words in (["score", "--shards", annotated, "--model", "m", "--out", f"{URL}/out"],
                  ["train", "--shards", annotated, "--model", "m", "--out", f"{URL}/out"]):  # fmt: skip
        code_, _, error = remit(*words)
        assert "the hub is only read" in " ".join(error.replace("│", " ").split())
    for call in (
        lambda s: s.create("x", b""),
        lambda s: s.replace("x", b""),
        lambda s: s.delete("x"),
        lambda s: s.remove(),
    ):
        with pytest.raises(ValueError, match="the hub is only read"):
            call(HubStore(f"{URL}/a"))
    code_, _, error = remit("verify", f"{URL}/a", "--repair")
    assert (code_, "the hub is only read" in error) == (1, True), error
    use(hub, monkeypatch, None)
    code_, _, error = remit("inspect", f"{URL}/a")
    assert (code_, "is private and no token is set here" in error) == (1, True), error
    # a hub that has a bad moment is asked again
    use(hub, monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail = [503, 429]
    assert remit("inspect", f"{URL}/a")[0] == 0
    assert not hub.fail


def test_a_corpus_is_named_as_a_dataset(remit: Remit, tmp_path: Path, tokenizer_folder: Path) -> None:
    code_, _, error = remit(
        "pack", "--corpus", "hf://datasets/o/n/data/a.jsonl", "--tokenizer", tokenizer_folder, "--out", tmp_path / "o"
    )
    assert (code_, "expected the dataset, OWNER/NAME[@REVISION]" in error) == (1, True), error


def test_many_readers_of_one_store(hub: HubRepos, remit: Remit, annotated: Path) -> None:
    """Threads ask one store at once, as those of a training do."""
    assert remit("push", annotated, DATASET)[0] == 0
    store, found = HubStore(URL), []
    names = sorted(file.name for file in (annotated / "_commits").iterdir())

    def read() -> None:
        found.append(
            (store.names("_commits"), [store.sha256(part) for part in ("part-00000.arrow", "part-00001.arrow")])
        )

    rounds = 10
    for _ in range(rounds):
        store._fs.invalidate_cache()  # all of them list the folder
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = [
        hashlib.sha256((annotated / part).read_bytes()).hexdigest() for part in ("part-00000.arrow", "part-00001.arrow")
    ]
    assert found == [(names, expected)] * (8 * rounds)
