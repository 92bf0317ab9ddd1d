"""Reverse KL and the switch through remit train: the first step against float64, and the gate however a step is divided."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated import annotate, by_model, entropies_by_model, rows_of_step, run, top_by_model
from conftest import VOCABULARY
from oracles import load, read_rows, rkl_step, switch_step
from processes import Ranks
from test_distributed import finish, metrics_of
from test_objectives_train import gradient_norm

from shards import Manifest
from trainer.batch import Row
from trainer.config import TrainConfig
from trainer.gate import gate_rows, quantile
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.train import train

Remit = Callable[..., tuple[int, str, str]]
K, STEP = 6, 1 / 64
LEAST = {0.0: 1e-6, STEP: 1 - math.exp(-STEP / 2)}


def stored(small: Path, out: Path, model: Path, context: str, temperature: float | None, **settings: Any) -> Path:
    """A folder with the columns of the most probable tokens and of the entropies, and two rows without any."""
    step, k = settings.pop("step", STEP), settings.pop("k", K)
    return annotate(
        small, out, by_model(model, context, step), context, step, top=top_by_model(model, context, k, step),
        entropy=entropies_by_model(model, context, temperature, step), temperature=temperature, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, small: Path, models: dict[str, Path]) -> Callable[..., Path]:
    made: dict[tuple, Path] = {}

    def get(context: str, temperature: float | None, step: float = STEP) -> Path:
        key = (context, temperature, step)
        if key not in made:
            out = tmp_path_factory.mktemp("stored") / "shards"
            bad = [number for number, row in enumerate(read_rows(small)) if len(row["input_ids"]) > 5][3::11]
            made[key] = stored(small, out, models["reference"], context, temperature, step=step, unscored=bad)
        return made[key]

    return get


def check(metrics: dict, want: dict, base: torch.nn.Module) -> None:
    want["loss"].backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)
    for key in want:
        assert metrics[key] == pytest.approx(float(torch.as_tensor(want[key]).detach()), abs=1e-4, rel=1e-5), key


@pytest.mark.parametrize(
    ("context", "of_entropies", "temperature", "kd_weight"),
    [("packed", 2.0, 2.0, 0.5), ("document", 0.5, 0.5, 1.0), ("packed", 2.0, 1.0, 0.3), ("packed", 2.0, 8.0, 0.3)],
)
def test_rkl(
    tmp_path: Path, folders: Callable, models: dict[str, Path], context: str, of_entropies: float, temperature: float,
    kd_weight: float,
) -> None:  # fmt: skip
    """The last without a log partition sum at that temperature: the outcomes are softened."""
    shards = folders(context, of_entropies)
    settings: dict = {"objective": "rkl", "kd_weight": kd_weight, "temperature": temperature, "seed": 4}
    metrics = run(tmp_path / "out", shards, models["base"], **settings)[0]
    base, rows = load(models["base"]), rows_of_step(shards, 0, 8, seed=4)
    note = make_objective(
        TrainConfig(str(shards), "m", tmp_path, **settings), Manifest.read(shards).references["rl"]
    ).note
    assert ("log partition sum at temperature 8 is not stored" in note) == (temperature == 8)
    check(metrics, rkl_step(base, rows, context, kd_weight, temperature, LEAST[STEP]), base)
    assert 0 < metrics["missing_mass"] < 1


@pytest.mark.parametrize(
    ("context", "of_entropies", "settings", "step"),
    [
        ("packed", 2.0, {}, STEP),
        ("document", 2.0, {"gate_quantile": 0.45, "scope": "micro"}, STEP),
        ("packed", 8.0, {"temperature": 8.0, "gate_quantile": 0.3}, 0.0),
        ("packed", 2.0, {}, 0.0),
        ("packed", 0.5, {"temperature": 0.5, "gate_quantile": 0.07}, STEP),
        ("packed", None, {"temperature": 1.0}, STEP),
        ("packed", None, {"temperature": 1.0}, 0.25),  # most entropies tie
    ],
)
def test_switch(
    tmp_path: Path, folders: Callable, models: dict[str, Path], context: str, of_entropies: float | None, settings: dict,
    step: float,
) -> None:  # fmt: skip
    shards = folders(context, of_entropies, step)
    metrics = run(tmp_path / "out", shards, models["base"], objective="switch", seed=4, **settings)[0]
    base, rows = load(models["base"]), rows_of_step(shards, 0, 8, seed=4)
    assert any(row["rl_logprobs"][1:2] == [None] and len(row["input_ids"]) > 1 for row in read_rows(shards))
    groups = [[0, 1, 2], [3, 4, 5], [6, 7]] if settings.get("scope") == "micro" else [list(range(8))]
    share, temperature = settings.get("gate_quantile", 0.2), settings.get("temperature", 2.0)
    least = max(1e-6, 1 - math.exp(-step / 2))
    want = switch_step(base, rows, context, groups, share, temperature, least)
    check(metrics, want, base)
    assert metrics["gate_without_topk"] == 0
    if step:  # of these models many entropies tie once they are rounded
        assert metrics["gated"] >= share - 0.05
    else:
        assert metrics["gated"] == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_the_whole_vocabulary_is_dense(
    tmp_path: Path, small: Path, models: dict[str, Path], temperature: float
) -> None:
    """k = 521, not rounded: rkl equals torch's KL of the two models, whatever else is stored."""
    reference = models["reference"]
    shards = annotate(
        small, tmp_path / "shards", by_model(reference, "packed", 0), "packed",
        top=top_by_model(reference, "packed", VOCABULARY),
    )  # fmt: skip
    base, teacher = load(models["base"]), load(reference)
    kl = plain = count = 0
    for row in rows_of_step(shards, 0, 8, seed=4):
        ids = torch.tensor([row["input_ids"]])
        logits_q, logits_p = (model(input_ids=ids).logits[0, :-1].double() for model in (base, teacher))
        q, p = (logits_q / temperature).log_softmax(-1), (logits_p / temperature).log_softmax(-1).detach()
        kl = kl + torch.nn.functional.kl_div(p, q, reduction="sum", log_target=True)
        plain = plain - logits_q.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        count += len(q)
    want = {"loss": (0.5 * temperature**2 * kl + 0.5 * plain) / count, "kd_loss": kl.item() / count}
    metrics = run(tmp_path / "out", shards, models["base"], objective="rkl", temperature=temperature, seed=4)[0]
    for key in want:
        assert metrics[key] == pytest.approx(float(want[key]), abs=1e-5), key
    want["loss"].backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)


