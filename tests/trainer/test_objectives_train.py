"""Every objective through remit train: the first step against float64 from its definition, on stored columns."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from annotated import annotate, by_model, rows_of_step, run, top_by_model
from conftest import VOCABULARY, make_model
from oracles import kd_step, load, remit_step, rho1_step, row_logprobs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.manifest import CorpusFile, Manifest
from trainer.objectives.objective import Objective, Weighted
from trainer.objectives.settings import ObjectiveSettings
from trainer.statistics import Sources
from trainer.train import train as train_run

Remit = Callable[..., tuple[int, str, str]]
K = 6


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, small: Path, models: dict[str, Path]) -> dict[str, Path]:
    """Per context a folder with columns rl (rounded, top 6), sft (another model) and base (exact), in three steps."""
    folder = tmp_path_factory.mktemp("several")
    other = make_model(folder / "sft", seed=7)
    result = {}
    for context in ("packed", "document"):
        step = 1 / 64
        model, top = models["reference"], top_by_model(models["reference"], context, K, step)
        one = annotate(small, folder / context / "1", by_model(model, context, step), context, step, top=top)
        two = annotate(one, folder / context / "2", by_model(other, context, step), context, step, name="sft")
        result[context] = annotate(
            two, folder / context / "3", by_model(models["base"], context, 0), context, name="base"
        )
    return result


def gradient_norm(model: torch.nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))


def check(metrics: dict, want: dict, base: torch.nn.Module) -> None:
    want["loss"].backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)
    for key in set(want) & set(metrics):
        assert metrics[key] == pytest.approx(float(want[key]), abs=1e-4), key


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize(("scope", "micro_batch_size"), [("row", 3), ("micro", 3), ("global", 3), ("global", 8)])
def test_rho1(
    tmp_path: Path, several: dict[str, Path], models: dict[str, Path], context: str, scope: str, micro_batch_size: int
) -> None:
    settings = {"objective": "rho1", "keep_ratio": 0.6, "scope": scope, "seed": 4, "micro_batch_size": micro_batch_size}
    metrics = run(tmp_path / "out", several[context], models["base"], **settings, context=context)[0]
    groups = {"row": [[row] for row in range(8)], "micro": [[0, 1, 2], [3, 4, 5], [6, 7]], "global": [list(range(8))]}
    base, rows = load(models["base"]), rows_of_step(several[context], 0, 8, seed=4)
    want = rho1_step(base, rows, context, "rl_logprobs", groups[scope], 0.6)
    check(metrics, want, base)
    assert metrics["weight_histogram"] == {"0.00": want["predicted_tokens"] - want["kept"], "1.65": want["kept"]}
    assert metrics["effective_tokens"] == pytest.approx(want["kept"])


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize(("missing_mass", "temperature"), [("bucket", 1.0), ("renormalise", 1.0), ("bucket", 2.0)])
def test_kd(
    tmp_path: Path,
    several: dict[str, Path],
    models: dict[str, Path],
    context: str,
    missing_mass: str,
    temperature: float,
) -> None:
    settings = {"kd_weight": 0.3, "temperature": temperature, "missing_mass": missing_mass}
    metrics = run(tmp_path / "out", several[context], models["base"], objective="kd", seed=4, **settings)[0]
    base, rows = load(models["base"]), rows_of_step(several[context], 0, 8, seed=4)
    want = kd_step(base, rows, context, "rl", settings)
    check(metrics, want, base)
    assert want["missing_mass"] > 0.1
    assert metrics["delta_mean"] == pytest.approx(
        remit_step(base, rows, context, "rl_logprobs", 0.2)["delta_mean"], abs=1e-4
    )


def test_kd_from_a_reference_with_more_padding_rows(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    """Refused before the first step where a stored id is beyond the base's embedding, and trained where none is."""
    wide = make_model(tmp_path / "wide", seed=5, vocabulary=VOCABULARY + 64)
    for name, model in (("bad", wide), ("good", models["reference"])):
        logprobs, top = by_model(model, "packed", 0), top_by_model(model, "packed", 8)
        annotate(small, tmp_path / name, logprobs, "packed", top=top, vocab_size=VOCABULARY + 64)
    settings: dict = {"objective": "kd", "seed": 4}
    assert run(tmp_path / "out", tmp_path / "good", models["base"], **settings)[0]["kd_loss"] > 0
    told = rf"the base has {VOCABULARY} embedding rows, the reference 'rl' {VOCABULARY + 64}: .*smaller --top-k"
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "out2", tmp_path / "bad", models["base"], **settings)
    assert not (tmp_path / "out2" / "metrics.jsonl").exists()


