"""The most probable tokens at every place: real vLLM in real Ray actors against transformers in float64."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars
import pyarrow as pa
import pyarrow.dataset
import pytest
import safetensors.torch
import torch
from conftest import VOCABULARY, score_to, write_corpus
from entropies import compare_entropies
from faulty import Faulty
from oracles import load, read_rows, row_distributions
from processes import Command, content, part_rows, token_of_one_row
from test_faults import fault, side_file
from test_score import ExactCorpora

from scorer.config import PackConfig
from scorer.pack import pack
from shards import ShardFolder, write_part
from shards.verify import verify_folder

pytestmark = pytest.mark.usefixtures("ray_session")

Remit = Callable[..., tuple[int, str, str]]
NOISE = 1e-4  # nat, between an engine in float32 and transformers


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Rows of 1, 2, 15 and 16 tokens, many documents of two tokens among them."""
    folder = tmp_path_factory.mktemp("short")
    tokenizer = ExactCorpora(tokenizer_folder)
    corpus = [
        str(write_corpus(folder / f"{index}.jsonl", tokenizer.texts_of(length)))
        for index, length in enumerate((1, 2, 15, 16, 17, 32, 33))
    ]
    out = pack(PackConfig(corpus, str(tokenizer_folder), folder / "packed", 16, tokens_per_shard=64)).path
    assert {1, 2, 15, 16} <= {len(row["input_ids"]) for row in read_rows(out)}
    return out


def compare(folder: Path, model: Path, context: str, top_k: int, step: float, every: int = 1) -> int:
    """Every entry against the whole float64 distribution; returns how many ids could be told apart from the next."""
    reference, told_apart = load(model), 0
    with torch.no_grad():
        for row in read_rows(folder)[::every]:
            want = row_distributions(reference, row, context)
            for ids, logprobs, own, token, distribution in zip(
                row["rl_topk_ids"], row["rl_topk_logprobs"], row["rl_logprobs"], row["input_ids"], want, strict=True
            ):
                assert (ids is None, logprobs is None, own is None) == (distribution is None,) * 3
                if distribution is None:
                    continue
                assert len(ids) == len(logprobs) == len(set(ids)) == top_k
                got = torch.tensor(logprobs, dtype=torch.float64)
                assert (got - distribution[ids]).abs().max() <= NOISE + step / 2
                assert got.exp().sum() <= 1 + NOISE + top_k * step
                assert logprobs == sorted(logprobs, reverse=True)
                assert token not in ids or logprobs[ids.index(token)] == own
                best, order = distribution.sort(descending=True)
                assert (distribution[ids] - best[:top_k]).abs().max() <= 2 * NOISE
                gaps = torch.cat([torch.tensor([1.0]), best[:-1] - best[1:], torch.tensor([1.0])])
                clear = torch.minimum(gaps[:top_k], gaps[1 : top_k + 1]) > 4 * NOISE
                assert torch.equal(torch.tensor(ids)[clear], order[:top_k][clear])
                told_apart += int(clear.sum())
                if step:
                    assert all(value / step == round(value / step) for value in logprobs)
                else:
                    assert all(
                        a[0] > b[0] or a[1] < b[1] for a, b in zip(zip(logprobs, ids), zip(logprobs[1:], ids[1:]))
                    )
                if top_k == VOCABULARY:
                    assert sorted(ids) == list(range(VOCABULARY))
                    assert step or abs(got.exp().sum().item() - 1) <= NOISE
    return told_apart


def test_full_rows_equal_transformers(exact: Path, reference_model: Path) -> None:
    assert compare(exact, reference_model, "packed", 5, 0.0, every=4) > 10_000
    report = verify_folder(ShardFolder(exact))
    assert report.problems == []
    entry = json.loads((exact / "_manifest.json").read_text())["references"]["rl"]
    assert (entry["top_k"], entry["vocab_size"]) == (5, VOCABULARY)
    table = pa.ipc.open_file(exact / "part-00000.arrow").read_all()
    assert table.schema.field("rl_topk_ids").type == pa.list_(pa.list_(pa.int32(), 5))
    assert table.schema.field("rl_topk_logprobs").type == pa.list_(pa.list_(pa.float32(), 5))


