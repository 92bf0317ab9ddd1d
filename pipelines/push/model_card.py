"""The card of a pushed model: base, objective, references and data of its run, held-out loss, evaluation."""

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.evaluation.results import read_results
from pipelines.push.markdown import code, table
from pipelines.push.revealing import without_place
from pipelines.report.runs import EVALUATION, METRICS, finite, read_lines, read_settings
from shards.fingerprint import RUN, config_fingerprint, weights_fingerprint

SHOWN = 12  # characters of a hash
RIGHTS = "The licence of the base applies to what was made from it; the corpora that it was trained on have licences of their own."
_APART = ("base", "shards", "mixture", "rows_left_out", "tokenizer_differences", "changes", "resolved", "order")


def find_run(model: Path) -> tuple[Path, dict[str, Any]] | None:
    """The run that made a model folder, and its settings; None where there is none beside it."""
    for folder in (model.parent, model.parent.parent):
        if (folder / RUN).exists():
            return folder, read_settings(folder)
    return None


def read_evaluations(files: Sequence[Path], model: Path) -> list[dict[str, Any]]:
    """results.json files of the model; ValueError for one of another model."""
    ours, found = weights_fingerprint(model), []
    for file in files:
        values = read_results(file)
        theirs = values["model"].get("weights")
        if theirs != ours:
            raise ValueError(
                f"--results {file}: is of weights {str(theirs)[:SHOWN]}.., those of {model} are {ours[:SHOWN]}..; evaluate this model"
            )
        found.append(values)
    return found