def test_a_store_with_top_k_for_sure_tokens_alone(
    tmp_path: Path, small: Path, folders: Callable, models: dict[str, Path]
) -> None:
    """Enough for the gate: what the full store gives. Too little: the tokens without train on next-token loss, counted."""
    whole = folders("packed", 2.0, 0.0)
    settings: dict = {"objective": "switch", "seed": 4, "gate_quantile": 0.3}
    want = run(tmp_path / "whole", whole, models["base"], **settings)[0]
    bad = [number for number, row in enumerate(read_rows(whole)) if row["rl_logprobs"][1:2] == [None]]
    for name, below in (("enough", want["gate_entropy"] + 1e-4), ("little", want["gate_entropy"] - 0.01)):
        shards = stored(small, tmp_path / name, models["reference"], "packed", 2.0, step=0.0, below=below, unscored=bad)
        notes: list[str] = []
        config = TrainConfig(
            str(shards), str(models["base"]), tmp_path / f"run-{name}", max_steps=1, global_batch_size=8, dtype="float32",
            micro_batch_size=3, checkpoint_every=0, **settings,
        )  # fmt: skip
        train(config, note=notes.append)
        (metrics,) = metrics_of(tmp_path / f"run-{name}")
        if name == "enough":
            for key in ("loss", "kd_loss", "gated", "gate_entropy", "gate_without_topk", "grad_norm"):
                assert metrics[key] == want[key], key
            assert not any("tokens stored" in note for note in notes)
            continue
        base, rows = load(models["base"]), rows_of_step(shards, 0, 8, seed=4)
        oracle = switch_step(base, rows, "packed", [list(range(8))], 0.3, 2.0, LEAST[0.0])
        check(metrics, oracle, base)
        lacking = round((want["gated"] - metrics["gated"]) * metrics["predicted_tokens"])
        assert lacking > 0
        assert metrics["gate_without_topk"] == pytest.approx(lacking / metrics["predicted_tokens"])
        assert any(f"step 1: {lacking} of {metrics['predicted_tokens']} tokens at or below" in note for note in notes)
    with pytest.raises(ValueError, match=r"only where rl_entropy_t2 is at most .*score without --top-k-below-entropy"):
        run(tmp_path / "rkl", tmp_path / "enough", models["base"], objective="rkl", seed=4)


# --- the gate ---------------------------------------------------------------------------------------------


