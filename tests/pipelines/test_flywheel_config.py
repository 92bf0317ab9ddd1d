"""The file of remit flywheel: what it may say, what is refused, and the stages and command lines that it becomes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from looping import FakeLoop

from pipelines.cli import parse
from pipelines.evaluation.settings import EvalConfig
from pipelines.flywheel.config import DECIDED, FAST, FILES, fast_options, read_config
from pipelines.flywheel.loop import make_loop
from pipelines.flywheel.stages import Given, Stage
from pipelines.posttrain.settings import DpoConfig, RlConfig, SftConfig
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.setup import NOT_SETTINGS as RMT_NOT_SETTINGS
from pipelines.terminal import BadUsage
from scorer.config import PackConfig, ScoreConfig
from scorer.sources import find_corpus
from trainer.config import TrainConfig
from trainer.run_folder import NOT_SETTINGS

Remit = Callable[..., tuple[int, str, str]]


def test_each_round_starts_from_the_base_and_scores_with_the_round_before(fake_loop: FakeLoop) -> None:
    fake_loop.values |= {"rounds": 2, "evaluate": None}
    loop = make_loop(read_config(fake_loop.write()))
    stages = {stage.name: stage for stage in loop.stages}
    base = Path(fake_loop.values["base"])
    for number in range(3):
        assert stages[f"round-{number}/train"].inputs["model"].path == str(base)
        assert stages[f"round-{number}/own"].inputs["model"] is stages[f"round-{number}/train"]
    for number in (1, 2):
        assert stages[f"round-{number}/score"].inputs["model"] is stages[f"round-{number - 1}/own"]
        assert stages[f"round-{number}/score"].inputs["shards"] is stages["pack"]
        assert stages[f"round-{number}/train"].inputs["shards"] is stages[f"round-{number}/score"]
    assert stages["round-0/train"].inputs["shards"] is stages["pack"]


def test_a_reference_that_exists_takes_the_place_of_round_0(fake_loop: FakeLoop, tmp_path: Path) -> None:
    shutil.copytree(fake_loop.values["base"], tmp_path / "rl")
    fake_loop.values |= {"reference": str(tmp_path / "rl"), "evaluate": None}
    loop = make_loop(read_config(fake_loop.write()))
    assert [stage.name for stage in loop.stages] == ["pack", "round-1/score", "round-1/train", "round-1/own"]
    assert loop.stages[1].inputs["model"].path == str(tmp_path / "rl")
    fake_loop.values["rounds"] = 0
    with pytest.raises(BadUsage, match="rounds is 0, expected at least 1 with a reference"):
        read_config(fake_loop.write())


def test_rmt_takes_the_place_of_train_from_round_1_on(fake_loop: FakeLoop) -> None:
    corpus = fake_loop.values["corpus"][0]
    options = {"max_steps": 9, "thresholds": [0.25, 0.5, 1], "budget": False, "num_engines": 2, "engine_memory": 0.3}
    fake_loop.values |= {"rounds": 2, "evaluate": None, "rmt": options, "heldout": corpus}
    stages = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}
    assert list(stages) == [
        "pack", "pack-heldout", "round-0/train", "round-0/own",
        *(f"round-{n}/{name}" for n in (1, 2) for name in ("score", "score-heldout", "rmt", "own")),
    ]  # fmt: skip
    assert parsed(stages["round-0/train"]).objective == "ntp"
    for number in (1, 2):
        rmt, reference = stages[f"round-{number}/rmt"], stages[f"round-{number - 1}/own"]
        assert rmt.inputs["model"].path == str(fake_loop.values["base"])
        for name, source in (("shards", "score"), ("eval_shards", "score-heldout")):
            scored = stages[f"round-{number}/{source}"]
            assert rmt.inputs[name] is scored
            assert scored.inputs["model"] is reference
            assert parsed(scored).entropy
        assert stages[f"round-{number}/score"].inputs["shards"] is stages["pack"]
        assert stages[f"round-{number}/score-heldout"].inputs["shards"] is stages["pack-heldout"]
        config = parsed(rmt)
        assert (config.reference, config.seed, config.max_steps, config.budget) == ("rl", 7, 9, "off")
        assert (config.thresholds, config.num_engines, config.eval_shards) == ((0.25, 0.5, 1.0), 2, "<eval_shards>")
        # two engines sample other tokens than one does
        assert ("--engine-memory" in rmt.more, "--num-engines" in rmt.more) == (True, False)
        assert (rmt.resumes, rmt.result) == (True, "model")
        assert stages[f"round-{number}/own"].inputs["model"] is rmt


def parsed(stage: Stage) -> object:
    """What remit's own parser makes of a stage's words, <name> standing for paths."""
    words = [str(word) for word in (*stage.command, *stage.more)]
    assert words[0] == "pipelines.cli"
    return parse(words[1:])


def inputs(stage: Stage, prefix: str) -> list[str]:
    return [source.path for name, source in stage.inputs.items() if name.startswith(prefix)]


def test_commands_are_those_of_the_command_line(fake_loop: FakeLoop, tmp_path: Path) -> None:
    """Every stage's words go through remit's own parser, and come out as the file's values."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    fake_loop.values |= {
        "corpus": [str(tmp_path / "*.parquet"), "s3://bucket/x.jsonl", "user/dataset:part"],
        "heldout": str(tmp_path / "a.parquet"),
        "launch": {"train": ["env", "torchrun", "--nproc-per-node", 8, "-m"]},
        "pack": {"tokens-per-shard": 640, "num_workers": 2},
        "score": {"context": "document", "top_k": 8, "canary": False, "num_engines": 3},
        "train": {
            "objective": "kd",
            "kd_weight": 0.25,
            "compile": "off",
            "beta1": 0.5,
            "micro_batch_size": 2,
        },
        "evaluate": {"suite": "paper", "allow_code_execution": True},
    }
    stages = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}
    pack = parsed(stages["pack"])
    assert pack.corpus == [str(tmp_path / "*.parquet"), "s3://bucket/x.jsonl", "user/dataset:part"]
    assert (pack.seq_len, pack.tokens_per_shard, pack.num_workers, pack.out) == (64, 640, 2, "<out>")
    assert inputs(stages["pack"], "corpus/") == [str(tmp_path / "*.parquet")]
    assert stages["pack"].settings["elsewhere"] == ["s3://bucket/x.jsonl", "user/dataset:part"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.jsonl").write_text('{"text": "a"}\n')
    fake_loop.values["corpus"] = [str(tmp_path / "own::train"), str(tmp_path / "own:de")]
    local = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}["pack"]
    assert parsed(local).corpus == inputs(local, "corpus/") == fake_loop.values["corpus"]
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
    fake_loop.values["train"] = {"epsilon": math.inf}  # .inf in YAML
    unclipped = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}["round-1/train"]
    assert parsed(unclipped).epsilon == math.inf
    evaluate = parsed(stages["round-1/evaluate-posttrained"])
    assert (evaluate.suite, evaluate.allow_code_execution) == ("paper", True)


