"""The suites of remit eval: the paper's ten tasks of each kind, and recall of facts, as lm-evaluation-harness names them.

The paper gives names and shots. The variant and metric of a task are choices of this file; docs/evaluation.md has the
reason for each. The order of the paper's suites is that of its tables, and of paper.json.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REASONING, KNOWLEDGE, INSTRUCTIONS, RECALL = "reasoning", "knowledge", "instructions", "recall"
GROUPS = (REASONING, KNOWLEDGE, INSTRUCTIONS, RECALL)  # in the order of the tables


@dataclass(frozen=True)
class SuiteTask:
    """label: the paper's name; task: the harness' name of a task or group; shots: as the paper says, None: as the task does.

    metric: METRIC,FILTER, the harness' key of the value for the table, None: its first; runs_code: the model's output is
    executed; optional: not every version of the harness has it; group: one of GROUPS, "" of a task that is in no suite.
    """

    label: str
    task: str
    shots: int | None
    metric: str | None
    runs_code: bool = False
    optional: bool = False
    group: str = ""


def _task(
    group: str, label: str, task: str, shots: int, metric: str | None, runs_code: bool = False, optional: bool = False
) -> SuiteTask:
    return SuiteTask(label, task, shots, metric, runs_code, optional, group)


SUITES: dict[str, tuple[SuiteTask, ...]] = {
    "paper": (
        _task(REASONING, "GSM8K", "gsm8k", 8, "exact_match,strict-match"),
        _task(REASONING, "Minerva Math", "minerva_math", 4, "exact_match,none"),
        _task(KNOWLEDGE, "GPQA", "gpqa_main_n_shot", 5, "acc,none"),
        _task(REASONING, "BBH", "bbh_cot_fewshot", 3, "exact_match,get-answer"),
        _task(INSTRUCTIONS, "IFEval", "ifeval", 3, "inst_level_strict_acc,none"),
        _task(REASONING, "HumanEval", "humaneval", 0, "pass@1,create_test", runs_code=True),
        _task(REASONING, "MBPP", "mbpp", 3, "pass_at_1,none", runs_code=True),
        _task(KNOWLEDGE, "TruthfulQA", "truthfulqa_mc1", 3, "acc,none"),
        _task(KNOWLEDGE, "ARC-Challenge", "arc_challenge", 25, "acc_norm,none"),
        _task(KNOWLEDGE, "MMLU-Pro", "mmlu_pro", 5, "exact_match,custom-extract"),
    ),
    "paper-posttrained": (
        _task(REASONING, "GSM8K", "gsm8k", 0, "exact_match,flexible-extract"),
        _task(REASONING, "Minerva Math", "minerva_math", 0, "math_verify,none"),
        _task(REASONING, "MBPP", "mbpp", 0, "pass_at_1,none", runs_code=True),
        _task(REASONING, "MBPP+", "mbpp_plus", 0, "pass_at_1,none", runs_code=True),
        _task(REASONING, "HumanEval", "humaneval", 0, "pass@1,create_test", runs_code=True),
        _task(REASONING, "HumanEval+", "humaneval_plus", 0, "pass@1,create_test", runs_code=True),
        _task(KNOWLEDGE, "ARC-Challenge", "arc_challenge", 0, "acc_norm,none"),
        _task(KNOWLEDGE, "GPQA Diamond", "gpqa_diamond_zeroshot", 0, "acc,none"),
        _task(KNOWLEDGE, "MMLU-Pro", "mmlu_pro", 0, "exact_match,custom-extract"),
        _task(INSTRUCTIONS, "IFEval", "ifeval", 0, "inst_level_strict_acc,none"),
    ),
    "recall": (
        _task(RECALL, "TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace"),
        _task(RECALL, "Natural Questions", "nq_open", 5, "exact_match,remove_whitespace"),
        _task(RECALL, "SimpleQA", "simpleqa", 5, None, optional=True),
    ),
}


def tasks_of_suites(names: list[str]) -> list[SuiteTask]:
    """The tasks of several suites, one after the other."""
    return [task for name in names for task in SUITES.get(name, ())]


def group_of_task(name: str) -> str | None:
    """The group of the harness' task `name`; None where no suite has it."""
    return next((task.group or None for suite in SUITES.values() for task in suite if task.task == name), None)


def harness_has(task: SuiteTask) -> bool:
    """Whether the installed harness has a folder of tasks named as an optional task; True of all others.

    Without the harness' index, which takes ten seconds.
    """
    spec = find_spec("lm_eval") if task.optional else None
    folders = spec.submodule_search_locations or [] if spec else []
    return not task.optional or any((Path(folder) / "tasks" / task.task).is_dir() for folder in folders)