def test_kd_with_the_whole_vocabulary_is_dense(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    """Stored without rounding, k = 521: the dense forward KL between the two models, and the NTP loss beside it."""
    reference = models["reference"]
    top = top_by_model(reference, "packed", VOCABULARY)
    shards = annotate(small, tmp_path / "shards", by_model(reference, "packed", 0), "packed", top=top)
    base, teacher = load(models["base"]), load(reference)
    rows = rows_of_step(shards, 0, 8, seed=4)
    kl = plain = count = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        q, p = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (base, teacher))
        kl = kl + torch.nn.functional.kl_div(q, p.detach(), reduction="sum", log_target=True)
        plain = plain - q.gather(1, ids[0, 1:, None]).sum()
        count += len(q)
    want = {"loss": (0.5 * kl + 0.5 * plain) / count, "kd_loss": kl.item() / count, "missing_mass": 0.0}
    for missing_mass in ("bucket", "renormalise"):
        out = tmp_path / missing_mass
        metrics = run(out, shards, models["base"], objective="kd", missing_mass=missing_mass, seed=4)[0]
        for key in want:
            assert metrics[key] == pytest.approx(float(want[key]), abs=1e-5), key
    want["loss"].backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)


def variant_step(base: torch.nn.Module, rows: list[dict], context: str, settings: dict) -> dict:
    """ReMiT's variants in float64, one token after the other."""
    total, count, weights = 0.0, 0, []
    for row in rows:
        losses = row_logprobs(base, row, context)
        places = [t for t, value in enumerate(losses) if value is not None]
        piece = np.repeat(range(len(row["doc_lengths"])), row["doc_lengths"])
        delta = {t: -losses[t].item() + row["rl_logprobs"][t] for t in places}
        for t in places:
            same = [delta[u] for u in places if settings["centring"] == "row" or piece[u] == piece[t]]
            x = delta[t] - (0 if settings["centring"] == "none" else sum(same) / len(same))
            raw = {"sigmoid": 2 / (1 + math.exp(-x)), "exp": math.exp(x / 2), "linear": max(0, 1 + x / 2)}
            epsilon = settings["epsilon"]
            weights.append(min(max(raw[settings["weight_map"]], 1 - epsilon), 1 + epsilon))
            total = total - weights[-1] * losses[t]
            count += 1
    return {"loss": total / count, "weight_mean": sum(weights) / count, "weight_std": float(np.std(weights))}


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize(
    ("centring", "weight_map", "epsilon"),
    [
        ("document", "sigmoid", 0.2),
        ("none", "sigmoid", 0.35),
        ("row", "sigmoid", math.inf),
        ("document", "exp", 0.9),
        ("row", "linear", math.inf),
    ],
)
def test_remit_variants(
    tmp_path: Path,
    several: dict[str, Path],
    models: dict[str, Path],
    context: str,
    centring: str,
    weight_map: str,
    epsilon: float,
) -> None:
    settings = {"centring": centring, "weight_map": weight_map, "epsilon": epsilon}
    metrics = run(tmp_path / "out", several[context], models["base"], seed=4, **settings)[0]
    base = load(models["base"])
    check(metrics, variant_step(base, rows_of_step(several[context], 0, 8, seed=4), context, settings), base)
    json.loads((tmp_path / "out/run.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in run.json"))
    run(tmp_path / "out", several[context], models["base"], seed=4, **settings)  # the same settings are recognised


def test_another_reference(tmp_path: Path, several: dict[str, Path], models: dict[str, Path]) -> None:
    metrics = run(tmp_path / "out", several["packed"], models["base"], reference="sft", seed=4)[0]
    base = load(models["base"])
    rows = rows_of_step(several["packed"], 0, 8, seed=4)
    check(metrics, remit_step(base, rows, "packed", "sft_logprobs", 0.2), base)
    # the base as its own reference: every weight is 1
    same = run(tmp_path / "same", several["packed"], models["base"], reference="base", seed=4)[0]
    assert same["weight_std"] < 1e-5
    assert same["delta_quantiles"]["0.5"] == 0


