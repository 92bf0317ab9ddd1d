"""remit flywheel with stages that are quick stand-ins (looping.py): its file, its plan, what repeats, kills, signals."""

import json
import math
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model
from looping import FakeLoop
from processes import Command, alive, until
from safetensors.torch import load_file, save_file

from pipelines.cli import parse
from pipelines.flywheel.check_model import check_model
from pipelines.flywheel.config import read_config
from pipelines.flywheel.loop import make_loop
from pipelines.flywheel.sections import SECTIONS
from pipelines.flywheel.stages import Given, Stage
from pipelines.terminal import BadUsage
from scorer.sources import find_corpus
from trainer.run_folder import NOT_SETTINGS

Remit = Callable[..., tuple[int, str, str]]
STAGES = [
    "pack", "round-0/train", "round-0/own", "round-0/evaluate-midtrained", "round-0/evaluate-posttrained",
    "round-1/score", "round-1/train", "round-1/own", "round-1/evaluate-midtrained", "round-1/evaluate-posttrained",
]  # fmt: skip
ONCE = {"pack": 1, "score": 1, "train": 2, "own": 2, "eval": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = make_model(tmp_path_factory.mktemp("base") / "base")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def fake(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    monkeypatch.setenv("FAKE", str(tmp_path))
    return FakeLoop(tmp_path, base)


def counts(fake: FakeLoop) -> dict[str, int]:
    return {name: fake.starts.count(name) for name in ONCE}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def planned(output: str) -> dict[str, str]:
    """State of each stage in the table of --dry-run."""
    table = output.partition("\npack\n")[0]
    rows = re.findall(r"^ *\d+ +(\S+) +(.+?) *$", table, re.MULTILINE)
    return {name: re.sub(r"  +\d+$", "", state) for name, state in rows}


@pytest.mark.usefixtures("starts_processes")
def test_loop_runs_and_runs_only_what_changed(fake: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("flywheel", "--config", fake.file)
    code, output, _ = remit(*arguments, "--dry-run")
    assert code == 0
    assert not fake.out.exists()
    plan = planned(output)
    assert list(plan) == STAGES
    assert plan["pack"] == "to run"
    assert plan["round-1/score"] == "depends on pack, round-0/own"

    code, output, error = remit(*arguments)
    assert (code, counts(fake)) == (0, ONCE), error
    assert "[3/10] round-0/own: done" in error
    models = re.findall(r"(\S+-trained)(?: \((\w+)\))?: (\S+)", output)
    assert [(kind, objective) for kind, objective, _ in models] == [
        ("mid-trained", "ntp"), ("post-trained", ""), ("mid-trained", "remit"), ("post-trained", ""),
    ]  # fmt: skip
    assert all(Path(path, "config.json").exists() for _, _, path in models)
    assert output.count("round 1 posttrained") == 1
    assert "0.5000 ± 0.1000" in output
    own = fake.out / fake.overview()["round-1/own"]["result"] / "own.txt"
    assert own.read_text() == "1 7 prompts\n"
    whole = fake.fingerprints()

    before = tree(fake.out)
    code, output, _ = remit(*arguments, "--dry-run")
    assert set(planned(output).values()) == {state for state in planned(output).values() if state.startswith("done (")}
    assert "10 of 10 stages are done" in output
    assert tree(fake.out) == before
    code, output, error = remit(*arguments)
    assert (code, counts(fake)) == (0, ONCE)
    assert error.count("done before") == 10

    # a changed word of post-training: everything before its first use stands
    (fake.folder / "prompts.txt").write_text("other prompts\n")
    code, output, _ = remit(*arguments, "--dry-run")
    waiting = {name for name, state in planned(output).items() if not state.startswith("done")}
    assert planned(output)["round-0/own"] == "to run"
    code, _, error = remit(*arguments)
    assert code == 0
    ran = set(re.findall(r"\] (\S+): done \(", error))
    assert ran == waiting == set(STAGES) - {"pack", "round-0/train", "round-0/evaluate-midtrained"}
    assert fake.fingerprints()["round-1/train"] != whole["round-1/train"]
    assert [counts(fake)[name] for name in ("pack", "train", "own")] == [1, 3, 4]

    # what only says how fast or how safely
    fake.values["train"]["checkpoint_every"] = 3
    fake.write()
    assert remit(*arguments)[0] == 0
    assert counts(fake)["train"] == 3
    fake.values["train"]["learning_rate"] = "1e-4"
    fake.write()
    assert remit(*arguments)[0] == 0
    assert [counts(fake)[name] for name in ("pack", "score", "train")] == [1, 3, 5]


def test_each_round_starts_from_the_base_and_scores_with_the_round_before(fake: FakeLoop) -> None:
    fake.values |= {"rounds": 2, "evaluate": None}
    loop = make_loop(read_config(fake.write()))
    stages = {stage.name: stage for stage in loop.stages}
    base = Path(fake.values["base"])
    for number in range(3):
        assert stages[f"round-{number}/train"].inputs["model"].path == str(base)
        assert stages[f"round-{number}/own"].inputs["model"] is stages[f"round-{number}/train"]
    for number in (1, 2):
        assert stages[f"round-{number}/score"].inputs["model"] is stages[f"round-{number - 1}/own"]
        assert stages[f"round-{number}/score"].inputs["shards"] is stages["pack"]
        assert stages[f"round-{number}/train"].inputs["shards"] is stages[f"round-{number}/score"]
    assert stages["round-0/train"].inputs["shards"] is stages["pack"]


def test_a_reference_that_exists_takes_the_place_of_round_0(fake: FakeLoop, tmp_path: Path) -> None:
    shutil.copytree(fake.values["base"], tmp_path / "rl")
    fake.values |= {"reference": str(tmp_path / "rl"), "evaluate": None}
    loop = make_loop(read_config(fake.write()))
    assert [stage.name for stage in loop.stages] == ["pack", "round-1/score", "round-1/train", "round-1/own"]
    assert loop.stages[1].inputs["model"].path == str(tmp_path / "rl")
    fake.values["rounds"] = 0
    with pytest.raises(BadUsage, match="rounds is 0, expected greater than or equal to 1"):
        read_config(fake.write())


def parsed(stage: Stage) -> object:
    """What remit's own parser makes of a stage's words, <name> standing for paths."""
    words = [str(word) for word in (*stage.command, *stage.more)]
    assert words[0] == "pipelines.cli"
    return parse(words[1:])


def inputs(stage: Stage, prefix: str) -> list[str]:
    return [source.path for name, source in stage.inputs.items() if name.startswith(prefix)]


def test_commands_are_those_of_the_command_line(fake: FakeLoop, tmp_path: Path) -> None:
    """Every stage's words go through remit's own parser, and come out as the file's values."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    fake.values |= {
        "corpus": [str(tmp_path / "*.parquet"), "s3://bucket/x.jsonl", "user/dataset:part"],
        "heldout": str(tmp_path / "a.parquet"),
        "launch": {"train": ["env", "torchrun", "--nproc-per-node", 8, "-m"]},
        "pack": {"tokens-per-shard": 640, "num_workers": 2},
        "score": {"context": "document", "top_k": 8, "canary": False, "num_engines": 3},
        "train": {
            "objective": "kd",
            "kd_weight": 0.25,
            "compile": False,
            "beta1": 0.5,
            "micro_batch_size": 2,
        },
        "evaluate": {"suite": "paper", "allow_code_execution": True},
    }
    stages = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}
    pack = parsed(stages["pack"])
    assert pack.corpus == [str(tmp_path / "*.parquet"), "s3://bucket/x.jsonl", "user/dataset:part"]
    assert (pack.seq_len, pack.tokens_per_shard, pack.num_workers, pack.out) == (64, 640, 2, "<out>")
    assert inputs(stages["pack"], "corpus/") == [str(tmp_path / "*.parquet")]
    assert stages["pack"].settings["elsewhere"] == ["s3://bucket/x.jsonl", "user/dataset:part"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.jsonl").write_text('{"text": "a"}\n')
    fake.values["corpus"] = [str(tmp_path / "own::train"), str(tmp_path / "own:de")]
    local = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}["pack"]
    assert parsed(local).corpus == inputs(local, "corpus/") == fake.values["corpus"]
    assert (
        parsed(stages["pack-heldout"]).corpus
        == inputs(stages["pack-heldout"], "heldout/")
        == [str(tmp_path / "a.parquet")]
    )
    score = parsed(stages["round-1/score"])
    assert (score.shards, score.model, score.name, score.context) == ("<shards>", "<model>", "rl", "document")
    assert (score.top_k, score.canary, score.num_engines) == (8, False, 3)
    plain, guided = (parsed(stages[f"round-{number}/train"]) for number in range(2))
    assert (plain.objective, plain.context, plain.seed) == ("ntp", "document", 7)
    assert (guided.objective, guided.reference, guided.context, guided.kd_weight) == ("kd", "rl", "auto", 0.25)
    for config in (plain, guided):
        assert (config.compile, config.beta1, config.micro_batch_size) == ("off", 0.5, 2)
        assert (config.eval_shards, str(config.out)) == ("<eval_shards>", "<out>")
    assert stages["round-1/train"].launcher == ("env", "torchrun", "--nproc-per-node", "8", "-m")
    fake.values["train"] = {"epsilon": math.inf}  # .inf in YAML
    unclipped = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}["round-1/train"]
    assert parsed(unclipped).epsilon == math.inf
    evaluate = parsed(stages["round-1/evaluate-posttrained"])
    assert (evaluate.suite, evaluate.allow_code_execution) == ("paper", True)


def test_unkeyed_options_are_those_that_a_resume_allows() -> None:
    assert set(SECTIONS["train"].unkeyed) <= set(NOT_SETTINGS)
    for section in ("pack", "score", "train", "evaluate"):
        known = {*SECTIONS[section].options(), *SECTIONS[section].decided}
        assert {*SECTIONS[section].unkeyed, *SECTIONS[section].files, *SECTIONS[section].decided} <= known
        assert known == set(SECTIONS[section].settings_class().__dataclass_fields__)


BAD = [
    ({"rouns": 2}, "rouns is no key; did you mean rounds?"),
    ({"zzz": 2}, "zzz is no key; expected one of base, corpus, out, posttrain"),
    ({"base": None}, "base is missing"),
    ({"corpus": None}, "corpus is missing"),
    ({"posttrain": None}, "posttrain is missing, expected a list such as"),
    ({"base": 3}, "base 3: no such folder"),
    ({"base": "./none"}, "base ./none: no such folder"),
    ({"corpus": []}, "corpus is [], expected a list of words"),
    ({"corpus": [["a"]]}, "expected a list of words"),
    ({"corpus": "none.jsonl"}, "corpus none.jsonl: no such file; check --corpus"),
    ({"corpus": "none/*.jsonl"}, "corpus none/*.jsonl: no file matches this pattern"),
    ({"heldout": "none.jsonl"}, "heldout none.jsonl: no such file"),
    ({"rounds": -1}, "rounds is -1, expected greater than or equal to 0"),
    ({"rounds": True}, "rounds is 'true', expected a valid integer"),
    ({"rounds": 1.5}, "rounds is 1.5, expected a valid integer"),
    ({"seq_len": "4k"}, "seq_len is 4k, expected a valid integer"),
    ({"seed": -3}, "seed is -3, expected greater than or equal to 0"),
    ({"pack": 3}, "pack is 3, expected a mapping of options of remit pack"),
    ({"pack": {"seq_len": 3}}, "pack.seq_len cannot be given here: give seq_len at the top"),
    ({"pack": {"tokens_per_shard": 10}}, "pack: --tokens-per-shard is 10, expected at least"),
    ({"score": {"contxt": "document"}}, "score.contxt is no key; did you mean context?"),
    ({"score": {"context": "doc"}}, "score.context is 'doc', expected 'packed' or 'document'"),
    ({"score": {"name": "x"}}, "score.name cannot be given here: the loop decides it"),
    ({"score": {"top_k": -1}}, "score: --top-k is -1, expected 0 (store none) or more"),
    ({"train": {"max_steps": "many"}}, "train.max_steps is 'many', expected a valid integer"),
    ({"train": {"beta1": "a"}}, "train.beta1 is 'a', expected a valid number"),
    ({"train": {"learning_rate": -1}}, "train: --learning-rate is -1.0, expected 0 or more"),
    ({"train": {"seed": {"a": 1}}}, "train.seed cannot be given here: give seed at the top"),
    ({"train": {"epsilon": {"a": 1}}}, "train.epsilon is {'a': '1'}, expected a valid number"),
    ({"train": {"epsilon": [0.1, 0.2]}}, "train.epsilon is ['0.1', '0.2'], expected a valid number"),
    ({"train": {"objective": "ntp"}}, "train.objective is 'ntp', expected an objective with a reference"),
    ({"train": {"objective": "kd", "epsilon": 0.3}}, "--epsilon belongs to --objective remit"),
    ({"train": {"objective": "kd"}}, "score.top_k is 0, expected at least 1, for instance 32, since train.objective is kd"),
    ({"train": {"context": "document"}}, "train.context is 'document', expected packed, as score.context is, or auto"),
    (
        {"train": {"context": "packed"}, "score": {"context": "document"}},
        "train.context is 'packed', expected document, as score.context is, or auto",
    ),
    ({"score": {"engine": "fake"}}, "score.engine is 'fake', expected vllm; the fake engine's numbers are a hash"),
    ({"train": {"eval_shards": "none"}}, "train.eval_shards is 'none', expected a file or folder that is there"),
    ({"launch": {"trian": "x"}}, "launch.trian is no key; did you mean train?"),
    ({"launch": {"train": {}}}, "launch.train is {}, expected a list of words"),
    ({"evaluate": {"suite": "paper", "tasks": "x"}}, "--suite and --tasks are both given"),
    ({"posttrain": "rl"}, "posttrain is 'rl', expected a list such as"),
    ({"posttrain": ["rl"]}, "posttrain[1] is 'rl', expected a mapping"),
    ({"posttrain": [{"comand": ["x"]}]}, "posttrain[1].comand is no key; did you mean command?"),
    ({"posttrain": [{"name": "x"}]}, "expected exactly one of sft, dpo, rl, command"),
    ({"posttrain": [{"command": []}]}, "posttrain[1].command is [], expected a list of words"),
    ({"posttrain": [{"command": ["python", "-c", None]}]}, "of which number 3 is None; null needs quotes"),
    ({"posttrain": [{"command": ["true"], "name": "train"}]}, "posttrain[1].name is 'train', expected letters"),
    ({"posttrain": [{"command": ["true"], "name": "a/b"}]}, "posttrain[1].name is 'a/b', expected letters"),
    ({"posttrain": [{"command": ["true"]}, {"command": ["true"]}]}, "posttrain[2].name is 'command', expected a name that"),
    ({"posttrain": [{"command": ["no-such-tool"]}]}, "posttrain[1].command is 'no-such-tool', expected a program that"),
    ({"posttrain": [{"command": "python rl.py --steps 3"}]}, "a list of words, here [python, rl.py, --steps, 3]"),
    ({"posttrain": [{"command": ["python3", "no-such.py"]}]}, "posttrain[1].command is 'no-such.py', expected a script"),
    ({"launch": {"train": ["no-such-tool", "-m"]}}, "launch.train is 'no-such-tool', expected a program that"),
    ({"posttrain": [{"command": ["true"], "inputs": ["none"]}]}, "posttrain[1].inputs is 'none', expected a file or"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_files(fake: FakeLoop, remit: Remit, changes: dict, message: str) -> None:
    fake.values |= changes
    code, _, error = remit("flywheel", "--config", fake.write())
    assert (code, fake.starts, fake.out.exists()) == (2, [], False), error
    line = error.strip().splitlines()[-1]
    assert line.startswith("remit flywheel: error: ")
    assert message in line


WORDS = [
    "allenai/c4:en.noblocklist:train", "user/set-v1.5", "user/set-v1.5@main", "gpt2-output", "hf://user/a.b:c.d", "file://{data}",
    "{data}", "{data}/a.jsonl", "{data}/*.jsonl", "{data}::train", "{data}:de", "{data}/a.txt", "{data}/*.txt", "{data}/b.json",
    "{data}/none", "none.jsonl", "none/*.jsonl", "./none", "~/none", "a/b/c", "user/set.jsonl", "user/set.parquet", "{data}/empty",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_pack_and_flywheel_judge_a_word_of_the_corpus_alike(
    fake: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """What remit pack refuses is refused with its words, what it asks the hub or `datasets` for is left to it."""
    data = tmp_path / "data"
    (data / "empty").mkdir(parents=True)
    (data / "a.jsonl").write_text('{"text": "a"}\n')
    (data / "a.txt").write_text("a")
    (data / "b.json").write_text("[1]")
    word, asked, said = word.format(data=data), [], ["", ""]
    monkeypatch.setattr("scorer.sources.find_shards", lambda entry: asked.append(entry) or [])
    try:
        find_corpus([word])
    except ValueError as error:
        said[0] = str(error)
    fake.values["corpus"] = [word]
    try:
        stage = make_loop(read_config(fake.write())).stages[0]
    except BadUsage as error:
        said[1] = str(error)
    else:
        assert stage.settings["elsewhere"] == [entry for entry in asked if not entry.startswith(str(data))]
    assert said[1] == (said[0] and f"corpus {said[0]}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("- a", "expected a mapping of keys to values"),
        ("base: a\nbase: b\n", "line 2: 'base' stands twice"),
        ("train: {seed: 1, seed: 2}\n", "'seed' stands twice"),
        ("{[1]: 2}", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("!!python/object/apply:os.system [true]", "cannot be read"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, remit: Remit, text: str | bytes | None, message: str) -> None:
    file = tmp_path / "f.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, error = remit("flywheel", "--config", file)
    assert (code, message in error) == (2, True), error
    assert "Traceback" not in error


def test_what_is_not_installed_is_found_at_once(fake: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.flywheel.loop.find_spec", lambda name: None)
    del fake.values["launch"]["evaluate"]
    code, _, error = remit("flywheel", "--config", fake.write())
    assert (code, fake.starts) == (1, [])
    assert "evaluate needs lm_eval, which is not installed; in your checkout of remit: pip install '.[eval]'" in error


def test_all_that_a_folder_of_the_user_holds_counts(
    fake: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs, base and task_dir, also files that begin with _ or a dot; of task_dir the data that its tasks name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fake.values["base"], tmp_path / "base")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "_params.json").write_text("1")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "_defaults.yaml").write_text("dataset_path: questions")
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "q.json").write_text("1")
    (tmp_path / "conf.yaml").write_text("1")
    fake.values["base"] = str(tmp_path / "base")
    fake.values["posttrain"] = [
        {"command": ["true", "--config=conf.yaml", "--dir=extra", "--x=y"], "inputs": ["extra"]}
    ]
    fake.values["evaluate"] = {"tasks": "capitals", "task_dir": str(tmp_path / "tasks")}
    stages = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}
    own = stages["round-0/command"]
    assert own.command == ("true", "--config=conf.yaml", "--dir=extra", "--x=y")

    def prints(name: str) -> dict[str, str]:
        found = stages[name].inputs
        return {name: source.identity() for name, source in found.items() if isinstance(source, Given)}

    for name, file, changed in (
        ("round-0/command", "extra/_params.json", {"input/0"}),
        ("round-0/command", "conf.yaml", {"word/1"}),
        ("round-0/train", "base/.hidden", {"model"}),
        ("round-0/train", "base/.cache/x", set()),
        ("round-0/evaluate-midtrained", "tasks/_defaults.yaml", {"task_dir"}),
        ("round-0/evaluate-midtrained", "questions/q.json", {"task_dir"}),
        ("round-0/evaluate-midtrained", "tasks/__pycache__/x.pyc", set()),
    ):
        before = prints(name)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with open(tmp_path / file, "a") as opened:
            opened.write("\n# more\n" if file.endswith(".yaml") else " ")
        after = prints(name)
        assert {key for key in before if before[key] != after[key]} == changed, file


@pytest.mark.usefixtures("starts_processes")
def test_words_with_an_equals_sign_reach_the_command_whole(fake: FakeLoop, remit: Remit) -> None:
    conf = fake.folder / "conf.yaml"
    conf.write_text("one\n")
    (fake.folder / "own.sh").write_text(
        'cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; cp "${1#--config=}" "$REMIT_OUTPUT"/own.txt'
    )
    fake.values["posttrain"] = [{"command": ["bash", str(fake.folder / "own.sh"), f"--config={conf}"], "name": "own"}]
    fake.values |= {"rounds": 0, "evaluate": None}
    for content in ("one\n", "two\n"):
        conf.write_text(content)
        assert remit("flywheel", "--config", fake.write())[0] == 0
        assert (fake.out / fake.overview()["round-0/own"]["result"] / "own.txt").read_text() == content


@pytest.mark.parametrize(
    ("reward", "source"), [("single:f", "single.py"), ("several.deep:f", "several"), ("none:f", None)]
)
def test_source_of_a_reward(
    fake: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str, source: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("single.py", "several/__init__.py", "several/deep.py", "several/notes.txt", "more.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "rl.jsonl").write_text('{"prompt": "a"}\n')
    fake.values["posttrain"] = [{"rl": {"data": "rl.jsonl", "reward": reward}, "inputs": ["more.txt"]}]
    stages = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}
    found = stages["round-0/rl"].inputs
    assert found["input/0"].path == str(tmp_path / "more.txt")
    assert ("reward" in found) == (source is not None)
    if source:
        assert found["reward"].path == str(tmp_path / source)
        before = found["reward"].identity()
        (tmp_path / "several" / "notes.txt").write_text("other")
        assert found["reward"].identity() == before
        with open(tmp_path / (source if source == "single.py" else "several/__init__.py"), "a") as file:
            file.write("# other\n")
        assert found["reward"].identity() != before


def test_bad_options(fake: FakeLoop, remit: Remit) -> None:
    assert remit("flywheel")[0] == 2
    assert remit("flywheel", "--config", fake.file, "--jobs", 2)[0] == 2
    assert remit("flywheel", "--config", fake.file, "--out", fake.folder / "other", "--dry-run")[0] == 0


def test_post_training_of_ours(fake: FakeLoop, remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options and its data are checked before anything runs, and its command line is what it parses."""
    monkeypatch.chdir(tmp_path)
    examples = {"sft": {"prompt": "a", "completion": "b"}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    examples["rl"] = {"prompt": "a", "answer": "b"}
    for kind, example in examples.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(example) + "\n")
    (tmp_path / "rewards.py").write_text("")
    fake.values["posttrain"] = [
        {"sft": {"data": "sft.jsonl", "max_steps": 5, "checkpoint_every": 2}},
        {"dpo": {"data": "dpo.jsonl", "beta": 0.2}},
        {"rl": {"data": "rl.jsonl", "reward": "rewards:mine"}, "name": "rl-long"},
    ]
    stages = {stage.name: stage for stage in make_loop(read_config(fake.write())).stages}
    for name, kind in (("sft", "sft"), ("dpo", "dpo"), ("rl-long", "rl")):
        stage = stages[f"round-1/{name}"]
        assert stage.command[:2] == ("pipelines.cli", kind)
        config = parse([str(word) for word in (*stage.command[1:], *stage.more)])
        assert (config.model, str(config.data), str(config.out), config.seed) == ("<model>", "<data>", "<out>", 7)
        assert stage.inputs["data"].path == str(tmp_path / f"{kind}.jsonl")
        assert (stage.result, stage.resumes) == ("model", True)
    assert stages["round-0/rl-long"].inputs["model"] is stages["round-0/dpo"]
    assert stages["round-0/rl-long"].inputs["reward"].path == str(tmp_path / "rewards.py")
    assert stages["round-1/score"].inputs["model"] is stages["round-0/rl-long"]
    for entry, message in (
        ({"sft": {}}, "posttrain[1].sft.data is missing"),
        ({"sft": {"data": "none"}}, "posttrain[1].sft.data is 'none', expected a file"),
        ({"sft": {"data": "rl.jsonl"}}, "posttrain[1].sft: --data rl.jsonl line 1: has no 'completion'"),
        ({"rl": {"data": "sft.jsonl"}}, "has no 'answer'"),
        (
            {"rl": {"data": "rl.jsonl", "num_generations": 1}},
            "posttrain[1].rl: --num-generations is 1, expected at least 2",
        ),
        ({"dpo": {"data": "dpo.jsonl", "beta": "x"}}, "posttrain[1].dpo.beta is 'x', expected a valid number"),
        ({"dpo": {"data": "dpo.jsonl", "betta": 1}}, "posttrain[1].dpo.betta is no key; did you mean beta?"),
    ):
        fake.values["posttrain"] = [entry]
        code, _, error = remit("flywheel", "--config", fake.write())
        assert (code, message in error) == (2, True), error


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, str]:
    """Fingerprints of a loop that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fake = FakeLoop(folder, base)
    command = Command(folder, "flywheel", "--config", fake.file, private=True, FAKE=str(folder))
    assert command.finish(600) == 0, command.errors
    return fake.fingerprints()


@pytest.mark.parametrize("victim", ["driver", "stage", "both"])
@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.usefixtures("starts_processes")
def test_kill_in_every_kind_of_stage(fake: FakeLoop, kind: str, victim: str, undisturbed: dict[str, str]) -> None:
    """The same command repeats that stage alone, or goes on in it, and ends with the results of a run left alone.

    A stage whose driver alone is killed goes on; the next driver waits for it by name, and starts nothing beside it.
    """
    arguments = ("flywheel", "--config", fake.file)
    gate = fake.hold(kind)
    first = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
    first.until(lambda: kind in fake.starts, 600)
    pid = fake.last_pid()
    if victim != "stage":
        first.signal(signal.SIGKILL)
        assert first.finish(600) == -signal.SIGKILL
    if victim != "driver":
        kill(pid)
        until(lambda: not alive(pid))
    if victim == "stage":
        assert first.finish(600) == 1, first.errors
        assert re.search(r"error: stage \S+ was ended by signal 9", first.last_error)
    if victim == "driver":
        assert alive(pid)
    else:
        gate.unlink()
    again = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
    if victim == "driver":
        again.until(lambda: f"goes on as process {pid} " in again.errors, 600)
        assert fake.starts.count(kind) == 1
        gate.unlink()
    assert again.finish(600) == 0, again.errors
    assert counts(fake) == ONCE | {kind: ONCE[kind] + 1}
    found = fake.fingerprints()
    # the stand-ins name their inputs by content, and the paths differ from folder to folder
    assert found == undisturbed
    assert not list((fake.out / "stages").glob(".*"))
    assert not list((fake.out / "running").iterdir())
    assert [stage["state"] for stage in fake.overview().values()] == ["done"] * 10
    tried = [name for name, stage in fake.overview().items() if stage["attempts"] == 2]
    assert len(tried) == 1
    assert kind in tried[0].replace("evaluate", "eval")


@pytest.mark.usefixtures("starts_processes")
def test_a_driver_that_waits_can_be_stopped(fake: FakeLoop) -> None:
    """SIGTERM ends the wait, with exit code 3, and leaves what is waited for alone."""
    arguments = ("flywheel", "--config", fake.file)
    gate = fake.hold("train")
    first = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
    first.until(lambda: "train" in fake.starts, 600)
    pid = fake.last_pid()
    first.signal(signal.SIGKILL)
    first.finish(600)
    second = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
    second.until(lambda: f"process {pid} " in second.errors, 600)
    second.signal(signal.SIGTERM)
    assert second.finish(600) == 3, second.errors
    assert alive(pid)
    gate.unlink()
    until(lambda: not alive(pid))


@pytest.mark.usefixtures("starts_processes")
def test_an_edited_result_is_refused_by_name(fake: FakeLoop, remit: Remit) -> None:
    """And made again where its folder is deleted; what was made of it stands, since the result is equal."""
    arguments = ("flywheel", "--config", fake.file)
    assert remit(*arguments)[0] == 0
    entry = fake.overview()["round-0/train"]
    (fake.out / entry["result"] / "config.json").write_text("{}")
    code, _, error = remit(*arguments)
    assert code == 1
    assert re.search(
        r"stage round-0/train: its result was changed since it was made: \S+/model/config.json has other content; put it "
        r"back, or delete \S+/stages/round-0-train-\w+, and the same command makes it again",
        error,
    )
    code, plan, _ = remit(*arguments, "--dry-run")
    assert planned(plan)["round-0/train"].startswith("refused, its result was changed"), plan
    assert counts(fake) == ONCE
    shutil.rmtree(fake.out / entry["output"])
    assert remit(*arguments)[0] == 0
    assert counts(fake) == ONCE | {"train": 3}
    assert fake.overview()["round-0/train"]["fingerprint"] == entry["fingerprint"]


@pytest.mark.usefixtures("starts_processes")
def test_signal_is_handed_on_and_the_state_survives(fake: FakeLoop) -> None:
    """SIGTERM: a stage of ours ends resumably, a command that does not listen ends; exit code 3 in both cases."""
    arguments = ("flywheel", "--config", fake.file)
    for kind in ("train", "own"):
        gate = fake.hold(kind)
        command = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
        command.until(lambda kind=kind: kind in fake.starts, 600)
        time.sleep(0.2)
        command.signal(signal.SIGTERM)
        assert command.finish(600) == 3, command.errors
        assert "stopped by SIGTERM; the same command again goes on" in command.last_error
        gate.unlink()
    command = Command(fake.folder, *arguments, private=True, FAKE=str(fake.folder))
    assert command.finish(600) == 0, command.errors
    log = fake.out / fake.overview()["round-0/own"]["log"]
    assert log.read_text().split()[-1] == "2"  # lines in its state: that of the attempt before is there
    assert not list((fake.out / "state").iterdir())


def test_words_of_commands_stay_as_they_are_written(fake: FakeLoop) -> None:
    """Plain YAML reads 12:00:00 as 43200, 010 as 8, 1.10 as 1.1 and 2026-01-02 as a date: Slurm would wait a month."""
    words = ["echo", "--time", "12:00:00", "010", "1.10", "1e3", "0x1F", "2026-01-02", "a b"]
    file = fake.write()
    plain = {key: value for key, value in fake.values.items() if key not in ("posttrain", "launch")}
    line = ", ".join(words)
    file.write_text(
        f"{yaml.safe_dump(plain)}launch:\n  train: [{line}]\nposttrain:\n  - name: own\n    command:\n"
        + "".join(f"      - {word}\n" for word in words)
    )
    config = read_config(file)
    assert config.launch["train"] == tuple(words)
    assert config.posttrain[0].command == tuple(words)


@pytest.mark.usefixtures("starts_processes")
def test_a_command_that_leaves_with_0_when_told_to_end_is_not_done(fake: FakeLoop, remit: Remit) -> None:
    """The usual handler: save what there is and leave well. Its half-trained model must not be taken for the result."""
    (fake.folder / "own.sh").write_text(
        'if test -e "$REMIT_STATE/half"; then cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; exit; fi\n'
        'touch "$REMIT_STATE/half"; trap \'cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; exit 0\' TERM\n'
        f"touch {fake.folder}/up; while true; do sleep 0.1; done"
    )
    fake.values["posttrain"] = [{"command": ["bash", str(fake.folder / "own.sh")], "name": "own"}]
    fake.values |= {"rounds": 0, "evaluate": None}
    fake.write()
    command = Command(fake.folder, "flywheel", "--config", fake.file, private=True, FAKE=str(fake.folder))
    command.until((fake.folder / "up").exists, 600)
    command.signal(signal.SIGTERM)
    assert command.finish(600) == 3, command.errors
    assert fake.overview()["round-0/own"]["state"] != "done"
    code, plan, error = remit("flywheel", "--config", fake.file, "--dry-run")
    assert code == 0, error
    assert re.search(r"round-0/own +goes on", plan), plan
    code, _, error = remit("flywheel", "--config", fake.file)
    assert code == 0, error
    assert fake.overview()["round-0/own"]["attempts"] == 2


@pytest.mark.usefixtures("starts_processes")
def test_two_drivers(fake: FakeLoop, remit: Remit) -> None:
    gate = fake.hold("train")
    first = Command(fake.folder, "flywheel", "--config", fake.file, private=True, FAKE=str(fake.folder))
    first.until(lambda: "train" in fake.starts, 600)
    code, _, error = remit("flywheel", "--config", fake.file)
    assert code == 1
    assert f"another driver writes to this folder: host {socket.gethostname()}, pid {first.pid}, since" in error
    assert remit("flywheel", "--config", fake.file, "--dry-run")[0] == 0
    gate.unlink()
    assert first.finish(600) == 0, first.errors
    assert counts(fake) == ONCE


@pytest.mark.usefixtures("starts_processes")
def test_failing_stage_shows_its_log(fake: FakeLoop, remit: Remit) -> None:
    (fake.folder / "own.sh").write_text("echo first line; echo out of luck >&2; exit 9")
    code, _, error = remit("flywheel", "--config", fake.file)
    assert code == 1
    lines = error.strip().splitlines()
    assert "remit flywheel: error: stage round-0/own failed with exit code 9: out of luck (log: " in lines[-1]
    assert "  | first line" in error
    assert "Traceback" not in error
    assert counts(fake) == {"pack": 1, "train": 1, "own": 0, "score": 0, "eval": 0}


@pytest.mark.usefixtures("starts_processes")
def test_stage_that_stops_unasked_shows_its_log(fake: FakeLoop, remit: Remit) -> None:
    (fake.folder / "own.sh").write_text("echo first line; echo no machine is free >&2; exit 3")
    code, _, error = remit("flywheel", "--config", fake.file)
    assert code == 3
    assert error.index("  | first line") < error.index("  | no machine is free") < error.index("ended with exit code 3")
    assert "round-0/own: ended with exit code 3, stopped and can go on, expected 0 since nothing here" in error
    assert str(next((fake.out / "logs").glob("round-0-own-*.log"))) in error


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def other_tokenizer(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(value))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def single_beside_shards(folder: Path) -> None:
    """Shards of the result with their index, and the one file of the model that it was made of."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_embeddings(folder: Path) -> None:
    """A whole model that transformers loads, without the last token."""
    edit_config(folder, vocab_size=520)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda w: w.update({name: w[name][:520].clone() for name in tables if name in w}))


NORM = "model.norm.weight"
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json (it has: "),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors weights"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing, expected the tokenizer beside"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: damaged"),
    (other_tokenizer, "its tokenizer is not that of the model it was made of (id 20 is "),
    (lambda folder: (folder / "modeling.py").touch(), "Python code in a model folder"),
    (lambda folder: edit_config(folder, model_type="nonesuch"), "transformers cannot make a model of it"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: edit_config(folder, hidden_size=128), "has shape (521, 64), expected (521, 128)"),
    (cut, "model.safetensors: cannot be read"),
    (single_beside_shards, "has model.safetensors, expected no weights beside model-00001-of-00001.safetensors"),
    (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "x.safetensors"),
        "has x.safetensors, expected no",
    ),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors"),
        "has x.safetensors, expected no weights beside model.safetensors",
    ),
    (lambda folder: edit_config(folder, num_hidden_layers=1, layer_types=None), "its weights hold model.layers.1."),
    (fewer_embeddings, "its embedding has 520 rows, expected at least the 521 of the model"),
    (lambda folder: rewrite(folder, lambda w: w.pop(NORM)), f"its weights have no {NORM}"),
    (lambda folder: rewrite(folder, lambda w: w[NORM].fill_(float("nan"))), f"{NORM} has values that are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_broken_models_are_refused(tmp_path: Path, base: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    check_model(folder, {"model": base})
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(folder, {"model": base})


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "SmolLM3"])
def test_whole_models_are_taken(tmp_path: Path, base: Path, tokenizer_folder: Path, family: str) -> None:
    """Also with tied weights, in several files, in half precision."""
    import transformers

    folder = make_model(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    check_model(folder, {"model": base})
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"transformers cannot make a model of it .*model-0000"):
        check_model(folder, {"model": base})


