"""NAME and NAME@REVISION of models and tokenizers, from a hub on loopback; folders whose names look like those."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model
from hub_server import Hub, commit_of
from safetensors.torch import load_file

from pipelines.cli import parse
from pipelines.flywheel.config import read_config
from pipelines.flywheel.loop import make_loop
from pipelines.models import LocalModel, resolve_model
from pipelines.posttrain.run import Stage, post_train
from shards.fingerprint import model_origin, weights_fingerprint
from shards.manifest import Manifest

Remit = Callable[..., tuple[int, str, str]]
STAGE1 = "stage1-step140000-tokens294B"
SLASHES = "runs/lr-3e-4/step.10"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """Three states of one model, each with the tokenizer."""
    folder = tmp_path_factory.mktemp("versions")
    found = {name: folder / str(seed) for seed, name in enumerate(["main", STAGE1, SLASHES], start=40)}
    for made in found.values():
        make_model(made, seed=int(made.name))
        shutil.copytree(tokenizer_folder, made, dirs_exist_ok=True)
        (made / "modeling_own.py").write_text("raise SystemExit\n")
    return found


@pytest.fixture
def hub(tmp_path: Path, versions: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "none")
    server.models["org/olmo"] = dict(versions)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


@pytest.mark.parametrize("revision", ["main", STAGE1, SLASHES])
def test_branches_and_commits(hub: Hub, versions: dict[str, Path], revision: str) -> None:
    commit = commit_of("org/olmo", revision)
    for asked in (revision, commit):
        found = resolve_model("--model", f"org/olmo@{asked}")
        assert (found.name, found.revision) == ("org/olmo", commit)
        assert weights_fingerprint(found.path) == weights_fingerprint(versions[revision])
        assert not list(found.path.glob("*.py"))
        # the folder in the cache says the same, however it is reached
        assert resolve_model("--model", str(found.path)) == LocalModel(found.path, "org/olmo", commit)
    if revision == "main":
        assert resolve_model("--model", "org/olmo").revision == commit
    if revision == STAGE1:  # the first answer had no weights
        assert not list(resolve_model("--tokenizer", f"org/olmo@{SLASHES}", weights=False).path.glob("*.safetensors"))
        assert list(resolve_model("--model", f"org/olmo@{SLASHES}").path.glob("*.safetensors"))


def test_a_commit_in_the_cache_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve_model("--model", f"org/olmo@{SLASHES}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for asked in (SLASHES, str(found.revision)):
        assert resolve_model("--model", f"org/olmo@{asked}") == found
    with pytest.raises(ValueError, match=rf"--model org/olmo@{STAGE1}: .*hub does not answer for revision '{STAGE1}'"):
        resolve_model("--model", f"org/olmo@{STAGE1}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/olmo@stage1-step140000", f"org/olmo has no revision 'stage1-step140000' on the .*near it: {STAGE1}"),
        (f"org/olmo@{'0' * 40}", f"org/olmo has no revision '{'0' * 40}' on the Hugging Face hub"),
        ("org/olmo@", "its revision is '', expected a branch, a tag or a commit, for instance org/olmo@main"),
        ("org/olmo@a b", "its revision is 'a b', expected a branch"),
        ("org/olmo@../../../elsewhere", "its revision is '../../../elsewhere', expected a branch"),
        ("org/olmo@-x", "its revision is '-x', expected a branch"),
        ("org/none@main", "the Hugging Face hub does not answer for revision 'main' of org/none"),
        ("org/none", "neither a folder nor a model that the Hugging Face hub answers for"),
        ("./mine@main", r"no such folder; the folder \./mine has no revisions, leave @main out"),
        ("a/b/c@main", "no such folder; expected a Hugging Face model folder, or NAME or NAME@REVISION of the hub"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(hub: Hub, model: str, message: str) -> None:
    Path("mine").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        resolve_model("--base", model)
    assert str(error.value).startswith(f"--base {model}: ")
    assert "\n" not in str(error.value)


def test_a_folder_may_have_an_at_sign(hub: Hub, versions: dict[str, Path]) -> None:
    for name in ("org/olmo@main", "base@v1", "models--org--olmo/snapshots/v1"):
        shutil.copytree(versions[STAGE1], name)
        assert resolve_model("--model", name) == LocalModel(Path(name), Path(name).name, None)
    assert hub.served == {}
    assert model_origin(Path("models--org--a--b/snapshots") / ("0" * 40)) == ("org/a--b", "0" * 40)


def test_every_command_takes_a_revision(
    hub: Hub, remit: Remit, versions: dict[str, Path], corpus_folder: Path, tmp_path: Path
) -> None:
    """pack, score, verify, train and plan from branches; the commits stand where the results are."""
    model, commit = f"org/olmo@{STAGE1}", commit_of("org/olmo", STAGE1)
    command = ["pack", "--corpus", corpus_folder / "a.jsonl", "--tokenizer", model, "--out", "packed", "--seq-len", 64]
    assert remit(*command)[0] == 0
    assert {("model", "org/olmo"), ("revision", commit)} <= Manifest.read("packed").tokenizer.items()
    # a copy of the same tokenizer does not make another pack
    command[4] = versions["main"]
    assert "nothing to do" in remit(*command)[1]

    score = ["score", "--shards", "packed", "--model", model, "--out", "scored", "--engine", "fake", "--num-engines", 1]
    assert remit(*score)[0] == 0
    reference = Manifest.read("scored").references["rl"]
    assert (reference["model"], reference["revision"]) == ("org/olmo", commit)
    assert reference["weights_sha256"] == weights_fingerprint(versions[STAGE1])
    assert remit("verify", "--shards", "scored")[0] == 0
    code, _, error = remit("verify", "--shards", "scored", "--model", "org/olmo@nowhere")
    assert (code, "--model org/olmo@nowhere: org/olmo has no revision 'nowhere'" in error) == (1, True), error

    options = ["--learning-rate", "1e-3", "--max-steps", 2, "--global-batch-size", 8, "--micro-batch-size", 8]
    train = ["train", "--shards", "packed", "--objective", "ntp", "--out", "run", *options]
    code, _, error = remit(*train, "--model", model)
    assert code == 0, error
    run = json.loads(Path("run/run.json").read_text())
    assert run["base"] == {"model": "org/olmo", "revision": commit}
    assert run["base_weights_sha256"] == weights_fingerprint(versions[STAGE1])
    moved = shutil.copytree(versions[STAGE1], "moved", ignore=shutil.ignore_patterns("*.py"))
    code, out, error = remit(*train, "--model", moved)
    assert (code, out.startswith("nothing to do")) == (0, True), error
    code, _, error = remit(*train, "--model", "org/olmo")
    assert (code, f"asked for now (it began with org/olmo@{commit})" in error) == (1, True), error
    for option in ("--base", "--reference"):
        roles = {"--base": model, "--reference": model} | {option: f"org/olmo@{SLASHES}x"}
        code, _, error = remit("plan", *(w for role in roles.items() for w in role), "--tokens", "1e9")
        assert (code, f"{option} org/olmo@{SLASHES}x: org/olmo has no revision" in error) == (1, True), error
    assert remit("plan", "--base", model, "--reference", f"org/olmo@{SLASHES}", "--tokens", "1e9")[0] == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float32).state_dict()
    start = load_file(next(versions[STAGE1].glob("*.safetensors")))
    assert set(exported) == set(start)
    assert any(not torch.equal(exported[name], start[name]) for name in start)
    assert os.path.isdir(tmp_path / "cache")


def test_the_flywheel_and_post_training_take_revisions(hub: Hub, versions: dict[str, Path], remit: Remit) -> None:
    Path("data.jsonl").write_text('{"text": "a"}\n')
    Path("own.sh").write_text("cp -r $REMIT_MODEL/* $REMIT_OUTPUT\n")
    Path("loop.yaml").write_text(
        f"base: org/olmo@{STAGE1}\ntokenizer: org/olmo@{commit_of('org/olmo', 'main')}\nreference: org/olmo@{SLASHES}\n"
        "corpus: data.jsonl\nout: loop\nseq_len: 64\nposttrain: [{command: [bash, own.sh]}]\n"
    )
    loop = make_loop(read_config(Path("loop.yaml"), None))
    words = {stage.name: stage.inputs for stage in loop.stages}
    assert model_origin(Path(words["round-1/train"]["model"].path)) == ("org/olmo", commit_of("org/olmo", STAGE1))
    assert model_origin(Path(words["round-1/score"]["model"].path)) == ("org/olmo", commit_of("org/olmo", SLASHES))
    Path("loop.yaml").write_text(Path("loop.yaml").read_text().replace(SLASHES, "gone"))
    code, _, error = remit("flywheel", "--config", "loop.yaml", "--dry-run")
    assert (code, "reference org/olmo@gone: org/olmo has no revision 'gone'" in error) == (2, True), error

    settings = parse(["sft", "--model", "org/olmo@gone", "--data", "data.jsonl", "--out", "sft"])
    with pytest.raises(ValueError, match=r"--model org/olmo@gone: org/olmo has no revision 'gone'"):
        post_train(settings, Stage((), (), 0, lambda job: None), lambda: False)


def test_a_run_stands_for_its_model_which_is_called_after_it(tmp_path: Path) -> None:
    run = tmp_path / "run-ref"
    (run / "exports").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--model .*run-ref: is a run that has not finished"):
        resolve_model("--model", str(run))
    for folder in (run / "model", run / "exports" / "step-000100"):
        make_model(folder)
    assert resolve_model("--model", str(run)) == LocalModel(run / "model", "run-ref", None)
    assert resolve_model("--model", str(run / "model")).name == "run-ref"
    assert resolve_model("--model", str(run / "exports" / "step-000100")).name == "run-ref-step-000100"