def test_figures_by_source(tmp_path: Path, several: dict[str, Path], models: dict[str, Path]) -> None:
    """Forty corpus files without folders count as one; sums, histogram and quantiles by brute force."""
    metrics = run(tmp_path / "out", several["packed"], models["base"], seed=4, global_batch_size=20)[0]
    rows = rows_of_step(several["packed"], 0, 20, seed=4)
    base = load(models["base"])
    delta, weights = [], []
    with torch.no_grad():
        for row in rows:
            losses = [-value for value in row_logprobs(base, row, "packed")[1:]]
            excess = np.array([float(a) + b for a, b in zip(losses, row["rl_logprobs"][1:])])
            delta += excess.tolist()
            weights += np.clip(2 / (1 + np.exp(excess.mean() - excess)), 0.8, 1.2).tolist() if len(excess) else []
    assert metrics["predicted_tokens"] == len(weights)
    assert metrics["effective_tokens"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-5)
    bins = Counter(f"{round(weight / 0.05) * 0.05:.2f}" for weight in weights)
    counted = metrics["weight_histogram"]
    assert sum(abs(counted.get(key, 0) - bins[key]) for key in {*bins, *counted}) <= 2  # on an edge between two bins
    for share, value in metrics["delta_quantiles"].items():
        exact = sorted(delta)[max(0, math.ceil(float(share) * len(delta)) - 1)]
        assert abs(value - exact) <= 1 / 64 + 1e-4, share
    assert list(metrics["sources"]) == ["(no folder)"]
    whole = {key: value for key, value in metrics.items() if key in metrics["sources"]["(no folder)"]}
    assert metrics["sources"]["(no folder)"] == whole


def corpus(*paths: str) -> list[CorpusFile]:
    return [CorpusFile(path, 1, "0", 1, 1, 0, 0, 1, 10 + index) for index, path in enumerate(paths)]


def test_sources_are_files_or_folders() -> None:
    assert Sources(corpus("a.jsonl", "b/c.jsonl", "b/d.jsonl")).names == ["a.jsonl", "b/c.jsonl", "b/d.jsonl"]
    many = Sources(corpus(*(f"web/{n}.jsonl" for n in range(20)), "math/x.jsonl", "hf://org/name@main", "top.jsonl"))
    assert many.names == ["web", "math", "hf://org/name@main", "(no folder)"]
    assert many.group == [0] * 20 + [1, 2, 3]
    shards = [f"hf://org/name@main::train#{n:05d}-of-00020" for n in range(20)]
    assert Sources(corpus(*shards, "x.jsonl")).names == ["hf://org/name@main::train", "x.jsonl"]
    mixed = Sources(corpus(*shards, *(f"web/{n}.jsonl" for n in range(20)), "mine:de:test"))
    assert mixed.names == ["hf://org/name@main::train", "web", "mine:de:test"]
    crowd = Sources(corpus(*(f"{n}/x.jsonl" for n in range(30))))
    assert len(crowd.names) == 16
    assert crowd.names[0] == "(others)"
    assert crowd.group == [0] * 15 + list(range(1, 16))  # the largest ones have a figure of their own


def test_sources_in_a_run(tmp_path: Path, scored_rl: Path) -> None:
    """Four corpus files: each row counts for its own."""
    make_model(tmp_path / "base", seed=5)
    rows = Manifest.read(scored_rl).rows
    metrics = run(tmp_path / "out", scored_rl, tmp_path / "base", global_batch_size=rows, micro_batch_size=16)[0]
    manifest = Manifest.read(scored_rl)
    want = {file.path: file.tokens - file.rows for file in manifest.corpus}
    assert {name: figures["predicted_tokens"] for name, figures in metrics["sources"].items()} == want
    for key in ("loss", "ntp_loss", "weight_mean", "clipped_low", "delta_mean"):
        mean = sum(figures[key] * figures["predicted_tokens"] for figures in metrics["sources"].values())
        assert mean / metrics["predicted_tokens"] == pytest.approx(metrics[key], rel=1e-9)