@pytest.mark.usefixtures("starts_processes")
def test_broken_model_of_an_own_command_is_refused_by_name(fake: FakeLoop, remit: Remit) -> None:
    (fake.folder / "own.sh").write_text('cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"; echo "{}" > "$REMIT_OUTPUT/config.json"')
    code, _, error = remit("flywheel", "--config", fake.file)
    assert code == 1
    line = error.strip().splitlines()[-1]
    assert "stage round-0/own: its command ended well, but its result is refused" in line
    assert "transformers cannot make a model of it" in line
    assert "round-0/own" not in [name for name, entry in fake.overview().items() if entry["state"] == "done"]
    (fake.folder / "own.sh").write_text('cp "$REMIT_MODEL"/* "$REMIT_OUTPUT"')
    assert remit("flywheel", "--config", fake.file)[0] == 0
    assert counts(fake)["train"] == 2


@pytest.mark.usefixtures("starts_processes")
def test_words_reach_an_own_command_as_they_are_written(
    fake: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that happen to name a file: their content decides whether the command runs again."""
    monkeypatch.chdir(fake.folder)
    for name in ("6", "text.txt"):
        Path(name).write_text(name)
    script = 'echo "$@" >> said; ' + (fake.folder / "own.sh").read_text()
    Path("own.sh").write_text(script)
    fake.values["posttrain"] = [{"command": ["bash", "own.sh", "prompts.txt", "6", "--text=text.txt"], "name": "own"}]
    fake.values.pop("evaluate")
    for content in ("a", "b", "b"):
        Path("text.txt").write_text(content)
        assert remit("flywheel", "--config", fake.write())[0] == 0
    # once for each content in round 0 and in round 1
    assert Path("said").read_text().splitlines() == ["prompts.txt 6 --text=text.txt"] * 4


def test_what_training_would_refuse_is_refused_before_packing(fake: FakeLoop, remit: Remit, tmp_path: Path) -> None:
    def refused(**values: object) -> str:
        before = dict(fake.values)
        fake.values |= values
        code, _, error = remit("flywheel", "--config", fake.write(), "--dry-run")
        fake.values = before
        assert code == 2, error
        return " ".join(error.split())

    positions = json.loads((Path(fake.values["base"]) / "config.json").read_text())["max_position_embeddings"]
    message = f"seq_len is {positions + 1}, expected at most {positions}, the max_position_embeddings of base "
    assert message in refused(seq_len=positions + 1)
    other = shutil.copytree(fake.values["base"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for key in ("tokenizer", "reference"):
        message = refused(**{key: str(other)})
        assert any(f"is {token!r} in the rows" in message for token in (first, second))
        assert "expected the same in base, reference and tokenizer" in message
    assert refused(out=str(fake.folder / "corpus.jsonl")).endswith(
        "is a file, expected a folder, or a path where none is yet"
    )
