"""The ten tasks that the paper evaluates, as lm-evaluation-harness names them, and the averages it reports.

The paper gives names and shots. Which variant and metric of a task it took is not known: the choices are this file's.
"""

from dataclasses import dataclass

SOURCE = "arXiv 2602.03075"


@dataclass(frozen=True)
class SuiteTask:
    """label: the paper's name; task: the harness' name of a task or group; shots: as the paper says, None: as the task does.

    metric: METRIC,FILTER, the harness' key of the value for the table, None: its first; runs_code: the model's output is
    executed.
    """

    label: str
    task: str
    shots: int | None
    metric: str | None
    runs_code: bool = False


PAPER = (
    SuiteTask("GSM8K", "gsm8k", 8, "exact_match,strict-match"),
    SuiteTask("Minerva Math", "minerva_math", 4, "exact_match,none"),
    SuiteTask("GPQA", "gpqa_main_n_shot", 5, "acc,none"),
    SuiteTask("BBH", "bbh_cot_fewshot", 3, "exact_match,get-answer"),
    SuiteTask("IFEval", "ifeval", 3, "prompt_level_strict_acc,none"),
    SuiteTask("HumanEval", "humaneval", 0, "pass@1,create_test", runs_code=True),
    SuiteTask("MBPP", "mbpp", 3, "pass_at_1,none", runs_code=True),
    SuiteTask("TruthfulQA", "truthfulqa_mc2", 3, "acc,none"),
    SuiteTask("ARC-Challenge", "arc_challenge", 25, "acc_norm,none"),
    SuiteTask("MMLU-Pro", "mmlu_pro", 5, "exact_match,custom-extract"),
)
PAPER_ZERO_SHOT = (
    SuiteTask("GSM8K", "gsm8k", 0, "exact_match,flexible-extract"),
    SuiteTask("Minerva Math", "minerva_math", 0, "exact_match,none"),
    SuiteTask("GPQA", "gpqa_main_zeroshot", 0, "acc,none"),
    SuiteTask("BBH", "bbh_cot_zeroshot", 0, "exact_match,flexible-extract"),
    SuiteTask("IFEval", "ifeval", 0, "prompt_level_strict_acc,none"),
    SuiteTask("HumanEval", "humaneval", 0, "pass@1,create_test", runs_code=True),
    SuiteTask("MBPP", "mbpp", 0, "pass_at_1,none", runs_code=True),
    SuiteTask("TruthfulQA", "truthfulqa_mc2", 0, "acc,none"),
    SuiteTask("ARC-Challenge", "arc_challenge", 0, "acc_norm,none"),
    SuiteTask("MMLU-Pro", "mmlu_pro", 0, "exact_match,custom-extract"),
)
SUITES = {"paper": PAPER, "paper-zero-shot": PAPER_ZERO_SHOT}

# Averages over the ten tasks, in per cent; None where the paper has no number. It gives no rows for single tasks here.
MODELS = ("OLMo-1B", "SmolLM3-3B", "Youtu-LLM-2B")
REPORTED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "paper": {
        "pre-trained": (16.44, 31.18, 30.34),
        "NTP": (22.35, 41.13, 36.80),
        "MiniPLM": (22.41, 40.65, 36.69),
        "RHO-1": (23.10, 39.80, 32.24),
        "SFT-guided": (23.72, None, 35.37),
        "KD": (29.78, None, 38.67),
        "ReMiT": (27.56, 42.97, 38.58),
    },
    "paper-zero-shot": {
        "NTP, then SFT": (27.45, None, None),
        "NTP, then SFT, DPO": (29.43, None, None),
        "NTP, then SFT, DPO, RL": (29.57, None, None),
        "KD, then SFT": (30.56, None, None),
        "KD, then SFT, DPO": (29.37, None, None),
        "KD, then SFT, DPO, RL": (31.00, None, None),
        "ReMiT, then SFT": (30.02, None, None),
        "ReMiT, then SFT, DPO": (30.87, None, None),
        "ReMiT, then SFT, DPO, RL": (32.92, None, None),
    },
}