def metadata(
    settings: dict[str, Any] | None, evaluations: Sequence[dict[str, Any]], repo: str, licence: str | None
) -> dict[str, Any]:
    """The YAML of the card, with the figures of remit eval as the hub shows them."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    base = (settings or {}).get("base") or {}
    values: dict[str, Any] = {"license": licence} if licence else {}
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["remit", str((settings or {}).get("objective") or (settings or {}).get("stage") or "")]
    values["tags"] = [tag for tag in dict.fromkeys(tags) if tag]
    if base.get("revision"):  # it came from the hub
        values["base_model"] = base["model"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task["task"],
            dataset_name=task["label"],
            metric_type=task["metric"].partition(",")[0],
            metric_name=task["metric"],
            metric_value=round(100 * task["value"], 2),
        )
        for values_ in evaluations
        for task in values_["tasks"].values()
    ]
    if results:
        values["model-index"] = eval_results_to_model_index(repo.rpartition("/")[2], results)
    return values


def text(model: Path, run: tuple[Path, dict[str, Any]] | None, evaluations: Sequence[dict[str, Any]]) -> str:
    """The section of a model. run: as find_run gives it."""
    parts = ["## How it was made", f"Written by [remit](https://arxiv.org/abs/2602.03075) {version('remit')}."]
    if run is not None:
        folder, settings = run
        parts += [_origin(settings), "### Settings", _settings(settings), _data(settings), _figures(folder)]
    if evaluations:
        parts += ["### Evaluation", *map(_evaluation, evaluations)]
    rows = [["weights sha256", code(weights_fingerprint(model))], ["config sha256", code(config_fingerprint(model))]]
    parts += ["### Provenance", table(["", ""], rows)]
    return "\n\n".join(part.strip() for part in parts if part)


def _origin(settings: dict[str, Any]) -> str:
    base = settings.get("base") or {}
    revision = f" at {code(base['revision'])}" if base.get("revision") else ""
    rows = [["base", f"{code(base.get('model', '?'))}{revision}"]]
    weights = settings.get("base_weights_sha256", settings.get("weights_sha256"))
    rows += [["base weights sha256", code(str(weights)[:SHOWN])]] if weights else []
    if "objective" in settings:
        rows += [["objective", code(settings["objective"])]]
        references = (settings.get("shards") or {}).get("references") or {}
        reference = references.get(settings.get("reference"))
        if reference and settings["objective"] != "ntp":
            at = f" at {code(reference['revision'])}" if reference.get("revision") else ""
            rows += [["reference", f"{code(reference.get('model', '?'))}{at}, scored in {reference.get('dtype', '?')}"]]
    elif "stage" in settings:
        rows += [["stage", code(settings["stage"])]]
    return table(["", ""], rows)


def _settings(settings: dict[str, Any]) -> str:
    """The settings that are one value; of a path or a bucket the last name."""
    rows = []
    for name, value in settings.items():
        if name in _APART or name.endswith("sha256") or isinstance(value, dict | list) or value is None:
            continue
        shown = without_place(value) if isinstance(value, str) else value
        rows.append([code(name), code(json.dumps(shown) if isinstance(shown, bool) else shown)])
    return table(["setting", "value"], rows)


def _data(settings: dict[str, Any]) -> str:
    shards = settings.get("shards") or {}
    corpus = shards.get("corpus") or []
    lines = ["### Data"]
    if corpus:
        from shards.corpus_file import CorpusFile
        from trainer.statistics import Sources

        files = [CorpusFile(**file) for file in corpus]
        sources = Sources(files)
        tokens = [
            sum(f.tokens for g, f in zip(sources.group, files) if g == group) for group in range(len(sources.names))
        ]
        rows = [[code(without_place(name)), f"{count:,}"] for name, count in zip(sources.names, tokens)]
        lines += [table(["source", "tokens in the corpus"], rows)]
    for stage in (settings.get("mixture") or {}).get("stages", []):
        rows = [[code(name), f"{share:.2%}"] for name, share in stage["weights"].items()]
        lines += [f"Mixture after step {stage['after_step']:,}:", table(["source", "share of the tokens"], rows)]
    if settings.get("data_sha256"):
        lines += [f"Data of sha256 {code(settings['data_sha256'][:SHOWN])}."]
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _figures(run: Path) -> str:
    rows = []
    *_, last = [{}, *read_lines(run / METRICS, lambda line: None)]
    for name, label in (
        ("step", "steps"), ("tokens", "tokens trained on"), ("loss", "loss of the last step"), ("ntp_loss", "next-token loss of the last step"),
        ("weight_std", "standard deviation of its token weights"), ("reward", "reward of the last step"),
    ):  # fmt: skip
        if (value := finite(last.get(name))) is not None:
            rows.append([label, f"{value:,.0f}" if name in ("step", "tokens") else f"{value:.4f}"])
    held_out = list(read_lines(run / EVALUATION, lambda line: None))
    for line in held_out[:1] + held_out[1:][-1:]:
        if (loss := finite(line.get("loss"))) is not None and math.isfinite(loss):
            when = "of the base" if line["step"] == 0 else f"after step {line['step']:,}"
            rows.append([f"held-out loss {when}, nats per token", f"{loss:.4f}"])
            if (exported := finite(line.get("exported_loss"))) is not None and line["step"]:
                rows.append(["the same of the weights here", f"{exported:.4f}"])
    return f"### Figures of the run\n\n{table(['', ''], rows)}" if rows else ""


def _evaluation(values: dict[str, Any]) -> str:
    rows = [
        [
            task["label"],
            code(task["task"]),
            code(task["metric"]),
            str(task["settings"]["num_fewshot"]) if task["settings"].get("num_fewshot") is not None else "its own",
            f"{100 * task['value']:.2f}" + (f" ± {100 * task['stderr']:.2f}" if task.get("stderr") is not None else ""),
        ]
        for task in values["tasks"].values()
    ]
    found = table(["task", "lm-eval", "metric", "shots", "%"], rows)
    for suite, mean in (values.get("averages") or {}).items():
        kept = "" if mean["whole"] else f", of {mean['num_tasks']} tasks or a part of their questions"
        found += f"\nMean of {code(suite)}: {100 * mean['value']:.2f} %{kept}.\n"
    versions = ", ".join(f"{name} {number}" for name, number in values["settings"]["versions"].items())
    limit = values["settings"].get("limit")
    first = f"; only the first {limit} questions of each task" if limit is not None else ""
    return f"{found}\n{versions}; dtype {values['settings']['dtype']}{first}."