def test_options_are_what_the_loop_takes_them_for() -> None:
    """A resume allows all that is not in the key; and no command has lost or renamed an option that is listed here."""
    settings = (PackConfig, ScoreConfig, TrainConfig, EvalConfig, SftConfig, DpoConfig, RlConfig, RmtConfig)
    names = [set(kind.__dataclass_fields__) for kind in settings]
    assert FAST & names[2] <= set(NOT_SETTINGS)
    assert set(fast_options("rmt", dict.fromkeys(names[7]))) <= set(RMT_NOT_SETTINGS)
    for kind in names[4:7]:
        assert FAST & kind == {"checkpoint_every", "micro_batch_size", "gradient_checkpointing"}
    assert not FAST & names[3]
    assert set.union(*names) >= FAST | FILES | DECIDED.keys()


BAD = [
    ({"rouns": 2}, "rouns is no key; did you mean rounds?"),
    ({"zzz": 2}, "zzz is no key; expected one of base, corpus, out, posttrain"),
    ({"base": None}, "base is missing, expected: Base model that"),
    ({"corpus": None}, "corpus is missing"),
    ({"posttrain": None}, "posttrain is missing, expected: Stages of post-training, each from the model of the one before; [] scores with"),
    ({"base": 3}, "base 3: no such folder"),
    ({"base": "./none"}, "base ./none: no such folder"),
    ({"corpus": []}, "corpus is [], expected a list of words"),
    ({"corpus": [["a"]]}, "corpus is [['a']], expected a list of words, of which number 1 is ['a']"),
    ({"corpus": "none.jsonl"}, "corpus none.jsonl: no such file; check --corpus"),
    ({"corpus": "none/*.jsonl"}, "corpus none/*.jsonl: no file matches this pattern"),
    ({"heldout": "none.jsonl"}, "heldout none.jsonl: no such file"),
    ({"rounds": -1}, "rounds is '-1', expected greater than or equal to 0"),
    ({"rounds": True}, "rounds is 'true', expected a valid integer"),
    ({"rounds": 1.5}, "rounds is '1.5', expected a valid integer"),
    ({"seq_len": "4k"}, "seq_len is '4k', expected a valid integer"),
    ({"seed": -3}, "seed is '-3', expected greater than or equal to 0"),
    ({"pack": 3}, "pack is '3', expected a mapping of options"),
    ({"pack": {"seq_len": 3}}, "pack: seq_len cannot be given here: give seq_len at the top"),
    ({"pack": {"tokens_per_shard": 10}}, "pack: --tokens-per-shard is 10, expected at least"),
    ({"score": {"contxt": "document"}}, "score: contxt is no key; did you mean context?"),
    ({"score": {"context": "doc"}}, "score.context is 'doc', expected 'packed' or 'document'"),
    ({"score": {"name": "x"}}, "score: name cannot be given here: the loop decides it"),
    ({"score": {"top_k": -1}}, "score: --top-k is -1, expected 0 (store none) or more"),
    ({"train": {"max_steps": "many"}}, "train.max_steps is 'many', expected a valid integer"),
    ({"train": {"beta1": "a"}}, "train.beta1 is 'a', expected a valid number"),
    ({"train": {"learning_rate": -1}}, "train: --learning-rate is -1.0, expected 0 or more"),
    ({"train": {"seed": {"a": 1}}}, "train: seed cannot be given here: give seed at the top"),
    ({"train": {"epsilon": {"a": 1}}}, "train.epsilon is {'a': '1'}, expected a valid number"),
    ({"train": {"epsilon": [0.1, 0.2]}}, "train.epsilon is ['0.1', '0.2'], expected a valid number"),
    ({"train": {"objective": "ntp"}}, "train.objective is 'ntp', expected one with a reference"),
    ({"train": {"objective": "kd", "epsilon": 0.3}}, "--epsilon belongs to --objective remit"),
    ({"train": {"objective": "kd"}}, "score.top_k is 0, expected at least 1, for instance 32, since train.objective is kd"),
    (
        {"train": {"objective": "rkl"}, "score": {"top_k": 8, "entropy": True, "top_k_below_entropy": "quantile:0.2"}},
        "score.top_k_below_entropy is 'quantile:0.2', expected none, since train.objective is rkl",
    ),
    ({"train": {"objective": "sampled"}}, "score.sample_k is 0, expected at least 1, for instance 25, since train.objective is"),
    ({"train": {"objective": "entropy"}}, "score.entropy is False, expected true, since train.objective is entropy"),
    ({"train": {"context": "document"}}, "train.context is 'document', expected packed, as score.context is, or auto"),
    (
        {"train": {"context": "packed"}, "score": {"context": "document"}},
        "train.context is 'packed', expected document, as score.context is, or auto",
    ),
    ({"score": {"engine": "fake"}}, "score.engine is 'fake', expected vllm; the fake engine's numbers are a hash"),
    ({"train": {"eval_shards": "none"}}, "train.eval_shards is 'none', expected a folder that is there"),
    ({"evaluate": {"tasks": "x", "task_dir": "none"}}, "evaluate.task_dir is 'none', expected a folder that is there"),
    ({"evaluate": {"tasks": "x", "task_dir": __file__}}, "expected a folder that is there"),
    ({"evaluate": {"tasks": "x", "compare": ["a"]}}, "evaluate: compare cannot be given here: use remit eval --compare afterwards"),
    ({"rmt": {"max_stepps": 3}}, "rmt: max_stepps is no key; did you mean max_steps?"),
    ({"rmt": {"seed": 3}}, "rmt: seed cannot be given here: give seed at the top"),
    ({"rmt": {"thresholds": [1, 0.5, 2]}}, "rmt: --thresholds are 1 0.5 2, expected three rising numbers"),
    ({"rmt": {"reward": "gain", "baseline": "base"}}, "rmt.reward is 'gain', expected match or prefix"),
    ({"rmt": {}, "rounds": 0}, "rounds is 0, expected at least 1 with rmt"),
    ({"rmt": {}, "score": {"entropy": False}}, "score.entropy is False, expected nothing or true with rmt"),
    ({"rmt": {}, "train": {"objective": "rho1"}}, "train.objective is 'rho1' beside rmt, expected none"),
    ({"rmt": {}, "reference": "x"}, "train is given (max_steps) with rmt and a reference, expected none"),
    ({"rmt": {}, "posttrain": [{"command": ["true"], "name": "rmt"}]}, "the names are ['rmt'], expected different ones"),
    ({"base": " "}, "base is ' ', expected a text that is not empty"),
    ({"out": ""}, "out is '', expected a text that is not empty"),
    ({"launch": {"trian": "x"}}, "launch: trian is no key; did you mean train?"),
    ({"launch": {"train": {}}}, "launch.train is {}, expected a list of words"),
    ({"evaluate": {"suite": "paper", "tasks": "x"}}, "--suite and --tasks are both given"),
    ({"posttrain": "rl"}, "posttrain is 'rl', expected a list such as [sft: {data: sft.jsonl}"),
    ({"posttrain": ["rl"]}, "posttrain[1] is 'rl', expected a mapping with some of sft, dpo"),
    ({"posttrain": [{"comand": ["x"]}]}, "posttrain[1]: comand is no key; did you mean command?"),
    ({"posttrain": [{"name": "x"}]}, "expected exactly one of sft, dpo, rl, command"),
    ({"posttrain": [{"command": []}]}, "posttrain[1].command is [], expected a list of words"),
    ({"posttrain": [{"command": ["python", "-c", None]}]}, "expected a list of words, of which number 3 is None; null needs quotes"),
    ({"posttrain": [{"command": ["true"], "name": "train"}]}, "the names are ['train'], expected different ones, none of score, train"),
    ({"posttrain": [{"command": ["true"], "name": "a/b"}]}, "posttrain[1].name is 'a/b', expected letters, digits, - and _"),
    ({"posttrain": [{"command": ["true"], "name": "--"}]}, "posttrain[1].name is '--', expected letters"),
    ({"posttrain": [{"sft": {}, "inputs": ["a"]}]}, "posttrain[1]: inputs is no key beside sft, expected it beside rl or command"),
    ({"posttrain": [{"command": ["true"]}, {"command": ["true"]}]}, "the names are ['command', 'command'], expected different ones"),
    ({"posttrain": [{"command": ["no-such-tool"]}]}, "posttrain[1].command is 'no-such-tool', expected a program that can be started"),
    ({"posttrain": [{"command": "python rl.py --steps 3"}]}, "is 'python rl.py --steps 3', expected a list of words, here [python, rl.py, --steps, 3]"),
    ({"posttrain": [{"command": ["python3", "no-such.py"]}]}, "posttrain[1].command is 'no-such.py', expected a script that is there"),
    ({"launch": {"train": ["no-such-tool", "-m"]}}, "launch.train is 'no-such-tool', expected a program that can be started"),
    ({"posttrain": [{"command": ["true"], "inputs": ["none"]}]}, "posttrain[1].inputs is 'none', expected a file or folder that"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_files(fake_loop: FakeLoop, remit: Remit, changes: dict, message: str) -> None:
    fake_loop.values |= changes
    code, _, error = remit("flywheel", "--config", fake_loop.write())
    assert (code, fake_loop.starts, fake_loop.out.exists()) == (2, [], False), error
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
    fake_loop: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
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
    fake_loop.values["corpus"] = [word]
    try:
        stage = make_loop(read_config(fake_loop.write())).stages[0]
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


def test_what_is_not_installed_is_found_at_once(
    fake_loop: FakeLoop, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.flywheel.loop.find_spec", lambda name: None)
    del fake_loop.values["launch"]["evaluate"]
    code, _, error = remit("flywheel", "--config", fake_loop.write())
    assert (code, fake_loop.starts) == (1, [])
    assert "evaluate needs lm_eval, which is not installed; in your checkout of remit: pip install '.[eval]'" in error


def test_all_that_a_folder_of_the_user_holds_counts(
    fake_loop: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs, base and task_dir, also files that begin with _ or a dot; of task_dir the data that its tasks name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fake_loop.values["base"], tmp_path / "base")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "_params.json").write_text("1")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "_defaults.yaml").write_text("dataset_path: questions")
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "q.json").write_text("1")
    (tmp_path / "conf.yaml").write_text("1")
    fake_loop.values["base"] = str(tmp_path / "base")
    fake_loop.values["posttrain"] = [
        {"command": ["true", "--config=conf.yaml", "--dir=extra", "--x=y"], "inputs": ["extra"]}
    ]
    fake_loop.values["evaluate"] = {"tasks": "capitals", "task_dir": str(tmp_path / "tasks")}
    stages = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}
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


