"""remit verify --model against float64 by other code, and --repair with the refill after it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from annotated import annotate
from conftest import make_model, score_to
from oracles import load, read_rows, row_logprobs

from pipelines.numerics import Numerics, measure
from shards import ShardFolder
from shards.fingerprint import weights_fingerprint

Remit = Callable[..., tuple[int, str, str]]


def expected(shards: Path, model: Path, base: Path, column: str, context: str, epsilon: float) -> dict[str, float]:
    """The figures of verify --model over all rows, in float64."""
    reference, losses_of = load(model).double(), load(base).double()
    differences, changed, clip_changed = [], 0, 0
    with torch.no_grad():
        for row in read_rows(shards):
            again = [v.item() for v in row_logprobs(reference, row, context) if v is not None]
            stored = [v for v in row[column] if v is not None]
            losses = [-v.item() for v in row_logprobs(losses_of, row, context) if v is not None]
            if not stored:
                continue
            differences += [a - b for a, b in zip(stored, again, strict=True)]
            weights, clips = [], []
            for logprobs in (stored, again):
                delta = np.array(losses) + np.array(logprobs)
                raw = 2 / (1 + np.exp(-(delta - delta.mean())))
                weights.append(np.clip(raw, 1 - epsilon, 1 + epsilon))
                clips.append(np.where(raw < 1 - epsilon, -1, np.where(raw > 1 + epsilon, 1, 0)))
            changed += int((np.abs(weights[0] - weights[1]) > 0.02).sum())
            clip_changed += int((clips[0] != clips[1]).sum())
    count = len(differences)
    return {
        "tokens": count,
        "mean": np.abs(differences).mean(),
        "max": np.abs(differences).max(),
        "bias": np.mean(differences),
        "weights_changed": changed / count,
        "clip_changed": clip_changed / count,
    }


@pytest.mark.parametrize(("name", "context"), [("rl", "packed"), ("sft", "document")])
def test_gate_equals_float64(
    tmp_path: Path, scored: Path, reference_model: Path, remit: Remit, name: str, context: str
) -> None:
    base = make_model(tmp_path / "base", seed=9)
    rows = len(read_rows(scored))
    arguments = ("--model", reference_model, "--reference", name, "--rows", rows, "--base", base, "--epsilon", 0.3)
    code, output, error = remit("verify", "--shards", scored, *arguments, "--json", tmp_path / "figures.json")
    assert (code, output.strip().splitlines()[-1]) == (0, "OK"), error
    figures = json.loads((tmp_path / "figures.json").read_text())
    want = expected(scored, reference_model, base, f"{name}_logprobs", context, 0.3)
    assert figures["reference"] == name
    assert figures["passes"]
    assert figures["tokens"] == want["tokens"]
    for key in ("mean", "max", "bias"):
        assert figures[key] == pytest.approx(want[key], abs=2e-5)
    for key in ("weights_changed", "clip_changed"):  # a float32 forward may move one token over an edge
        assert figures[key] == pytest.approx(want[key], abs=2e-3)
    if name == "rl":
        assert 0 < figures["max"] <= 1 / 128 + 1e-4
        assert figures["clip_changed"] > 0


def test_gate_fails_for_a_column_that_is_off(tmp_path: Path, scored_rl: Path, packed: Path, remit: Remit) -> None:
    """The weights are those that the manifest names, but the numbers come from the fake engine's hash."""
    model = make_model(tmp_path / "model", seed=5)
    folder = score_to(tmp_path / "out", packed, model, engine="fake")
    code, _, error = remit("verify", "--shards", folder.path, "--model", model)
    assert code == 1
    assert "comes from the fake engine" in error
    # rewrite the folder as if an engine had said this
    from shards import row_schema, write_part

    references = {"rl": folder.manifest.references["rl"] | {"engine": "vllm"}}
    forged = replace(folder.manifest, references=references)
    shutil.copytree(tmp_path / "out" / "_tokenizer", tmp_path / "forged" / "_tokenizer")
    forged.write(tmp_path / "forged")
    for index, plan in enumerate(forged.parts):
        reader = folder.open_part(plan.name)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        write_part(tmp_path / "forged", plan.name, row_schema(("rl",)), forged.part_metadata(index), batches)
    assert remit("verify", "--shards", tmp_path / "forged")[0] == 0
    arguments = ("--model", model, "--rows", 5, "--json", tmp_path / "figures.json")
    code, output, _ = remit("verify", "--shards", tmp_path / "forged", *arguments)
    assert (code, output.strip().splitlines()[-1]) == (1, "FAILED")
    assert json.loads((tmp_path / "figures.json").read_text())["mean"] > 0.5
    assert "{" not in output
    assert remit("verify", tmp_path / "forged", "--json", tmp_path / "figures.json")[0] == 2


