"""Post-training: TRL's losses against float64 of our own, rewards, kills, refusals, the exported folder."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EOS, make_model, make_tokenizer
from safetensors.torch import load_file
from test_report import panels

from pipelines.cli import main
from pipelines.posttrain.dpo import dpo
from pipelines.posttrain.rewards import answer_reward, final_answer, load_reward
from pipelines.posttrain.rl import rl
from pipelines.posttrain.run import post_train
from pipelines.posttrain.settings import DpoConfig, RlConfig, SftConfig
from pipelines.posttrain.sft import sft
from pipelines.terminal import DONE, STOPPED
from shards.fingerprint import parse_tokenizer_json, tokenizer_fingerprint

PAIRS = [
    ("What is 1 + 2?\n", "Answer: 3", "Answer: 12"),
    ("What is 10 + 20 + 30 + 40?\n", "10 + 20 = 30, and more.\nAnswer: 100", "Answer: 7"),
    ("x", "Ünï 😀", "y"),
    ("Say nothing. ", "", "something"),
]
VOCABULARY = 300


def never() -> bool:
    return False


def write(path: Path, examples: list[dict]) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose tokenizer has no token for padding."""
    texts = [text for pair in PAIRS[:2] for text in pair] * 9
    folder = make_tokenizer(tmp_path_factory.mktemp("posttrain") / "start", texts, VOCABULARY)
    return make_model(folder, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def speaker(start: Path) -> Path:
    """The model, tuned to say "Answer: " and one of four digits, each as likely, and to end there."""
    out = start.parent / "speaker"
    examples = [{"prompt": "Which digit?\n", "completion": f"Answer: {digit}"} for digit in range(4)]
    config = SftConfig(
        model=str(start),
        data=write(start.parent / "digits.jsonl", examples),
        out=out,
        max_steps=60,
        batch_size=4,
        learning_rate=3e-3,
        checkpoint_every=0,
    )
    assert sft(config, never) == DONE
    assert metrics(out)[-1]["loss"] < 1  # ln 4 shared by the digit, what surrounds it, and the end
    return out / "model"


def completion_logprobs(folder: Path, prompt: str, completion: str) -> torch.Tensor:
    """Log-probs in float64 of the tokens of `completion` and of the end, one row at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    context = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id])
    assert ids[: len(context)].tolist() == context
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[len(context) - 1 :, 0]


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("padding", [None, "!"])
def test_sft_loss_is_the_mean_over_completions_and_ends(
    tmp_path: Path, start: Path, micro: int | None, padding: str | None
) -> None:
    model = start
    if padding:
        model = tmp_path / "padded"
        transformers.AutoModelForCausalLM.from_pretrained(start).save_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(start)
        tokenizer.pad_token = padding
        tokenizer.save_pretrained(model)
    data = write(tmp_path / "data.jsonl", [{"prompt": prompt, "completion": good} for prompt, good, _ in PAIRS])
    config = SftConfig(
        model=str(model),
        data=data,
        out=tmp_path / "out",
        max_steps=1,
        batch_size=4,
        micro_batch_size=micro,
        checkpoint_every=0,
    )
    assert sft(config, never) == DONE
    losses = -torch.cat([completion_logprobs(start, prompt, good) for prompt, good, _ in PAIRS])
    assert metrics(config.out)[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_small_steps_from_bfloat16_are_said_to_be_lost_or_kept(
    tmp_path: Path, start: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "start"
    transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(start / name, model / name)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    data = write(tmp_path / "data.jsonl", [{"prompt": prompt, "completion": good} for prompt, good, _ in PAIRS])
    config = SftConfig(
        model=str(model),
        data=data,
        out=tmp_path / "base",
        max_steps=1,
        batch_size=2,
        learning_rate=1e-6,
        checkpoint_every=0,
    )
    assert sft(config, never) == DONE
    assert re.search(r"rounding returned \d+% of the updated weights to the base's values", capfd.readouterr().err)
    assert sft(replace(config, out=tmp_path / "float32", export_dtype="float32"), never) == DONE
    assert "rounding returned" not in capfd.readouterr().err
    before = load_file(model / "model.safetensors")
    for name, dtype in (("base", torch.bfloat16), ("float32", torch.float32)):
        after = load_file(tmp_path / name / "model/model.safetensors")
        assert {name: tensor.dtype for name, tensor in after.items()} == dict.fromkeys(before, dtype)
        assert (tmp_path / name / "model/chat_template.jinja").read_text() == "{{ messages }}"
    assert any((after[name] != before[name].float()).any() for name in before)
    with pytest.raises(ValueError, match="--export-dtype is 'float32' there, not set now"):
        sft(replace(config, out=tmp_path / "float32"), never)


def test_dpo_loss(tmp_path: Path, start: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in PAIRS])

    def run(name: str, steps: int) -> Path:
        config = DpoConfig(
            model=str(start),
            data=data,
            out=tmp_path / name,
            max_steps=steps,
            batch_size=4,
            learning_rate=1e-3,
            schedule="constant",
            beta=0.3,
            checkpoint_every=0,
        )
        assert dpo(config, never) == DONE
        return config.out

    moved, longer = run("moved", 1) / "model", run("longer", 2)
    first, second = metrics(longer)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    losses = []
    for prompt, good, bad in PAIRS:
        now, before = (
            completion_logprobs(model, prompt, good).sum() - completion_logprobs(model, prompt, bad).sum()
            for model in (moved, start)
        )
        losses.append(math.log1p(math.exp(-0.3 * (now - before).item())))
    assert second["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert second["loss"] < 0.6


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("3 + 4 = 7.\nAnswer: 7", "7"),
        ("Answer: 7\nAnswer: 8", "8"),
        ("Answer:   -12  \nand on", "-12"),
        ("Answer:\t½ π 😀\r\n", "½ π 😀"),
        ("Answer:", ""),
        ("Answer:\n7", ""),
        ("Answer: 1Answer: 2", "2"),
        ("answer: 7", None),
        ("7", None),
        ("", None),
    ],
)
def test_final_answer(completion: str, expected: str | None) -> None:
    assert final_answer(completion) == expected


def test_answer_reward_compares_character_for_character() -> None:
    completions = ["Answer: 7", "Answer: 7.0", "Answer: -7", "7", "Answer: sieben", "Answer:"]
    assert answer_reward(completions, ["7", "7", "-7", "7", "sieben ", "7"]) == [1, 0, 1, 0, 1, 0]


def rl_config(model: Path, data: Path, out: Path, **changes: object) -> RlConfig:
    settings: dict = {
        "batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "max_steps": 12,
        "checkpoint_every": 0,
    }
    return RlConfig(model=str(model), data=data, out=out, **(settings | changes))


def test_rl_raises_the_reward(tmp_path: Path, speaker: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "Which digit?\n", "answer": "2"}] * 40)
    out = tmp_path / "out"
    assert rl(rl_config(speaker, data, out), never) == DONE
    rewards = [entry["reward"] for entry in metrics(out)]
    assert main_code(["report", "--run", str(out), "--out", str(tmp_path / "page.html")]) == 0
    found = panels(tmp_path / "page.html")
    for title, name in (
        ("Reward", "reward"), ("Correct rate", "reward"), ("Length of the completions", "completions/mean_length"),
        ("Entropy of the policy", "entropy"), ("Gradient norm", "grad_norm"),
    ):  # fmt: skip
        assert found[title][0]["y"] == pytest.approx([entry[name] for entry in metrics(out)], rel=1e-6), title
    assert [entry["step"] for entry in metrics(out)] == list(range(1, 13))
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9
    # the folder is the start's with other weights: greedy decoding by transformers says what was rewarded
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    prompt = tokenizer("Which digit?\n", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(said[0]) == f"Which digit?\nAnswer: 2{EOS}"
    files = [json.loads((folder / "config.json").read_text()) for folder in (speaker, out / "model")]
    assert files[0] == files[1]
    prints = [
        tokenizer_fingerprint(parse_tokenizer_json((folder / "tokenizer.json").read_bytes(), ""))
        for folder in (speaker, out / "model")
    ]
    assert prints[0] == prints[1]
    assert rl(rl_config(speaker, data, out), never) == DONE  # nothing to do
    with pytest.raises(ValueError, match="holds another run"):
        rl(rl_config(speaker, data, out, seed=1), never)


@pytest.mark.parametrize("stage", ["dpo", "rl"])
def test_less_memory_gives_the_same_step(tmp_path: Path, start: Path, speaker: Path, stage: str) -> None:
    examples = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in PAIRS]
    if stage == "rl":
        examples = [{"prompt": f"Which digit?{' ' * index}\n", "answer": str(index)} for index in range(4)]
    data = write(tmp_path / "data.jsonl", examples)
    steps = []
    for name, changes in (("whole", {}), ("parts", {"micro_batch_size": 2, "gradient_checkpointing": True})):
        settings: dict = {"checkpoint_every": 0, "max_steps": 2, "learning_rate": 1e-3, **changes}
        if stage == "rl":
            assert rl(rl_config(speaker, data, tmp_path / name, **settings), never) == DONE
        else:
            settings |= {"model": str(start), "data": data, "out": tmp_path / name, "batch_size": 4}
            assert dpo(DpoConfig(**settings), never) == DONE
        steps.append([[entry[key] for key in ("loss", "grad_norm")] for entry in metrics(tmp_path / name)])
    for one, other in zip(*steps, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert one[1] > 0.01


def test_reward_of_ones_own(tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def digit(completions, colour, log_metric, **_):\n"
        "    log_metric('correct_rate', 0.375)\n"
        "    assert set(colour) == {'red'}\n"
        "    return [float('3' in text) for text in completions]\n"
        "def few(completions, **_):\n    return [1.0]\n"
        "def text(completions, **_):\n    return ['1'] * len(completions)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = write(tmp_path / "data.jsonl", [{"prompt": "Which digit?\n", "colour": "red"}] * 8)
    assert rl(rl_config(speaker, data, tmp_path / "out", reward="own_reward:digit", max_steps=2), never) == DONE
    assert 0 <= metrics(tmp_path / "out")[0]["rewards/digit/mean"] < 0.7
    assert metrics(tmp_path / "out")[0]["correct_rate"] == 0.375
    with open(tmp_path / "own_reward.py", "a") as file:
        file.write("# a reward of another kind\n")
    with pytest.raises(ValueError, match="holds another run: reward_sha256"):
        rl(rl_config(speaker, data, tmp_path / "out", reward="own_reward:digit", max_steps=2), never)
    for name, message in (
        ("own_reward:few", r"returned \[1.0\], expected a list of 2 numbers"),
        ("own_reward:text", "returned '1' for a completion, expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(name)(completions=["a", "b"])
    for name, message in (("own_reward:number", "has no function number"), ("no_such:f", "No module named 'no_such'")):
        with pytest.raises(ValueError, match=message):
            load_reward(name)


def main_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def without_times(out: Path) -> list[dict]:
    return [{name: value for name, value in entry.items() if "time" not in name} for entry in metrics(out)]


def assert_same_run(one: Path, other: Path) -> None:
    assert without_times(one) == without_times(other)
    weights_one, weights_other = weights(one / "model"), weights(other / "model")
    assert all(torch.equal(weights_one[name], weights_other[name]) for name in weights_one)


@pytest.mark.usefixtures("starts_processes")
def test_killed_and_stopped_runs_go_on_as_if_nothing_had_been(tmp_path: Path, speaker: Path) -> None:
    prompts = [{"prompt": f"Which digit?{' ' * index}\n", "answer": str(index % 4)} for index in range(24)]
    data = write(tmp_path / "data.jsonl", prompts)  # an epoch has six steps
    killed = tmp_path / "killed"
    config = rl_config(speaker, data, killed, max_steps=14, checkpoint_every=2)
    assert rl(replace(config, out=tmp_path / "whole"), never) == DONE

    options = [
        *("--model", speaker, "--data", data, "--out", killed, "--batch-size", 32, "--num-generations", 8),
        *("--max-completion-length", 8, "--learning-rate", 1e-3, "--schedule", "constant", "--max-steps", 14),
        *("--checkpoint-every", 2),
    ]
    command = [sys.executable, "-m", "pipelines.cli", "rl", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    log = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(int(folder.parent.name[11:]) for folder in killed.glob("checkpoints/*/complete"))
    assert whole
    assert whole[-1] < 14
    half = killed / "checkpoints" / "checkpoint-13"  # one that was being written
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    def run_to(step: int) -> None:
        """Go on, and be asked to stop at the end of `step`, as by SIGTERM."""
        assert rl(config, lambda: metrics(killed)[-1]["step"] >= step - 1) == STOPPED
        assert metrics(killed)[-1]["step"] == step
        assert not (killed / "model").exists()

    if whole[-1] < 6:
        run_to(6)  # where an epoch ends
    run_to(max(whole[-1] + 1, 9))  # in the middle of one, between two checkpoints
    assert rl(config, never) == DONE
    assert_same_run(killed, tmp_path / "whole")
    assert sorted(os.listdir(killed)) == ["metrics.jsonl", "model", "run.json"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_stopped_runs_go_on_likewise(tmp_path: Path, start: Path, stage: str) -> None:
    examples = [{"prompt": p, "completion": g, "chosen": g, "rejected": b} for p, g, b in [*PAIRS, *PAIRS[:3]]]
    settings: dict = {
        "model": str(start),
        "data": write(tmp_path / "data.jsonl", examples),
        "epochs": 3,
        "batch_size": 2,
    }
    settings |= {"learning_rate": 1e-3, "log_every": 2, "warmup_steps": 3}

    def run(name: str, should_stop: Callable[[], bool] = never) -> int:
        if stage == "sft":
            return sft(SftConfig(**settings, out=tmp_path / name), should_stop)
        return dpo(DpoConfig(**settings, out=tmp_path / name), should_stop)

    assert run("whole") == DONE
    assert [entry["step"] for entry in metrics(tmp_path / "whole")] == [2, 4, 6, 8, 10, 12]
    for step in (2, 4, 6):  # stops come with a line: in an epoch, at the end of one, in the next
        assert run("stopped", lambda: True) == STOPPED
        assert metrics(tmp_path / "stopped")[-1]["step"] == step
    assert run("stopped") == DONE
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_long_examples_are_left_out(tmp_path: Path, start: Path, capfd: pytest.CaptureFixture[str]) -> None:
    examples = [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y" * 63}]
    examples.append({"prompt": "x", "completion": "y" * 62})  # 64 tokens with the end: all of the model's positions
    data = write(tmp_path / "data.jsonl", examples)
    config = SftConfig(model=str(start), data=data, out=tmp_path / "out", max_steps=1, batch_size=2)
    assert sft(config, never) == DONE
    assert "left out: 1 of 3 examples, longer than 64 tokens" in capfd.readouterr().err


@pytest.fixture
def posttrain(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return int(exit_.value.code or 0), capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty, expected JSON lines with prompt, completion"),
        ("\n\n", "is empty"),
        ('{"prompt": "x"}', "line 1: has no 'completion'"),
        (
            '{"prompt": "x", "completion": "y"}\n{"prompt": "x", "completion": 7}',
            "line 2: completion is 7, expected a text",
        ),
        ('{"prompt": "", "completion": "y"}', "prompt is empty"),
        ('["x"]', "line 1: list, expected an object"),
        ("{", "line 1: no JSON"),
        ('{"prompt": "x", "completion": "y", "z": 1}\n{"prompt": "x", "completion": "y"}', "'z' is in some"),
        (
            json.dumps({"prompt": "x", "completion": "y" * 90}),
            "no example is short enough, expected some of at most 64",
        ),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, start: Path, posttrain: Callable, lines: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(lines)
    code, error = posttrain("sft", "--model", start, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    assert code == 1
    assert message in error
    assert error.startswith("remit sft: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sft", "--batch-size", "0"], 2, "--batch-size is 0, expected at least 1"),
        (["sft", "--batch-size", "8", "--micro-batch-size", "3"], 2, "expected a divisor of --batch-size (8)"),
        (["sft", "--checkpoint-every", "5", "--log-every", "2"], 2, "expected a multiple of --log-every (2)"),
        (["sft", "--trainer-arg", "adam_beta2"], 2, "expected KEY=VALUE"),
        (["sft", "--trainer-arg", "output_dir=x"], 2, "is decided by an option of this command"),
        (["sft", "--trainer-arg", "adam_beta3=0.9"], 1, "has no such setting; did you mean adam_beta"),
        (["sft", "--trainer-arg", "neftune_noise_alpha=x", "optim=nonsense"], 1, "nonsense"),
        (["sft", "--max-length", "65"], 1, "expected at most 64, the model's positions"),
        (["sft", "--data", "nowhere.jsonl"], 1, "--data nowhere.jsonl: no such file"),
        (["dpo", "--beta", "0"], 2, "--beta is 0.0, expected a number above 0"),
        (["rl", "--batch-size", "12"], 2, "expected a multiple of --num-generations (8)"),
        (["rl", "--num-generations", "1"], 2, "expected at least 2"),
        (["rl", "--reward", "own"], 2, "expected answer, or module:function"),
        (["rl", "--max-completion-length", "64"], 1, "expected fewer than 64"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(
    tmp_path: Path, start: Path, posttrain: Callable, arguments: list[str], code: int, message: str
) -> None:
    example = {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z", "answer": "y"}
    data = write(tmp_path / "data.jsonl", [example] * 8)
    required = ["--model", start, "--data", data, "--out", tmp_path / "out"]
    found, error = posttrain(arguments[0], *required, *arguments[1:])
    assert found == code, error
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", error).split())  # bad usage is in a box
    assert "Traceback" not in error
    assert code == 2 or error.count("\n") == 1


def test_without_trl(tmp_path: Path, start: Path, posttrain: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[post_train.__module__], "find_spec", lambda name: None)
    code, error = posttrain("sft", "--model", start, "--data", tmp_path, "--out", tmp_path / "out")
    assert code == 1
    assert "pip install '.[flywheel]'" in error


def test_models_of_no_use(tmp_path: Path, start: Path, posttrain: Callable) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "x", "completion": "y"}])
    bare = make_model(tmp_path / "bare")
    endless = make_model(tmp_path / "endless", vocabulary=VOCABULARY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    for model, message in (
        (bare, "has no tokenizer"),
        (endless, "has no end token"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        code, error = posttrain("sft", "--model", model, "--data", data, "--out", tmp_path / "out")
        assert code == 1
        assert message in error


def test_diverging_run_says_so(tmp_path: Path, start: Path, posttrain: Callable) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "x", "completion": "y"}] * 8)
    options = ["--learning-rate", "1e38", "--batch-size", "2", "--max-steps", "4"]
    code, error = posttrain("sft", "--model", start, "--data", data, "--out", tmp_path / "out", *options)
    assert code == 1
    assert "expected a number; a lower --learning-rate" in error
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("starts_processes")
def test_help_is_light() -> None:
    code = (
        "import sys, contextlib, io\nfrom pipelines.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main(['rl', '--help'])\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stderr == ""
