"""The laboratory: its problems, its measurements against an oracle, its graph; tiny and small from end to end."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.lab import measure, results
from benchmarks.lab.data import corpora, heldout_data, post_training_data, write_start, write_tokenizer
from benchmarks.lab.documents import CURATED, LARGEST, LEVELS, MIDTRAINING, PRETRAINING, mixed, problem, problems
from benchmarks.lab.graph import ARMS, Seed
from benchmarks.lab.measure import MeasureConfig, accuracies, first_of_each, mean_kl, solution_rows, solve, text_loss
from benchmarks.lab.recipe import RECIPES
from pipelines.flywheel.stages import At, Stage

STEP = re.compile(r"(-?\d+)([+*-])(\d+)=(-?\d+)")
CHANGE = [
    (re.compile(r"(?:buys|finds) (\d+) more|gets (\d+) from a friend|wins (\d+) in a game"), 1),
    (re.compile(r"gives (\d+) away|loses (\d+) on the way|sells (\d+)|lends (\d+) to a neighbour"), -1),
]


def computed(prompt: str) -> tuple[int, tuple[str, ...]]:
    """Answer of a story by reading its English, and what it computes; independent of the generator's own fields."""
    first, *changes = prompt.split("How many")[0].strip().split(". ")
    value = int(re.search(r"has (\d+)", first).group(1))
    path = [str(value)]
    for sentence in changes:
        if "doubles them" in sentence or "as many again" in sentence:
            value, word = value + value, "*2"
        else:
            (found, sign), *others = [(match, sign) for shape, sign in CHANGE if (match := shape.search(sentence))]
            assert not others
            number = next(int(group) for group in found.groups() if group)
            value, word = value + sign * number, f"{'+' if sign > 0 else '-'}{number}"
        path.append(word)
    return value, tuple(path)


