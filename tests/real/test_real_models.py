"""SmolLM2-135M-Instruct and Gemma 3 270M through every command, against forwards of transformers alone.

`make test-real` fetches them and runs this; some ten minutes on two cores.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from annotated import rows_of_step
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import forward, table
from .project import CONTEXTS, STEP, Project, read_rows, remit, spans, stored

pytestmark = pytest.mark.real

# mean |error| in nats that a dtype may have; what was measured is in docs/numerics.md
ERROR = {"float32": 1e-4, "float16": 0.012, "bfloat16": 0.08}
BIAS = {"float32": 1e-4, "float16": 0.002, "bfloat16": 0.02}
PUTS_BOS = {"smollm2": False, "gemma3": True}


def test_tokenizer_of_the_folder(project: Project) -> None:
    """The conversion's own result, before anything is checked with it."""
    file = Tokenizer.from_file(str(project.model / "tokenizer.json"))
    for text in [*project.all_texts, "naïve 漢字 😀 e\u0301  1234\t\r\n\n x"]:
        ids = project.tokenizer(text)["input_ids"]
        assert ids == file.encode(text).ids
        assert project.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (project.tokenizer("a")["input_ids"][0] == project.tokenizer.bos_token_id) == PUTS_BOS[project.name]


def test_rows_are_the_tokenizers_own_ids(project: Project) -> None:
    eos, bos = project.tokenizer.eos_token_id, project.tokenizer.bos_token_id
    expected_bos = bos if PUTS_BOS[project.name] else None
    assert project.manifest["tokenizer"]["bos_token_id"] == expected_bos
    assert set(project.pieces) == set(project.own_ids)
    assert max(len(row["input_ids"]) for row in project.rows) == 256
    front = [] if expected_bos is None else [expected_bos]
    for (source, doc_id), pieces in project.pieces.items():
        text = project.texts[project.files[source]][doc_id]
        assert all(ids[: len(front)] == front for _, ids in pieces)
        ids = [token for _, ids in pieces for token in ids[len(front) :]]
        assert [*front, *ids] == [*project.own_ids[source, doc_id], eos]
        assert project.tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_verify_counts(project: Project) -> None:
    out = remit("verify", "--shards", project.packed)
    assert out.rstrip().endswith("OK")
    count = len(project.all_texts)
    assert f"read {count}" in out
    assert f"packed {count}" in out


@pytest.mark.parametrize("context", CONTEXTS)
def test_stored_logprobs(project: Project, context: str, results: list[table.Result]) -> None:
    """As a user gets them: --dtype auto, steps of 1/64 nat. Nulls where nothing precedes, and nowhere else."""
    scored = project.scored(context)
    rows = read_rows(scored)
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in project.rows]
    for row in rows:
        starts = [start for start, _ in spans(row, context)]
        assert np.flatnonzero(np.isnan(stored(row))).tolist() == starts
    found = table.result(project, scored, context)
    results.append(found)
    assert found.dtype in ("float16", "bfloat16")  # the model's own is bfloat16
    assert found.error <= ERROR[found.dtype] + STEP / 4, found
    assert abs(found.bias) <= BIAS[found.dtype], found
    assert found.loss == pytest.approx(found.loss_float32, abs=0.02)


def test_float32_is_the_forward(project: Project, results: list[table.Result]) -> None:
    scored = project.scored("packed", "--dtype", "float32", "--logprob-step", 0)
    found = table.result(project, scored, "packed")
    results.append(found)
    assert found.dtype == "float32"
    assert found.error <= ERROR["float32"], found
    assert found.moved == 0


def test_auto_is_the_nearer_of_the_short_dtypes(project: Project, results: list[table.Result]) -> None:
    """float16, where vLLM runs the model in it: it has no Gemma 3 in float16, whose activations overflow there."""
    auto = table.result(project, project.scored("packed"), "packed")
    assert auto.dtype == ("float16" if project.name == "smollm2" else "bfloat16")
    if auto.dtype == "float16":
        own = table.result(project, project.scored("packed", "--dtype", "bfloat16"), "packed")
        results.append(own)
        assert own.error <= ERROR["bfloat16"] + STEP / 4, own
        assert auto.error < own.error / 2
        assert auto.moved < own.moved / 2


def test_documents_begin_as_the_tokenizer_has_them(project: Project) -> None:
    """Mean loss of the documents' beginnings, scored, against a float32 forward of tokenizer(text)["input_ids"]."""
    losses, own = [], []
    first = {}
    for row in read_rows(project.scored("document")):
        values = stored(row)
        for (start, end), doc_id in zip(spans(row, "document"), row["doc_ids"]):
            first.setdefault((row["source"], doc_id), values[start + 1 : end])
    for key, values in first.items():
        count = len(project.own_truth(key))
        losses.append(values[:count])  # without the EOS, which the tokenizer's call does not add
        own.append(project.own_truth(key))
    assert np.concatenate(losses).mean() == pytest.approx(np.concatenate(own).mean(), abs=0.05)
    behind = project.losses_behind()
    if project.name == "gemma3":
        assert behind["bos"] < behind["none"] - 0.3  # so the line above says something
        assert behind["bos"] < behind["eos"] - 0.3