@pytest.mark.parametrize(
    ("reward", "source"), [("single:f", "single.py"), ("several.deep:f", "several"), ("none:f", None)]
)
def test_source_of_a_reward(
    fake_loop: FakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str, source: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("single.py", "several/__init__.py", "several/deep.py", "several/notes.txt", "more.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "rl.jsonl").write_text('{"prompt": "a"}\n')
    fake_loop.values["posttrain"] = [{"rl": {"data": "rl.jsonl", "reward": reward}, "inputs": ["more.txt"]}]
    stages = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}
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


def test_bad_options(fake_loop: FakeLoop, remit: Remit) -> None:
    assert remit("flywheel")[0] == 2
    assert remit("flywheel", "--config", fake_loop.file, "--jobs", 2)[0] == 2
    assert remit("flywheel", "--config", fake_loop.file, "--out", fake_loop.folder / "other", "--dry-run")[0] == 0


def test_post_training_of_ours(
    fake_loop: FakeLoop, remit: Remit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options and its data are checked before anything runs, and its command line is what it parses."""
    monkeypatch.chdir(tmp_path)
    examples = {"sft": {"prompt": "a", "completion": "b"}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    examples["rl"] = {"prompt": "a", "answer": "b"}
    for kind, example in examples.items():
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps(example) + "\n")
    (tmp_path / "rewards.py").write_text("")
    fake_loop.values["posttrain"] = [
        {"sft": {"data": "sft.jsonl", "max_steps": 5, "checkpoint_every": 2}},
        {"dpo": {"data": "dpo.jsonl", "beta": 0.2}},
        {"rl": {"data": "rl.jsonl", "reward": "rewards:mine"}, "name": "rl-long"},
    ]
    stages = {stage.name: stage for stage in make_loop(read_config(fake_loop.write())).stages}
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
        ({"sft": {}}, "posttrain[1].sft.data is missing; remit sft needs it"),
        ({"sft": {"data": "none"}}, "posttrain[1].sft.data is 'none', expected a file or folder that is there"),
        ({"sft": {"data": "rl.jsonl"}}, "posttrain[1].sft: --data rl.jsonl line 1: has no 'completion'"),
        ({"rl": {"data": "sft.jsonl"}}, "has no 'answer'"),
        (
            {"rl": {"data": "rl.jsonl", "num_generations": 1}},
            "posttrain[1].rl: --num-generations is 1, expected at least 2",
        ),
        ({"dpo": {"data": "dpo.jsonl", "beta": "x"}}, "posttrain[1].dpo.beta is 'x', expected a valid number"),
        ({"dpo": {"data": "dpo.jsonl", "betta": 1}}, "posttrain[1].dpo: betta is no key; did you mean beta?"),
    ):
        fake_loop.values["posttrain"] = [entry]
        code, _, error = remit("flywheel", "--config", fake_loop.write())
        assert (code, message in error) == (2, True), error


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "on"), ("yes", "on"), ("false", "off"), ("No", "off"), ("on", "on")]
)
def test_values_that_yaml_spells_otherwise(fake_loop: FakeLoop, written: str, meant: str) -> None:
    """And an empty list of inputs; a word of a command stays as it is."""
    fake_loop.values["posttrain"] = [{"command": ["true", math.inf], "inputs": []}]
    fake_loop.values.pop("train")
    file = fake_loop.write()
    file.write_text(f"{file.read_text()}\ntrain: {{compile: {written}, epsilon: +.inf}}\n")
    config = read_config(file)
    assert config.train == {"compile": meant, "epsilon": math.inf}
    assert (config.posttrain[0].command, config.posttrain[0].inputs) == (["true", ".inf"], [])


def test_what_cannot_be_read_is_refused_before_anything_runs(fake_loop: FakeLoop, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    fake_loop.values["train"] = {"eval_shards": str(tmp_path / "shards")}
    with pytest.raises(BadUsage, match=r"shards: is empty, expected files"):
        make_loop(read_config(fake_loop.write()))


def test_words_of_commands_stay_as_they_are_written(fake_loop: FakeLoop) -> None:
    """Plain YAML reads 12:00:00 as 43200, 010 as 8, 1.10 as 1.1 and 2026-01-02 as a date: Slurm would wait a month."""
    words = ["echo", "--time", "12:00:00", "010", "1.10", "1e3", "0x1F", "2026-01-02", "a b"]
    file = fake_loop.write()
    plain = {key: value for key, value in fake_loop.values.items() if key not in ("posttrain", "launch")}
    line = ", ".join(words)
    file.write_text(
        f"{yaml.safe_dump(plain)}launch:\n  train: [{line}]\nposttrain:\n  - name: own\n    command:\n"
        + "".join(f"      - {word}\n" for word in words)
    )
    config = read_config(file)
    assert config.launch["train"] == words
    assert config.posttrain[0].command == words


def test_what_training_would_refuse_is_refused_before_packing(
    fake_loop: FakeLoop, remit: Remit, tmp_path: Path
) -> None:
    def refused(**values: object) -> str:
        before = dict(fake_loop.values)
        fake_loop.values |= values
        code, _, error = remit("flywheel", "--config", fake_loop.write(), "--dry-run")
        fake_loop.values = before
        assert code == 2, error
        return " ".join(error.split())

    positions = json.loads((Path(fake_loop.values["base"]) / "config.json").read_text())["max_position_embeddings"]
    message = f"seq_len is {positions + 1}, expected at most {positions}, the max_position_embeddings of base "
    assert message in refused(seq_len=positions + 1)
    other = shutil.copytree(fake_loop.values["base"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for key in ("tokenizer", "reference"):
        message = refused(**{key: str(other)})
        assert any(f"is {token!r} in the rows" in message for token in (first, second))
        assert "expected the same in base, reference and tokenizer" in message
    assert refused(out=str(fake_loop.folder / "corpus.jsonl")).endswith(
        "is a file, expected a folder, or a path where none is yet"
    )