def test_quantile_by_hand() -> None:
    values = np.array([5, 1, 4, 2, 3, 2], np.float32)  # sorted: 1 2 2 3 4 5
    assert [quantile(values, share) for share in (0.01, 0.2, 0.39, 0.4, 0.6, 0.99)] == [1, 2, 2, 2, 3, 4]
    assert quantile(np.arange(101, dtype=np.float32), 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert quantile(np.array([7], np.float32), 0.5) == 7


class Ranked:
    """One of several ranks in threads of this process, as far as the gate asks a World."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def _all(self, values: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self.rank] = values
        self._shared["barrier"].wait()
        everyones = [self._shared[rank] for rank in range(self.size)]
        self._shared["barrier"].wait()
        return everyones

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(values))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(values)).sum(0)


def random_rows(seed: int) -> list[Row]:
    """Rows of unequal length, among them a one-token row and one that predicts nothing; entropies that often tie."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(8):
        tokens = [1, 9, 30, 5, 17, 2, 40, 8][number]
        predicted = (np.arange(tokens) > 0) & (number != 3)
        entropy = np.where(predicted, np.round(rng.exponential(1, tokens) * 8) / 8, 0).astype(np.float32)
        ids = np.where(rng.random((tokens, 1)) < 0.2, -1, rng.integers(0, 9, (tokens, 2))).astype(np.int32)
        rows.append(
            Row(str(number), 0, ids[:, 0], np.array([tokens]), predicted, {"entropy_t2": entropy, "topk_ids": ids})
        )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_the_gate_does_not_depend_on_the_division(seed: int) -> None:
    rows = random_rows(seed)
    objective = make_objective(ObjectiveSettings(objective="switch", gate_quantile=0.3))
    gates = ("gated", "weight", "gate_entropy", "gate_without_topk")

    def divided(ranks: int, size: int) -> list[dict[str, list]]:
        shared: dict[str, Any] = {"barrier": threading.Barrier(ranks)}
        found: dict[int, list[Row]] = {}

        def one(rank: int) -> None:
            own = rows[rank::ranks]
            micro = [own[start : start + size] for start in range(0, 8 // ranks, size)]
            world: Any = Ranked(rank, ranks, shared)
            found[rank] = [row for rows in gate_rows(objective, micro, world) for row in rows]

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        whole = [found[place % ranks][place // ranks] for place in range(8)]
        return [{name: row.columns[name].tolist() for name in gates} for row in whole]

    want = divided(1, 8)
    for ranks, size in ((1, 1), (2, 1), (2, 4), (4, 2), (8, 1)):
        assert divided(ranks, size) == want
    predicted = np.concatenate([row.predicted for row in rows])
    entropies = np.concatenate([row.columns["entropy_t2"] for row in rows])[predicted]
    threshold = sorted(entropies.tolist())[math.floor(0.3 * (len(entropies) - 1))]
    kept = np.concatenate([row.columns["topk_ids"][:, 0] >= 0 for row in rows])[predicted]
    gated = np.concatenate([row["gated"] for row in want])[predicted]
    assert gated.tolist() == ((entropies <= threshold) & kept).tolist()
    lacking = np.concatenate([row["gate_without_topk"] for row in want])[predicted]
    assert lacking.tolist() == ((entropies <= threshold) & ~kept).tolist()
    weight = np.concatenate([row["weight"] for row in want])[predicted]
    assert weight[gated].sum() == pytest.approx(len(gated), rel=1e-5)
    assert weight[~gated].sum() == pytest.approx(len(gated), rel=1e-5)
    assert not any(np.array(row["gated"])[~rows[place].predicted].any() for place, row in enumerate(want))


@pytest.mark.usefixtures("starts_processes")
def test_ranks_and_micro_batches_agree(tmp_path: Path, folders: Callable, models: dict[str, Path]) -> None:
    shards, settings = folders("packed", 2.0), {"objective": "switch", "max_steps": 2, "global_batch_size": 8}
    alone = {
        size: run(tmp_path / f"{size}", shards, models["base"], micro_batch_size=size, **settings) for size in (1, 8)
    }
    arguments = ("train", "--shards", shards, "--model", models["base"], "--out", tmp_path / "ranks", "--dtype", "float32",
        "--global-batch-size", 8, "--micro-batch-size", 1, "--max-steps", 2, "--checkpoint-every", 0, "--objective", "switch")  # fmt: skip
    finish(Ranks(tmp_path, list(arguments), 2))
    for other in (alone[1], metrics_of(tmp_path / "ranks")):
        for got, want in zip(other, alone[8], strict=True):
            assert (got["gated"], got["gate_entropy"]) == (want["gated"], want["gate_entropy"])
            for key in ("loss", "kd_loss", "ntp_loss", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=1e-5), key


def test_what_is_not_stored_is_refused(
    remit: Remit, tmp_path: Path, folders: Callable, small: Path, models: dict[str, Path]
) -> None:
    plain = annotate(small, tmp_path / "plain", by_model(models["reference"], "packed", STEP), "packed", STEP)
    for shards, options, message in (
        (plain, ("rkl",), "not its most probable tokens (rl_topk_ids); score with --top-k"),
        (
            plain,
            ("switch",),
            "but not its most probable tokens (rl_topk_ids) and no column rl_log_partition_t2, rl_entropy_t2; score with "
            "--top-k 32 --entropy --entropy-temperature 2,",
        ),
        (
            folders("packed", None),
            ("switch",),
            "no column rl_log_partition_t2, rl_entropy_t2; score with --top-k 6 --entropy --entropy-temperature 2",
        ),
        (
            folders("packed", 2.0),
            ("switch", "--temperature", 1.5),
            " --entropy --entropy-temperature 1.5, or train at a --temperature that is stored",
        ),
    ):
        common = ("train", "--shards", shards, "--model", models["base"], "--out", tmp_path / "out")
        code, _, error = remit(*common, "--objective", *options)
        assert (code, message in " ".join(error.split())) == (1, True), error
    assert not (tmp_path / "out").exists()