def test_figures_of_several_sources(tmp_path: Path, scored_rl: Path) -> None:
    """Each source's histogram, clip shares, effective tokens and quantiles against float64 over its own rows."""
    make_model(tmp_path / "base", seed=5)
    manifest = Manifest.read(scored_rl)
    metrics = run(tmp_path / "out", scored_rl, tmp_path / "base", seed=4, global_batch_size=24, micro_batch_size=5)[0]
    base, by_file = load(tmp_path / "base"), {}
    with torch.no_grad():
        for row in rows_of_step(scored_rl, 0, 24, seed=4):
            losses = [-float(value) for value in row_logprobs(base, row, "packed")[1:]]
            excess = np.array([a + b for a, b in zip(losses, row["rl_logprobs"][1:])])
            if len(excess):
                raw = 2 / (1 + np.exp(excess.mean() - excess))
                by_file.setdefault(manifest.corpus[row["source"]].path, []).append((excess, raw))
    assert len(by_file) > 1
    assert set(metrics["sources"]) == set(by_file)
    for name, rows in by_file.items():
        figures = metrics["sources"][name]
        excess, raw = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
        weights = raw.clip(0.8, 1.2)
        assert figures["predicted_tokens"] == len(weights)
        assert figures["effective_tokens"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-5)
        assert figures["clipped_low"] == pytest.approx((raw < 0.8).mean(), abs=2 / len(raw))
        assert figures["clipped_high"] == pytest.approx((raw > 1.2).mean(), abs=2 / len(raw))
        assert figures["delta_mean"] == pytest.approx(excess.mean(), abs=1e-4)
        bins = Counter(f"{round(weight / 0.05) * 0.05:.2f}" for weight in weights)
        counted = figures["weight_histogram"]
        assert sum(abs(counted.get(key, 0) - bins[key]) for key in {*bins, *counted}) <= 4
        for share, value in figures["delta_quantiles"].items():
            exact = sorted(excess)[max(0, math.ceil(float(share) * len(excess)) - 1)]
            assert abs(value - exact) <= 1 / 64 + 1e-3, (name, share)


def test_the_division_of_scope_micro_is_a_setting(
    tmp_path: Path, several: dict[str, Path], models: dict[str, Path]
) -> None:
    settings = {"objective": "rho1", "scope": "micro"}
    run(tmp_path / "out", several["packed"], models["base"], micro_batch_size=4, **settings)
    with pytest.raises(ValueError, match="--micro-batch-size is 4 there, 2 asked for now"):
        run(tmp_path / "out", several["packed"], models["base"], micro_batch_size=2, **settings)