def final(text: str) -> int:
    return int(text.rpartition("Answer: ")[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right(level: Any, held_out: bool) -> None:
    for made in problems("7", 300, held_out, (level,)):
        value, _ = computed(made.prompt)
        assert made.answer == value == final(made.solution())
        steps = STEP.findall(made.solution())
        assert len(steps) == len(made.changes)
        assert (len(steps),) == (2,) if level == "easy" else len(steps) in (3, 4)
        before = made.start
        for left, sign, right, result in steps:
            assert int(left) == before
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )
            assert 0 <= int(result) <= LARGEST
            before = int(result)


def parts(prompt: str) -> set[tuple[str, ...]]:
    """The computation of a story, and any two or more of its steps in a row with the number that they begin with."""
    _, (start, *changes) = computed(prompt)
    values = [int(start)]
    for change in changes:
        number = int(change[1:])
        values.append({"+": values[-1] + number, "-": values[-1] - number, "*": values[-1] * number}[change[0]])
    ends = [(first, end) for end in range(len(changes) + 1) for first in range(end - 1)]
    return {(str(values[first]), *changes[first:end]) for first, end in ends}


def test_parts_by_hand() -> None:
    story = "Ann has 3 pens. Ann finds 2 more. Ann doubles them. Ann sells 4. How many pens does Ann have now?\n"
    assert parts(story) == {("3", "+2", "*2"), ("5", "*2", "-4"), ("3", "+2", "*2", "-4")}


def test_no_held_out_computation_is_trained_on() -> None:
    recipe = RECIPES["small"]
    trained: set[tuple[str, ...]] = set()
    for documents in corpora(recipe, 0).values():
        trained |= {part for text in documents if "How many" in text for part in parts(text)}
    for rows in post_training_data(recipe, 0).values():
        trained |= {part for row in rows for part in parts(row["prompt"])}
    held_out = {computed(row["prompt"])[1] for row in heldout_data(recipe, 0)["problems"]}
    assert len(trained) > 500
    assert len(held_out) > 50
    assert not trained & held_out


def test_share_of_wrong_steps() -> None:
    def shares(mix: Any) -> tuple[float, float]:
        steps = wrong = answers = 0
        texts = list(mixed("3", 3000, mix))
        for text in texts:
            for left, sign, right, result in STEP.findall(text) if "How many" in text else ():
                value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
                steps, wrong = steps + 1, wrong + (value != int(result))
            answers += "How many" in text
        return (wrong / steps, answers / len(texts))

    share, answers = shares(MIDTRAINING)
    assert abs(share - MIDTRAINING.wrong_steps) < 0.02  # 4 standard errors of 6,000 steps
    assert abs(answers - MIDTRAINING.problems) < 0.04
    share, answers = shares(PRETRAINING)
    assert abs(share - PRETRAINING.wrong_steps) < 0.1
    assert abs(answers - PRETRAINING.problems) < 0.02
    assert shares(CURATED) == (0.0, 1.0)


def test_a_wrong_step_is_gone_on_from() -> None:
    made = problem(random.Random(1), "hard", held_out=False)
    steps = STEP.findall(text := made.solution(random.Random(2), wrong_steps=1.0))
    assert all(after[0] == before[3] for before, after in pairwise(steps))
    assert final(text) == int(steps[-1][3])


def test_documents_follow_from_the_seed() -> None:
    assert list(mixed("1", 50, MIDTRAINING)) == list(mixed("1", 50, MIDTRAINING))
    assert list(mixed("1", 50, MIDTRAINING)) != list(mixed("2", 50, MIDTRAINING))


def test_preferences_differ_and_the_chosen_one_is_right() -> None:
    for row in post_training_data(RECIPES["tiny"], 0)["dpo"]:
        assert final(row["chosen"]) == computed(row["prompt"])[0]
        steps = STEP.findall(row["rejected"])
        assert any(
            {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[s] != int(r) for a, s, b, r in steps
        )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the laboratory's tokenizer, sharpened so that its answers depend on its prompts."""
    folder = tmp_path_factory.mktemp("lab") / "model"
    write_start(folder, RECIPES["tiny"], seed=3)
    write_tokenizer(folder, mixed("0", 300, MIDTRAINING), RECIPES["tiny"].vocab_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def rows_of(count: int = 7) -> list[dict[str, str]]:
    return heldout_data(RECIPES["tiny"], 0)["problems"][:count]


def greedy_alone(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """One prompt, no padding, no cache, the whole text again for each token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            ids.pop()
            break
    return tokenizer.decode(ids[start:])


def test_batched_solutions_are_those_of_each_prompt_alone(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_model)
    prompts = [row["prompt"] for row in rows_of()]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 2  # so that some are padded
    config = MeasureConfig(data=tmp_path, out=tmp_path, model=tiny_model, batch_size=4, max_new_tokens=12)
    batched = solve(model, tokenizer, prompts, config, sample=False)
    alone = [greedy_alone(model, tokenizer, prompt, 12) for prompt in prompts]
    assert batched == alone
    assert len(set(batched)) > 2


def test_sampling_follows_the_distribution(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1 / 40)
    prompt = rows_of()[0]["prompt"]
    config = MeasureConfig(data=tmp_path, out=tmp_path, model=tiny_model, batch_size=1000, max_new_tokens=1)
    drawn = solve(model, tokenizer, [prompt] * 4000, config, sample=True)
    with torch.no_grad():
        shares = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].softmax(-1)
    digits = [id for id in range(len(shares)) if tokenizer.decode([id]).isdigit()]
    expected = float(shares[digits].sum())
    found = sum(text.isdigit() for text in drawn) / len(drawn)
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / len(drawn))
    assert len(set(drawn)) > 100  # neither greedy nor cut to the most probable ones


def test_losses_and_divergence_against_float64(tiny_model: Path, tmp_path: Path) -> None:
    """One row at a time in float64 with probabilities, not their logarithms."""
    model, tokenizer = load(tiny_model, torch.float32)
    other_folder = tmp_path / "other"
    write_start(other_folder, RECIPES["tiny"], seed=4)
    other = transformers.AutoModelForCausalLM.from_pretrained(other_folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1 / 10)
    rows, lengths = solution_rows(tokenizer, rows_of())
    assert rows[0][-1] == tokenizer.eos_token_id
    all_losses, losses, divergences = [], [], []
    for ids, length in zip(rows, lengths, strict=True):
        assert tokenizer.decode(ids[:length]) in [row["prompt"] for row in rows_of()]
        with torch.no_grad():
            p, q = (net.double()(torch.tensor([ids])).logits[0].softmax(-1) for net in (model.double(), other.double()))
        for place in range(1, len(ids)):
            loss = -math.log(float(p[place - 1, ids[place]]))
            all_losses.append(loss)
            if place >= length:
                losses.append(loss)
                divergences.append(float((q[place - 1] * (q[place - 1] / p[place - 1]).log()).sum()))
    model, other = model.float(), other.float()
    assert text_loss(model, rows) == pytest.approx(sum(all_losses) / len(all_losses), rel=1e-5)
    assert text_loss(model, rows, lengths) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    found = mean_kl(model, other, rows, lengths)
    assert found == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found > 0.01
    assert mean_kl(model, model, rows, lengths) == pytest.approx(0, abs=1e-6)


def test_accuracy_counts_levels_alike() -> None:
    rows = [{"level": "easy", "answer": "3"}, {"level": "easy", "answer": "4"}, {"level": "hard", "answer": "5"}]
    found = accuracies(rows, ["1+2=3\nAnswer: 3\n", "Answer: 5", "Answer: 5\n"], "greedy")
    assert found == {"greedy_easy": 0.5, "greedy_hard": 1.0, "greedy_all": 0.75}


def test_first_of_each_level() -> None:
    rows = [{"level": "easy", "n": "0"}, {"level": "easy", "n": "1"}, {"level": "hard", "n": "2"}]
    assert [row["n"] for row in first_of_each(rows, 1)] == ["0", "2"]
    assert first_of_each(rows, None) == rows


def option(stage: Stage, name: str) -> Any:
    return stage.command[stage.command.index(name) + 1]


@pytest.mark.parametrize("size", RECIPES)
def test_graph_can_run(size: Any) -> None:
    stages = Seed(size, 0).stages + Seed(size, 1).stages
    assert len({stage.name for stage in stages}) == len(stages)
    for number, stage in enumerate(stages):
        assert {source.name for source in stage.inputs.values()} <= {earlier.name for earlier in stages[:number]}


def test_arms_differ_in_their_objective_alone() -> None:
    seed = Seed("full", 0)
    assert {arm for arm, kind in seed.models if kind == "mid"} == set(ARMS)
    alike = ("--max-steps", "--learning-rate", "--global-batch-size", "--seed", "--warmup-steps", "--context")
    ntp = seed.models["ntp", "mid"]
    for arm in ARMS:
        stage = seed.models[arm, "mid"]
        assert [option(stage, name) for name in alike] == [option(ntp, name) for name in alike], arm
        assert stage.inputs["start"] is seed.base
        assert option(stage, "--eval-shards") == option(ntp, "--eval-shards")
        shards = stage.inputs.get("shards")
        while shards is not None and "data" not in shards.inputs:  # a selection, or a second column
            (shards,) = shards.inputs.values() if len(shards.inputs) == 1 else (shards.inputs["scored"],)
        rows = option(stage, "--shards") if shards is None else option(shards, "--shards")
        assert rows == At("data", "packed/midtraining"), arm


def test_references_are_the_ones_that_the_arms_are_named_after() -> None:
    seed = Seed("full", 0)

    def scored_with(arm: str) -> Any:
        return seed.models[arm, "mid"].inputs["shards"].inputs["model"]

    rl = seed.models["ntp", "rl"]
    for arm in ("remit", "no-clip", "kd", "rkl", "switch"):
        assert scored_with(arm) is rl
    assert option(seed.models["switch", "mid"].inputs["shards"], "--top-k-below-entropy") == "quantile:0.2"
    everywhere = seed.models["rkl", "mid"].inputs["shards"]
    assert everywhere is seed.models["remit", "mid"].inputs["shards"]
    assert (option(everywhere, "--top-k"), option(everywhere, "--entropy-temperature")) == ("16", "2")
    assert "--top-k-below-entropy" not in everywhere.command
    assert scored_with("ntp-guided") is seed.models["ntp", "mid"]
    assert scored_with("sft-guided") is seed.models["ntp", "sft"]
    assert scored_with("remit2") is seed.models["remit", "rl"]
    assert scored_with("remit-rl10") is seed.models["ntp-rl10", "rl"]
    assert scored_with("rho1").name == "seed-0/curated"
    short, whole = seed.models["ntp-rl10", "rl"], rl
    assert int(option(short, "--max-steps")) == round(int(option(whole, "--max-steps")) / 10)
    assert short.inputs["model"] is whole.inputs["model"]  # both from the NTP arm after DPO
    selection = seed.models["miniplm", "mid"].inputs["shards"]
    assert (option(selection, "--teacher"), option(selection, "--small")) == ("rl", "base")
    assert selection.inputs["scored"].inputs["model"] is seed.base
    assert option(seed.models["no-clip", "mid"], "--epsilon") == "inf"
    for stage in seed.measured.values():
        assert stage.inputs["reference"] is rl
        assert isinstance(option(stage, "--data"), At)
    for arm in ("ntp", "kd", "remit"):
        assert seed.models[arm, "sft"].inputs["model"] is seed.models[arm, "mid"]
        assert seed.models[arm, "rl"].inputs["model"] is seed.models[arm, "dpo"]


def test_curve_is_a_mean_over_steps() -> None:
    lines = [{"step": step, "grad_norm": float(step), "x": None} for step in range(1, 41)]
    points = results.curve(lines, ("grad_norm", "x"))
    assert len(points) == results.POINTS
    assert points[0] == (2, {"grad_norm": 1.5})
    assert points[-1] == (40, {"grad_norm": 39.5})


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.lab", *words], capture_output=True, text=True)


def check_results(out: Path, size: Any) -> dict[str, Any]:
    (found,), table = results.read_file(out / "results.parquet")
    rows = table.to_pylist()
    assert (found["seed"], found["size"]) == (0, size)
    assert all(math.isfinite(row["value"]) for row in rows)
    whole = {(row["arm"], row["stage"], row["metric"]) for row in rows if row["step"] is None}
    for arm, kind in Seed(size, 0).models:
        for metric in ("greedy_easy", "greedy_hard", "sampled_all", "loss_stories", "loss_notes", "kl_reference"):
            assert (arm, kind, metric) in whole
    assert {row["step"] for row in rows if row["metric"] == "loss_heldout"} >= {0}
    reference = [r["value"] for r in rows if (r["arm"], r["stage"], r["metric"]) == ("ntp", "rl", "kl_reference")]
    assert abs(reference[0]) < 1e-6
    return found | {"measurements": rows}


@pytest.mark.usefixtures("starts_processes")
def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    planned = lab("--size", "tiny", "--seeds", "3", "4", "--out", str(tmp_path / "lab"), "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("0 of 20 stages are done") == 2
    assert not (tmp_path / "lab").exists()


@pytest.mark.slow
def test_tiny_laboratory(tmp_path: Path) -> None:
    out = tmp_path / "lab"
    ran = lab("--size", "tiny", "--out", str(out))
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = check_results(out, "tiny")
    steps = RECIPES["tiny"].midtraining_steps
    for arm in ("ntp", "remit"):
        for metric in ("greedy_all", "loss_solutions"):
            of_arm = [row for row in found["measurements"] if (row["arm"], row["metric"]) == (arm, metric)]
            assert [row["step"] for row in of_arm if row["stage"] == "mid" and row["step"] is not None] == [0, 5, steps]
    # the curve ends with the finished model, on the first problems of each level; here those are few, but all texts
    stories = {
        row["step"]: row["value"] for row in found["measurements"]
        if (row["arm"], row["stage"], row["metric"]) == ("remit", "mid", "loss_stories")
    }  # fmt: skip
    assert stories[steps] == stories[None] != stories[5]
    base = [row["value"] for row in found["measurements"] if (row["arm"], row["metric"]) == ("base", "loss_stories")]
    assert [stories[0]] == base
    assert len(found["code"]) == 1
    assert found["versions"]["torch"] == [torch.__version__]
    again = lab("--size", "tiny", "--out", str(out))
    assert again.returncode == 0
    assert "started" not in again.stderr
    assert check_results(out, "tiny") == found


@pytest.mark.slow
def test_small_laboratory(tmp_path: Path) -> None:
    out = tmp_path / "lab"
    ran = lab("--size", "small", "--out", str(out))
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = check_results(out, "small")
    assert {row["arm"] for row in found["measurements"] if row["stage"] == "mid"} == {"ntp", *RECIPES["small"].arms}


@pytest.mark.slow
def test_a_kill_in_every_stage(tmp_path: Path) -> None:
    """kill -9 of the driver within each stage in turn, in half of the cases of the stage too; then the numbers of a laboratory
    that was left alone."""
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    ran = lab("--size", "tiny", "--out", str(whole))
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = check_results(whole, "tiny")
    rng, left, tries = random.Random(5), dict(expected["seconds"]), 0
    words = [sys.executable, "-m", "benchmarks.lab", "--size", "tiny", "--out", str(out)]

    def running() -> set[str]:
        text = log.read_text()
        return set(re.findall(r"seed-0/(\S+): started", text)) - set(re.findall(r"seed-0/(\S+): done", text))

    while left:
        assert (tries := tries + 1) < 100
        with log.open("w") as stream:
            process = subprocess.Popen(words, stderr=stream, stdout=stream)
        while process.poll() is None and not running() & left.keys():
            time.sleep(0.02)
        for name in running():
            time.sleep(rng.uniform(0, 0.6) * left[name])
        killed = process.poll() is None
        process.kill()
        for file in (out / "running").glob("*") if rng.random() < 0.5 else ():
            pid = file.read_text().partition("\n")[2].partition(" ")[0]
            with contextlib.suppress(ProcessLookupError, ValueError):  # it has just ended, or was about to begin
                os.killpg(int(pid), signal.SIGKILL)
        assert process.wait() in (0, -9), log.read_text()[-3000:]
        for name in running() if killed else ():
            left.pop(name, None)
        if not killed:  # all are done: the stages that were too fast are made again
            found = json.loads((out / "flywheel.json").read_text())["stages"]
            stages = {stage["name"].removeprefix("seed-0/"): stage for stage in found}
            # models that two steps of reinforcement learning have not changed are measured once, under one key
            killed_in = {stage["key"] for name, stage in stages.items() if name not in left}
            left = {name: seconds for name, seconds in left.items() if stages[name]["key"] not in killed_in}
            for name in left:
                (out / "records" / f"{stages[name]['key']}.json").unlink(missing_ok=True)
                shutil.rmtree(out / stages[name]["output"], ignore_errors=True)
    ran = lab("--size", "tiny", "--out", str(out))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert check_results(out, "tiny")["measurements"] == expected["measurements"]
    assert not list((out / "stages").glob(".*.part"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seeds", "1", "1", "--out", "x"), "--seeds are [1, 1]"),
        (("--seeds", "-1", "--out", "x"), "--seeds are [-1]"),
    ],
)
@pytest.mark.usefixtures("starts_processes")
def test_bad_usage(words: tuple[str, ...], said: str) -> None:
    result = lab(*words)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_measure_wants_a_model_and_a_whole_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model is not given"):
        MeasureConfig(data=tmp_path, out=tmp_path)
    with pytest.raises(ValueError, match="--exports, --start and --steps go together"):
        MeasureConfig(data=tmp_path, out=tmp_path, model=tmp_path, exports=tmp_path, steps=3)
    for before in ([], [3], [1, 4]):
        for step in before:
            (tmp_path / f"step-{step:06d}").mkdir(exist_ok=True)
        config = MeasureConfig(data=tmp_path, out=tmp_path, model=tmp_path, exports=tmp_path, start=tmp_path, steps=3)
        with pytest.raises(ValueError, match="expected folders step-"):
            measure.run(config)
