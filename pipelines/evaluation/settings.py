"""Settings of remit eval."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.evaluation.suites import SUITES, tasks_of_suites


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model on the paper's tasks, on recall of facts or on tasks of your own, with lm-evaluation-harness.

    Each answer of a model is kept in --out: the same command again asks only what has not been answered yet.
    """

    model: str
    """Model to evaluate: a Hugging Face folder (OUT/model of remit train), or NAME or NAME@REVISION of the hub. No
    remote code is run."""
    suite: str | None = None
    """paper: the paper's ten tasks for base models, with its shots; paper-posttrained: its ten for post-trained models,
    without examples; recall: questions for facts. Two with a comma between: paper,recall. Default: paper, unless --tasks
    is given."""
    tasks: str | None = None
    """Instead of a suite: names of the harness' tasks or of your own, with commas between."""
    num_fewshot: int | None = None
    """With --tasks: examples in front of each question; default: what each task defines."""
    task_dir: Path | None = None
    """With --tasks: folder with the YAML files of your own tasks. Python that their !function entries name is run."""
    skip: str = ""
    """With a suite: tasks to leave out, by the harness' names, with commas between."""
    allow_code_execution: bool = False
    """Run the programs that the model writes, as HumanEval and MBPP (and other tasks that say so) need it. They run on
    this machine, with your rights and without a sandbox, scored by a metric script that the evaluate library fetches
    from the hub: use a container or a machine of its own. Without this, suites leave those tasks out, by name."""
    backend: Literal["hf", "vllm"] = "hf"
    """What runs the model: transformers, or vLLM where it is installed."""
    compare: list[Path] = field(default_factory=list)
    """results.json files of other models, evaluated before, to compare --model with."""
    limit: int | None = None
    """Questions of each task, the first ones; default: all. For a try: such values compare with nobody else's."""
    out: Path = Path("results")
    """Folder for the results: NAME-FINGERPRINT/results.json, compare.json."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: as they are stored."""
    batch_size: int = 8
    """Sequences at once with hf; vllm decides for itself."""
    max_length: int | None = None
    """Longest sequence, in tokens; questions that are longer are cut at their beginning. Default: the model's own."""
    chat_template: bool = False
    """Wrap the questions into the model's chat template, for post-trained models."""
    seed: int = 1234
    """Decides which examples stand in front of a question; 1234 is the harness' own."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.tasks is None:
            for option, value in (("--num-fewshot", self.num_fewshot), ("--task-dir", self.task_dir)):
                if value is not None:
                    raise ValueError(
                        f"{option} is given without --tasks, which it belongs to; a suite has its own shots"
                    )
        elif self.suite is not None:
            raise ValueError("--suite and --tasks are both given, expected one of them")
        elif self.skip:
            raise ValueError("--skip is given with --tasks, expected it with a suite; name fewer tasks instead")
        elif not self.task_names or len(set(self.task_names)) < len(self.task_names):
            raise ValueError(
                f"--tasks is {self.tasks!r}, expected names with commas between, each once, for instance gsm8k,bbh"
            )
        if self.tasks is None:
            self._check_suites()
        known = [task.task for task in tasks_of_suites(self.suite_names)]
        for name in self.skipped:
            if name not in known:
                raise ValueError(f"--skip has {name!r}, expected names out of {', '.join(known)}")
        for option, number, least in (
            ("--num-fewshot", self.num_fewshot, 0), ("--limit", self.limit, 1), ("--batch-size", self.batch_size, 1),
            ("--max-length", self.max_length, 2), ("--seed", self.seed, 0),
        ):  # fmt: skip
            if number is not None and number < least:
                raise ValueError(f"{option} is {number}, expected at least {least}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out}: is a file, expected a folder")

    def _check_suites(self) -> None:
        names = self.suite_names
        for name in names:
            if name not in SUITES:
                raise ValueError(
                    f"--suite has {name!r}, expected names out of {', '.join(SUITES)}, with commas between"
                )
        labels = [task.task for task in tasks_of_suites(names)]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice or not names:
            why = f"which have {', '.join(twice)} in common" if twice else "which names none"
            raise ValueError(
                f"--suite is {self.suite!r}, {why}; expected one, or suites without common tasks: paper,recall"
            )

    @property
    def suite_names(self) -> list[str]:
        """Those of --suite, or what stands for it; none with --tasks."""
        if self.tasks is not None:
            return []
        return ["paper"] if self.suite is None else _names(self.suite)

    @property
    def task_names(self) -> list[str]:
        """Those of --tasks."""
        return _names(self.tasks or "")

    @property
    def skipped(self) -> list[str]:
        """Those of --skip."""
        return _names(self.skip)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