def test_verify_model_says_what_is_true(project: Project, tmp_path: Path) -> None:
    """The figures of `remit verify --model` against the same made here: of every row, or for the larger model of some."""
    scored = project.scored("packed")
    count = len(project.rows) if project.name == "smollm2" else 4
    figures = tmp_path / "figures.json"
    out = remit("verify", "--shards", scored, "--model", project.model, "--rows", count, "--json", figures)
    said, found = json.loads(figures.read_text()), table.result(project, scored, "packed")
    assert out.rstrip().endswith("OK")
    assert said["rows"] == count
    if count == len(project.rows):
        assert said["tokens"] == found.tokens
        assert said["mean"] == pytest.approx(found.error, abs=2e-4)
        assert said["bias"] == pytest.approx(found.bias, abs=2e-4)
        assert said["weights_changed"] == pytest.approx(found.moved, abs=5e-3)
    else:
        assert said["mean"] == pytest.approx(found.error, rel=0.5)


def expected_step(project: Project, rows: list[dict], context: str, epsilon: float = 0.2) -> dict[str, float]:
    """Eq. 3-6 in float64: base losses of the float32 forward, reference losses as stored."""
    losses, weights = [], []
    for row in rows:
        truth = project.truth(row, context)
        losses.append(-truth[~np.isnan(truth)])
        weights.append(table.weights(stored(row), truth, epsilon))
    loss_N, weight_N = np.concatenate(losses), np.concatenate(weights)
    return {
        "loss": float((weight_N * loss_N).mean()),
        "ntp_loss": float(loss_N.mean()),
        "weight_mean": float(weight_N.mean()),
        "weight_std": float(weight_N.std()),
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TRAINED = ("--global-batch-size", 2, "--max-steps", 2, "--learning-rate", 1e-4, "--min-learning-rate", 1e-4)


@pytest.fixture(scope="session")
def trained(project: Project) -> Path:
    """Two steps in packed context, and the held-out loss before and after."""
    return project.train("trained", project.scored("packed"), *TRAINED, "--eval-shards", project.few)


@pytest.fixture(scope="session")
def untrained(project: Project) -> Path:
    """A step at learning rate 0 in document context."""
    options = ("--learning-rate", 0, "--min-learning-rate", 0, "--max-steps", 1, "--global-batch-size", 2)
    return project.train("untrained", project.scored("document"), *options)


def test_first_step(project: Project, trained: Path, untrained: Path) -> None:
    for run, context in ((trained, "packed"), (untrained, "document")):
        said = metrics(run)[0]
        rows = rows_of_step(project.scored(context), 0, 2, seed=0)
        for name, value in expected_step(project, rows, context).items():
            assert said[name] == pytest.approx(value, abs=2e-4), (context, name)
        if project.name == "smollm2":  # base and reference are one model: whatever is not 0 is the scores' error
            assert said["weight_std"] <= 0.008, context
    assert len(metrics(trained)) == 2
    assert all(np.isfinite(step["loss"]) for step in metrics(trained))


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder's safetensors files as dtype, shape and bytes."""
    import torch

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                tensor = opened.get_tensor(name)
                found[name] = (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def test_export_without_training_is_the_base(project: Project, untrained: Path) -> None:
    export = untrained / "model"
    base_tensors, export_tensors = tensors(project.model), tensors(export)
    assert base_tensors.keys() == export_tensors.keys()
    assert [name for name in base_tensors if base_tensors[name] != export_tensors[name]] == []
    for file in ("config.json", "generation_config.json"):
        base, ours = (json.loads((folder / file).read_text()) for folder in (project.model, export))
        assert ours == base, file
    assert (export / "chat_template.jinja").exists() == (project.model / "chat_template.jinja").exists()
    again = AutoTokenizer.from_pretrained(export)
    file = Tokenizer.from_file(str(export / "tokenizer.json"))
    for text in project.all_texts:
        assert again(text)["input_ids"] == file.encode(text).ids == project.tokenizer(text)["input_ids"]


def test_trained_export_in_transformers_and_vllm(project: Project, trained: Path) -> None:
    """Loaded by transformers as it stands, and scored by vLLM, it gives the same; and it has learned."""
    export = trained / "model"
    assert AutoConfig.from_pretrained(export).model_type == AutoConfig.from_pretrained(project.model).model_type
    model, loading = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(loading.values()), loading
    del model
    assert tensors(export).keys() == tensors(project.model).keys()
    assert tensors(export) != tensors(project.model)

    rows = read_rows(project.scored("packed", "--dtype", "float32", shards=project.few, model=export))
    sequences = [row["input_ids"] for row in rows]
    after = forward.logprobs(export, sequences)
    scored = np.concatenate([stored(row)[1:] for row in rows])
    assert np.abs(scored - np.concatenate(after)).mean() <= ERROR["float32"] + STEP / 4 + 1e-3
    before = forward.logprobs(project.model, sequences)
    evaluations = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    assert evaluations[0]["loss"] == pytest.approx(-np.concatenate(before).mean(), abs=2e-4)
    assert evaluations[-1]["exported_loss"] == pytest.approx(-np.concatenate(after).mean(), abs=2e-4)

    steps = [row for step in (0, 1) for row in rows_of_step(project.scored("packed"), step, 2, seed=0)]
    learned = np.concatenate(forward.logprobs(export, [row["input_ids"] for row in steps])).mean()
    untaught = np.concatenate([project.truth(row, "packed")[1:] for row in steps]).mean()
    assert learned > untaught + 0.02