def test_gate_wants_the_model_that_scored(tmp_path: Path, scored: Path, remit: Remit) -> None:
    other = make_model(tmp_path / "other", seed=8)
    for arguments in ((), ("--reference", "sft")):
        code, _, error = remit("verify", "--shards", scored, "--model", other, *arguments)
        assert code == 1
        assert re.search(r"its weights [0-9a-f]{12}\.\. (scored no column|are not those that scored)", error)
    code, _, error = remit("verify", "--shards", scored, "--model", tmp_path / "nowhere" / "x")
    assert (code, "no such folder" in error or "neither a folder" in error) == (1, True)
    assert remit("verify", "--shards", scored, "--rows", 0)[0] == 2


@pytest.mark.usefixtures("ray_session")
def test_repair_and_refill(tmp_path: Path, packed: Path, reference_model: Path, remit: Remit) -> None:
    folder = score_to(tmp_path / "out", packed, reference_model, engine="fake").path
    sound = {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "_score.jsonl"
    }
    flipped, cut, record, orphaned = (f"part-{index:05d}" for index in range(4))
    data = bytearray((folder / f"{flipped}.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / f"{flipped}.arrow").write_bytes(data)
    (folder / f"{cut}.arrow").write_bytes((folder / f"{cut}.arrow").read_bytes()[:-9])
    text = (folder / "_commits" / f"{record}.json").read_bytes()
    (folder / "_commits" / f"{record}.json").write_bytes(text.replace(b'"rows": ', b'"rows": 1'))
    (folder / "_commits" / f"{orphaned}.json").unlink()
    (folder / "part-09999.arrow").write_bytes(b"left by someone")
    code, output, error = remit("verify", "--shards", folder, "--repair")
    assert code == 1
    for name in (flipped, cut, record, orphaned, "part-09999"):
        assert name in error
    moved = re.search(r"/_quarantine/damaged: (.*)", output)
    assert moved
    assert len(moved[1].split(", ")) == 5
    damaged = {path.name for path in (folder / "_quarantine" / "damaged").iterdir()}
    assert {f"{flipped}.arrow", f"{flipped}.json", f"{cut}.arrow", f"{record}.json", "part-09999.arrow"} <= damaged
    untouched = folder / "part-00004.arrow"
    before = untouched.stat().st_mtime_ns
    score = ("score", "--shards", packed, "--model", reference_model, "--out", folder)
    assert remit(*score, "--dtype", "float32", "--engine", "fake")[0] == 0
    assert untouched.stat().st_mtime_ns == before
    assert {path: (folder / path).read_bytes() for path in sound} == sound
    assert remit("verify", "--shards", folder)[0] == 0


@pytest.mark.parametrize(
    ("noise", "bias", "passes"), [(0.0, 0.0, True), (0.11, 0.0, False), (0.0, 0.05, False), (0.0, -0.05, False)]
)
def test_limits_of_a_bfloat16_column(tmp_path: Path, small: Path, noise: float, bias: float, passes: bool) -> None:
    """What transformers gives in bfloat16 passes; noise or a bias on top does not, small as they are beside a wrong model."""
    model = make_model(tmp_path / "model", seed=6)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    network.save_pretrained(model)
    rng = np.random.default_rng(0)

    @torch.no_grad()
    def values(row: dict) -> list:
        found = [None if value is None else value.item() for value in row_logprobs(network, row, "packed")]
        return [None if value is None else min(0, value + bias + noise * rng.normal()) for value in found]

    folder = ShardFolder(annotate(small, tmp_path / "shards", values, "packed"))
    folder.manifest.references["rl"] |= {"weights_sha256": weights_fingerprint(model), "dtype": "bfloat16"}
    numerics = measure(folder, model, "rl", 40, None, 0.2, 0)
    assert numerics.own_mean > 0
    assert (numerics.passes, numerics.dtype) == (passes, "bfloat16"), numerics
    if not passes:
        assert numerics.verdict.endswith("do not train from it")


def test_verdict_says_what_the_share_means() -> None:
    def verdict(share: float, dtype: str = "bfloat16") -> str:
        return Numerics(
            reference="rl", rows=1, tokens=9, mean=0.03, max=0.1, bias=0.0, weights_changed=share, clip_changed=0.0,
            epsilon=0.2, base=None, dtype=dtype, own_mean=0.03, tolerance=0.06, rounding_bias=0.0, bias_tolerance=0.02,
        ).verdict  # fmt: skip

    assert verdict(0.004) == "0.4% of ReMiT's weights change by more than 0.02: as good as exact"
    assert "little beside what the clip lets through" in verdict(0.05)
    assert verdict(0.33).endswith(
        "a third of ReMiT's weights are noise at this precision; score with --dtype float16 or float32"
    )
    assert verdict(0.5).startswith(
        "50.0% of ReMiT's weights change by more than 0.02: 50% of ReMiT's weights are noise"
    )
    assert verdict(0.2, "float16").endswith("score with --dtype float32")