def test_excess_loss_where_an_objective_does_not_give_it(
    tmp_path: Path, several: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight function that only returns weights: the excess loss is known all the same; without a column it is None."""
    for columns in (("logprobs",), ()):
        monkeypatch.setattr(
            "trainer.objectives.ntp.make",
            lambda settings, columns=columns: Objective(
                lambda t: Weighted(torch.ones_like(t.losses_N)), columns=columns
            ),
        )
        metrics = run(tmp_path / f"{len(columns)}", several["packed"], models["base"], objective="ntp", seed=4)[0]
        if columns:
            rows = rows_of_step(several["packed"], 0, 8, seed=4)
            want = remit_step(load(models["base"]), rows, "packed", "rl_logprobs", 0.2)["delta_mean"]
            assert metrics["delta_mean"] == pytest.approx(want, abs=1e-4)
            assert metrics["delta_quantiles"]["0.01"] > -16
        else:
            assert metrics["delta_mean"] is None
            assert metrics["delta_quantiles"] is None


KILLED_RUN = """
import os, sys
from pathlib import Path
from trainer.config import TrainConfig
from trainer.train import train
shards, model, out = sys.argv[1:]
config = TrainConfig(shards, model, Path(out), max_steps=40, global_batch_size=2, checkpoint_every=10, dtype="float32")
train(config, lambda done, total, metrics: os._exit(9) if done == 31 else None)
"""


@pytest.mark.usefixtures("starts_processes")
def test_tensorboard_of_a_killed_run_has_every_step(
    tmp_path: Path, several: dict[str, Path], models: dict[str, Path]
) -> None:
    """Killed after step 31 without a chance to flush: what the checkpoint of step 30 covers is on the disk."""
    arguments = [str(several["packed"]), str(models["base"]), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], cwd=root).returncode == 9
    subprocess.run([sys.executable, "-c", KILLED_RUN.replace("31", "99"), *arguments], cwd=root, check=True)
    scalars = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 41))


def test_tensorboard_of_a_resumed_run(tmp_path: Path, several: dict[str, Path], models: dict[str, Path]) -> None:
    """Stopped after step 3 with a checkpoint of step 2: every step once, as in metrics.jsonl."""
    from trainer.config import TrainConfig

    settings = {"max_steps": 5, "global_batch_size": 8, "checkpoint_every": 2, "dtype": "float32", "objective": "rho1"}
    config = TrainConfig(str(several["packed"]), str(models["base"]), tmp_path / "out", micro_batch_size=4, **settings)

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, metrics: dict) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train_run(config, kill)
    train_run(config)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    whole = run(tmp_path / "whole", several["packed"], models["base"], micro_batch_size=4, **settings)
    volatile = ("tokens_per_second", "data_wait_seconds", "peak_memory_bytes")
    assert [{k: v for k, v in line.items() if k not in volatile} for line in lines] == [
        {k: v for k, v in line.items() if k not in volatile} for line in whole
    ]
    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    for key in ("loss", "grad_norm", "effective_tokens"):
        scalars = events.Scalars(f"train/{key}")
        assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
        assert [event.value for event in scalars] == pytest.approx([line[key] for line in lines], rel=1e-5)
    (histogram,) = [event.histogram_value for event in events.Histograms("train/weights") if event.step == 1][:1]
    assert sum(histogram.bucket) == lines[0]["predicted_tokens"]
    # TensorBoard spreads a bucket from the limit before it to its own: none may reach over weights that nobody has
    limits = [histogram.min, *histogram.bucket_limit]
    filled = [(low, high) for low, high, n in zip(limits, limits[1:], histogram.bucket) if n]
    assert [tuple(round(edge, 3) for edge in edges) for edges in filled] == [(-0.025, 0.025), (1.225, 1.275)]


def test_bad_options_are_named(remit: Remit, tmp_path: Path, several: dict[str, Path], models: dict[str, Path]) -> None:
    common = ("train", "--shards", several["packed"], "--model", models["base"], "--out", tmp_path / "out")
    for options, code, message in (
        (("--objective", "rho1", "--keep-ratio", 0), 2, "--keep-ratio is 0.0, expected a share between 0 and 1"),
        (("--objective", "rho2"), 2, "rho2"),
        (
            ("--objective", "kd", "--reference", "sft"),
            1,
            "not its most probable tokens (sft_topk_ids); score with --top-k",
        ),
        (("--objective", "kd", "--reference", "other"), 1, "no log-probs of a reference named 'other'"),
        (("--objective", "kd", "--temperature", "hot"), 2, "temperature"),
        (("--keep-ratio", 0.5), 2, "--keep-ratio belongs to --objective rho1"),
        (("--epsilon", 2), 2, "or inf for no clip"),
    ):
        got, _, error = remit(*common, *options)
        words = " ".join(error.replace("│", " ").split())
        assert (got, message in words) == (code, True), error
    assert not (tmp_path / "out").exists()


def test_settings_of_others_do_not_matter_for_a_resume(
    tmp_path: Path, several: dict[str, Path], models: dict[str, Path]
) -> None:
    run(tmp_path / "out", several["packed"], models["base"], objective="rho1", keep_ratio=0.5)
    assert "epsilon" not in json.loads((tmp_path / "out/run.json").read_text())
    with pytest.raises(ValueError, match=r"--keep-ratio is 0.5 there, 0.6 asked for now"):
        run(tmp_path / "out", several["packed"], models["base"], objective="rho1", keep_ratio=0.6)
    with pytest.raises(ValueError, match="objective is 'rho1' there, 'remit' asked for now"):
        run(tmp_path / "out", several["packed"], models["base"])
    assert ObjectiveSettings().objective == "remit"