@pytest.mark.parametrize(
    ("context", "top_k", "step", "settings"),
    [
        pytest.param("packed", 1, 1 / 64, {}, marks=pytest.mark.slow),
        ("document", VOCABULARY, 0.0, {"max_num_batched_tokens": 32, "entropy": True, "entropy_temperature": 2.0}),
        pytest.param(
            *("packed", VOCABULARY, 1 / 64),
            {"max_num_batched_tokens": 32, "entropy": True, "entropy_temperature": 1.5},
            marks=pytest.mark.slow,
        ),
        pytest.param("document", 5, 0.0, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_short_rows_equal_transformers(
    tmp_path: Path, short: Path, reference_model: Path, context: str, top_k: int, step: float, settings: dict
) -> None:
    folder = score_to(
        tmp_path / "out", short, reference_model, context=context, top_k=top_k, logprob_step=step, **settings
    )
    assert compare(folder.path, reference_model, context, top_k, step) > 20 * top_k
    temperature = settings.get("entropy_temperature")
    compared = compare_entropies(folder.path, reference_model, context, step, temperature)
    assert compared > 20 or temperature is None
    assert verify_folder(folder).problems == []


def test_main_column_is_that_without_top_k(exact: Path, scored_rl: Path) -> None:
    for rounded, row in zip(read_rows(scored_rl), read_rows(exact), strict=True):
        for value, other in zip(row["rl_logprobs"], rounded["rl_logprobs"], strict=True):
            assert (value is None) == (other is None)
            assert value is None or abs(value - other) <= 1 / 128 + 1e-5
    entry = json.loads((scored_rl / "_manifest.json").read_text())["references"]["rl"]
    assert not {"top_k", "vocab_size"} & set(entry)


@pytest.mark.usefixtures("ray_session")
def test_bfloat16_has_equal_values_in_the_order_of_ids(tmp_path: Path, short: Path, reference_model: Path) -> None:
    """Each token has a twin with the same output embedding: both columns must still be a function of the model alone."""
    model = tmp_path / "twins"
    shutil.copytree(reference_model, model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    head = weights["lm_head.weight"]
    head[1::2] = head[0:-1:2].clone()
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = score_to(tmp_path / "a", short, model, top_k=40, logprob_step=0.0, dtype="bfloat16").path
    equal = 0
    for row in read_rows(out):
        for ids, logprobs in zip(row["rl_topk_ids"], row["rl_topk_logprobs"]):
            if ids is None:
                continue
            for place in range(39):
                assert (-logprobs[place], ids[place]) < (-logprobs[place + 1], ids[place + 1])
                equal += logprobs[place] == logprobs[place + 1]
    assert equal > 100
    assert verify_folder(ShardFolder(out)).problems == []


# --- the columns in other tools -------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_other_tools_read_the_same(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    columns = ["rl_topk_ids", "rl_topk_logprobs"]
    part = score_to(tmp_path / "out", packed, reference_model, engine="fake", top_k=5).path / "part-00000.arrow"
    want = pyarrow.dataset.dataset(part, format="arrow").to_table().select(columns).to_pydict()
    assert want["rl_topk_ids"][0][0] is None
    assert len(want["rl_topk_ids"][0][1]) == 5
    rounded = [value for row in want["rl_topk_logprobs"] for entry in row if entry is not None for value in entry]
    assert len(rounded) > 1000
    assert all(value * 64 == round(value * 64) for value in rounded)
    frame = polars.read_ipc(part, columns=columns)
    for column in columns:
        assert [
            [None if entry is None else list(entry) for entry in row] for row in frame[column].to_list()
        ] == want[column]  # fmt: skip
    script = f"""
import datasets, json
data = datasets.load_dataset("arrow", data_files="{part}", split="train")
print(json.dumps({{column: data[column][:] for column in {columns}}}))
"""
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == want


def test_a_second_reference_without_top_k_and_the_commands(
    exact: Path, tmp_path: Path, reference_model: Path, remit: Remit
) -> None:
    both = score_to(tmp_path / "both", exact, reference_model, name="sft", engine="fake").path
    for before, after in zip(read_rows(exact), read_rows(both), strict=True):
        assert {key: after[key] for key in before} == before
        assert "sft_topk_ids" not in after
    code, output, error = remit("inspect", "--shards", exact, "--row", 3)
    assert code == 0, error
    third = read_rows(exact)[3]["rl_logprobs"]
    assert all(f"{value:.4f}" in output for value in third if value is not None)
    code, output, error = remit("verify", "--shards", both, "--model", reference_model, "--rows", 4)
    assert (code, output.splitlines()[-1]) == (0, "OK"), error


# --- what is refused ------------------------------------------------------------------------------------


def test_settings_that_do_not_fit(
    tmp_path: Path, packed: Path, scored_rl: Path, exact: Path, reference_model: Path, remit: Remit
) -> None:
    base = ("score", "--shards", packed, "--model", reference_model, "--dtype", "float32")
    exactly = ("--out", exact, "--logprob-step", 0, "--entropy", "--entropy-temperature", 2)
    for arguments, code, message in (
        (("--out", tmp_path / "o", "--top-k", VOCABULARY + 1), 1, "--top-k is 522, expected at most 521"),
        (("--out", tmp_path / "o", "--top-k", -1), 2, "--top-k is -1, expected 0"),
        (("--out", scored_rl, "--top-k", 5), 1, "--top-k is not set there, 5 asked for now"),
        ((*exactly, "--top-k", 4), 1, "--top-k is 5 there, 4 asked for now"),
        (("--shards", exact, "--out", tmp_path / "o", "--name", "rl_topk"), 1, "would give two columns one name"),
    ):
        got, _, error = remit(*base, *arguments)
        assert (got, message in " ".join(error.replace("│", " ").split())) == (code, True), error
    assert not (tmp_path / "o").exists()


def test_ids_of_other_tokens_do_not_pass_a_rescoring(
    tmp_path: Path, exact: Path, reference_model: Path, remit: Remit
) -> None:
    """The last id of each entry is another token's: nothing in the folder contradicts it, the model does."""
    folder, out = ShardFolder(exact), tmp_path / "forged"
    shutil.copytree(exact / "_tokenizer", out / "_tokenizer")
    folder.manifest.write(out)
    for plan in folder.manifest.parts:
        table = pa.ipc.open_file(exact / plan.name).read_all().replace_schema_metadata(None)
        rows = []
        for row in table.to_pylist():
            for token, entry in zip(row["input_ids"], row["rl_topk_ids"]):
                if entry is not None and token not in entry:
                    entry[-1] = next(other for other in range(VOCABULARY) if other not in (*entry, token))
            rows.append(row["rl_topk_ids"])
        place = table.schema.get_field_index("rl_topk_ids")
        altered = table.set_column(place, table.schema.field(place), pa.array(rows, table.schema.field(place).type))
        batches = altered.combine_chunks().to_batches(max_chunksize=folder.manifest.rows_per_batch)
        write_part(out, plan.name, folder.manifest.schema, folder.part_metadata(plan.name), batches)
    assert verify_folder(ShardFolder(out)).problems == []
    code, output, _ = remit("verify", "--shards", exact, "--model", reference_model, "--rows", 4)
    assert (code, "mean |difference| of the top k" in output) == (0, True)
    code, output, _ = remit("verify", "--shards", out, "--model", reference_model, "--rows", 4)
    assert (code, output.strip().splitlines()[-1]) == (1, "FAILED")


# --- rows that come out wrong ---------------------------------------------------------------------------


def by_fake(faulty: Faulty, folder: Path, out: str, **settings: str) -> Path:
    """Score with the fake engine, which errs as `settings` say."""
    run = Command(folder, *faulty.command("score", folder / out, "--top-k", 5), **settings)
    assert run.finish() == 0, run.errors
    return folder / out


@pytest.fixture(scope="module")
def sound(faulty: Faulty, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_fake(faulty, tmp_path_factory.mktemp("sound"), "out")


@pytest.mark.parametrize("kind", ["topk", "nan"])
def test_bad_row_is_set_aside(faulty: Faulty, sound: Path, tmp_path: Path, kind: str) -> None:
    token, part, place = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    out = by_fake(faulty, tmp_path, "out", **fault(**{kind: [token]}))
    found, want = part_rows(out, part), part_rows(sound, part)
    nulls = [None] * len(want[place]["input_ids"])
    columns = ("rl_logprobs", "rl_topk_ids", "rl_topk_logprobs")
    assert found[place] == want[place] | dict.fromkeys(columns, nulls)
    assert found[:place] + found[place + 1 :] == want[:place] + want[place + 1 :]
    (entry,) = side_file(out, part)
    assert {"topk": "a token stands twice", "nan": "not finite"}[kind] in entry["reason"]
    report = verify_folder(ShardFolder(out))
    assert (report.problems, report.quarantined) == ([], {"rl": 1})
    assert verify_folder(ShardFolder(sound)).problems == []


def test_bad_row_once_comes_out_right(faulty: Faulty, sound: Path, tmp_path: Path) -> None:
    token, _, _ = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    out = by_fake(faulty, tmp_path, "out", **fault(topk=[token], once=str(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
    assert content(out) == content(sound)
