"""The recipe's options: against float64, torch's own averages and optimizer, and runs that were never cut."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from annotated import rows_of_step, run
from conftest import make_model
from oracles import load, read_rows, remit_step, row_logprobs
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.cli import expand_config_file, parse
from trainer.average import Average
from trainer.batch import MicroBatch
from trainer.config import TrainConfig, learning_rate_at
from trainer.distributed import World
from trainer.guard import Guard, is_spike
from trainer.head import objective_loss
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.objectives.objective import Objective
from trainer.option_text import join, parse_average, parse_on_nonfinite, parse_steps, show, without
from trainer.reporter import remedy, write_prometheus
from trainer.setup import make_optimizer
from trainer.statistics import StepStatistics
from trainer.train import train

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
VOLATILE = ("tokens_per_second", "data_wait_seconds", "peak_memory_bytes")
CPU = World(torch.device("cpu"))


class Killed(BaseException):
    pass


def strip(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def lines_of(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# --- z-loss


@pytest.mark.parametrize("budget", [1 << 30, 4 * 61 * 6, 1])
@pytest.mark.parametrize("name", ["ntp", "remit", "rho1", "kd", "rkl", "switch", "sampled", "entropy"])
@pytest.mark.parametrize("bias", [False, True])
def test_z_loss_adds_its_float64_gradient(name: str, budget: int, bias: bool) -> None:
    """Of every objective: with the option minus without it is COEF / N sum log^2 Z, in value and gradient."""
    g = torch.Generator().manual_seed(len(name) + budget % 7)
    rows, length, size, vocabulary, coefficient, normaliser = 3, 11, 8, 61, 0.03, 23.0
    hidden = torch.randn(rows, length, size, generator=g)
    weight = 2 * torch.randn(vocabulary, size, generator=g) / size**0.5
    bias_V = torch.randn(vocabulary, generator=g) if bias else None
    predicted = torch.rand(rows, length, generator=g) < 0.8
    predicted[:, 0] = False
    predicted[1, 1:] = False  # a row that predicts nothing
    ids = torch.randint(0, vocabulary, (rows, length), generator=g)
    top = torch.randn(rows, length, vocabulary, generator=g).log_softmax(-1).topk(4)
    gated = torch.rand(rows, length, generator=g) < 0.4
    columns = {
        "logprobs": -5 * torch.rand(rows, length, generator=g),
        "topk_ids": top.indices,
        "topk_logprobs": top.values,
        "entropy": 4 * torch.rand(rows, length, generator=g),
        "entropy_t2": torch.rand(rows, length, generator=g),
        "log_partition_t2": top.values.div(2).exp().sum(-1).mul(1.5).log(),
        "sample_ids": torch.randint(0, vocabulary, (rows, length, 5), generator=g),
    }
    of_gate = {
        "weight": torch.where(gated, 2.5, 1.6),
        "gate_entropy": torch.full((rows, length), 0.3),
        "gate_without_topk": torch.zeros(rows, length),
    }
    settings: dict = {"rho1": {"scope": "micro"}, "switch": {"scope": "micro"}}.get(name, {})
    plain = make_objective(ObjectiveSettings(objective=name, **settings))  # type: ignore[arg-type]
    stored = {column: columns[column] for column in plain.columns} | (of_gate if plain.gate else {})
    batch = MicroBatch(ids, predicted, stored, gated_BT=gated & predicted if plain.gate else None)

    def take(objective: Objective) -> tuple[list[torch.Tensor], StepStatistics]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight) + (() if bias_V is None else (bias_V,))]
        statistics = StepStatistics(figures=objective.figures)
        loss = objective_loss(
            leaves[0], leaves[1], batch, objective, normaliser, bias_V=leaves[2] if bias else None,
            statistics=statistics, logits_budget_bytes=budget,
        )  # fmt: skip
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)], statistics  # type: ignore[list-item]

    (without_z, _), (with_z, statistics) = take(plain), take(Objective(**{**vars(plain), "z_loss": coefficient}))
    leaves = [t.double().requires_grad_() for t in (hidden, weight) + (() if bias_V is None else (bias_V,))]
    row_N, position_N = predicted.nonzero(as_tuple=True)
    logits = leaves[0][row_N, position_N - 1] @ leaves[1].T + (leaves[2] if bias else 0)
    log_z_squared = logits.exp().sum(-1).log().square()
    want = coefficient * log_z_squared.sum() / normaliser
    want.backward()
    assert statistics.z_loss.item() == pytest.approx(log_z_squared.sum().item(), rel=1e-5)
    for got, before, expected in zip(with_z, without_z, [want.detach(), *(leaf.grad for leaf in leaves)]):
        torch.testing.assert_close(got.double() - before.double(), expected, rtol=2e-4, atol=2e-6)


def test_z_loss_in_a_run(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """Gradient norm and figure of a step against float64, with rows of unequal lengths in several micro-batches."""
    line = run(tmp_path / "out", annotated["packed"], models["base"], objective="ntp", z_loss=0.01)[0]
    base = load(models["base"])
    total, squares, count = 0.0, 0.0, 0
    for row in rows_of_step(annotated["packed"], 0, 8, seed=0):
        ids = torch.tensor([row["input_ids"]])
        log_z = base(ids).logits[0, :-1].double().logsumexp(-1)
        losses = [-value for value in row_logprobs(base, row, "packed") if value is not None]
        total, squares, count = total + sum(losses), squares + log_z.square().sum(), count + len(losses)
    ((total + 0.01 * squares) / count).backward()  # type: ignore[union-attr]
    total, squares = float(total.detach()), float(squares.detach())  # type: ignore[union-attr]
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in base.parameters()))
    assert line["z_loss"] == pytest.approx(squares / count, rel=1e-4)
    assert line["loss"] == pytest.approx(total / count, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


# --- decay, schedule


@pytest.mark.parametrize(("tied", "decays"), [(False, False), (True, False), (False, True)])
def test_decay_of_embeddings(tmp_path: Path, tied: bool, decays: bool) -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7), "norm": torch.nn.LayerNorm(4)}
    )
    if tied:
        model["head"].weight = model["embed"].weight
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig("", "", tmp_path, learning_rate=0.5, decay_embeddings=decays))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient nothing but the decay acts
    factor = {"embed.weight": 0.95 if decays else 1.0, "head.weight": 0.95}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * factor.get(name, 1.0))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_last_learning_rate_is_zero(tmp_path: Path, schedule: str) -> None:
    config = TrainConfig(
        "", "", tmp_path, learning_rate=7.4487e-5, min_learning_rate=0, schedule=schedule, warmup_steps=0
    )  # type: ignore[arg-type]
    for steps in (1, 3, 7, 23842):
        assert learning_rate_at(steps, config, steps) == 0.0
        assert steps == 1 or learning_rate_at(steps - 1, config, steps) > 0


def test_linear_to_zero_by_hand(tmp_path: Path) -> None:
    config = TrainConfig("", "", tmp_path, learning_rate=8.0, min_learning_rate=0, schedule="linear", warmup_steps=0)
    assert [learning_rate_at(step, config, 4) for step in (1, 2, 3, 4)] == [6.0, 4.0, 2.0, 0.0]
    branch = TrainConfig(
        "", "", tmp_path, learning_rate=8.0, min_learning_rate=0, schedule="linear", resume_from=Path("x")
    )  # fmt: skip
    assert [learning_rate_at(step, branch, 104, begin=100) for step in (101, 102, 103, 104)] == [6.0, 4.0, 2.0, 0.0]


# --- spikes and numbers that are not finite


def test_spikes_by_hand() -> None:
    """Against torch.std_mean, as OLMo-core has it: above the mean alone, after 63 steps, rows that are not finite apart."""
    g = torch.Generator().manual_seed(0)
    window = torch.randn(128, 2, generator=g, dtype=torch.float64) * torch.tensor([0.1, 2.0]) + torch.tensor([3.0, 9.0])
    std, mean = torch.std_mean(window, 0)
    for column in (0, 1):
        for factor, want in ((5.999, False), (6.001, True), (-50.0, False)):
            latest = mean.clone()
            latest[column] += factor * std[column]
            assert bool(is_spike(window, latest, 6.0)) is want
    far = mean + 100 * std
    assert not is_spike(window[:62], far, 6.0)
    assert is_spike(window[:63], far, 6.0)
    holed = window.clone()
    holed[::2] = math.nan
    assert not is_spike(holed[:100], far, 6.0)  # 50 that count
    assert is_spike(holed, mean + 20 * std, 6.0)
    still = torch.ones(70, 2, dtype=torch.float64)
    assert not is_spike(still, torch.ones(2, dtype=torch.float64), 6.0)
    assert not is_spike(torch.zeros(0, 2, dtype=torch.float64), far, 6.0)


def test_the_guard_goes_on_from_its_state() -> None:
    g = torch.Generator().manual_seed(1)
    numbers = [torch.randn(2, generator=g).double().abs() + 3 for _ in range(200)]
    numbers[90], numbers[150], numbers[199] = (
        torch.tensor([3.0, 900.0]),
        torch.tensor([math.nan, 3.0]),
        torch.tensor([90.0, 3.0]),
    )
    whole, cut = Guard(CPU, 6.0), Guard(CPU, 6.0)
    for step, latest in enumerate(numbers):
        if step % 37 == 0:
            state = json.loads(json.dumps(cut.state()))
            cut = Guard(CPU, 6.0)
            cut.load(state)
        verdicts = [guard.judge(*latest).tolist() for guard in (whole, cut)]
        assert verdicts[0] == verdicts[1] == [step == 150, step in (90, 199)]
        for guard in (whole, cut):
            guard.count(*verdicts[0])
    assert whole.counts == cut.counts
    assert (whole.counts.skipped_nonfinite, whole.counts.skipped_spikes) == (1, 2)
    assert torch.equal(whole._window_W2.nan_to_num(-1), cut._window_W2.nan_to_num(-1))


def test_remedies_tell_a_bad_batch_from_a_divergence() -> None:
    assert "sound: the same command with --skip-steps 9..9 goes on" in remedy(9, math.nan, [1.0] * 10, 0)
    assert "had grown before, to 512, so the run most likely needs a lower --learning-rate" in remedy(
        9, math.inf, [2.0**power for power in range(10)], 0
    )
    assert "3 in a row is more than --on-nonfinite skip:2" in remedy(9, math.nan, [1.0] * 10, 2)


# --- texts of options


def test_texts_of_options() -> None:
    assert parse_steps(("7", "3..4", "5..6", "20..22", "21..30")) == ((3, 7), (20, 30))
    assert show(((3, 7), (9, 9))) == "3..7 9..9"
    assert without(((1, 10),), ((3, 4), (7, 7))) == ((1, 2), (5, 6), (8, 10))
    assert without(((2, 3), (5, 9)), ((1, 6),)) == ((7, 9),)
    assert join([]) == without((), ((1, 2),)) == ()
    assert parse_on_nonfinite("stop") == 0
    assert parse_on_nonfinite("skip:3") == 3
    for good in ("last:1", "ema:0.999", "ema:.5"):
        parse_average(good)
    for bad in ("last:0", "last:x", "ema:1", "ema:0", "ema:nan", "ema:-0.5", "mean:3", "last", ""):
        with pytest.raises(ValueError, match="--average is"):
            parse_average(bad)
    for bad in ("0", "4..3", "a", "3..", "1...2", "-1", "١"):
        with pytest.raises(ValueError, match="--skip-steps has"):
            parse_steps((bad,))
    for bad in ("skip", "skip:0", "go", "skip:-1"):
        with pytest.raises(ValueError, match="--on-nonfinite is"):
            parse_on_nonfinite(bad)


# --- averages


@pytest.mark.parametrize("text", ["ema:0.9", "last:4", "last:9"])
def test_averages_against_torch(text: str) -> None:
    """torch.optim.swa_utils.AveragedModel over the same weights; a state that is loaded goes on with the same bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 5, bias=False))
    frozen = model[0].bias.requires_grad_(False)
    kind, value = text.split(":")
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    average = Average(text, model, num_steps=9)
    for step in range(1, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
        if step == 7:
            state, kept = json.loads(json.dumps(average.state())), average.tensors
            average = Average(text, model, num_steps=9)
            for name, room in average.tensors_to_load(state).items():
                room.copy_(kept[name])
        average.update(step)
        if kind == "ema" or step > 9 - int(value):
            theirs.update_parameters(model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        for name, value_there in theirs.module.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value_there, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    assert frozen.requires_grad is False


def test_a_longer_run_averages_other_steps() -> None:
    model = torch.nn.Linear(2, 2)
    shorter, longer = Average("last:3", model, 9), Average("last:3", model, 12)
    for step in range(1, 10):
        shorter.update(step)
    assert shorter.count == 3
    assert longer.tensors_to_load(shorter.state()) == {}
    assert Average("ema:0.5", model, 12).tensors_to_load(
        {"average": "ema:0.5", "count": 9, "first_step": 1}
    ).keys() == {
        "weight",
        "bias",
    }


# --- runs

EVERYTHING: dict = {
    "z_loss": 1e-4, "skip_spikes": 0.5, "seed": 2, "average": "last:5", "on_nonfinite": "skip:2", "skip_steps": ("6", "9..10"),
    "schedule": "linear", "min_learning_rate": 0.0, "warmup_steps": 1, "decay_embeddings": True, "checkpoint_every": 4,
    "learning_rate": 3e-3, "global_batch_size": 4, "micro_batch_size": 4,
}  # fmt: skip


def test_resume_is_bit_equal_with_every_option(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed around steps that are left out, while the average is made, and between checkpoints; few steps make a spike."""
    monkeypatch.setattr("trainer.guard.FEWEST", 3)
    shards, settings = annotated["packed"], EVERYTHING | {"max_steps": 16}
    whole = run(tmp_path / "whole", shards, models["base"], eval_shards=str(shards), **settings)
    assert [line["step"] for line in whole] == [step for step in range(1, 17) if step not in (6, 9, 10)]
    assert whole[-1]["skipped_steps"] == 3
    assert 0 < whole[-1]["skipped_spikes"] < 8
    assert whole[-1]["lr"] == 0
    config = TrainConfig(
        str(shards), str(models["base"]), tmp_path / "cut", dtype="float32", eval_shards=str(shards), **settings
    )
    for stop in (8, 14):

        def kill(done: int, total: int, metrics: dict, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            train(config, kill)
    train(config)
    assert strip(lines_of(tmp_path / "cut")) == strip(whole)
    assert lines_of(tmp_path / "cut", "evaluation.jsonl") == lines_of(tmp_path / "whole", "evaluation.jsonl")
    for name in ("model", "model-average"):
        files = [(tmp_path / out / name / "model.safetensors").read_bytes() for out in ("cut", "whole")]
        assert files[0] == files[1], name
    exported = json.loads((tmp_path / "cut" / "exported.json").read_text())["models"]["model-average"]
    assert (exported["average"], exported["averaged_steps"]) == ("last:5", 5)
    last = lines_of(tmp_path / "cut", "evaluation.jsonl")[-1]
    want = remit_step(load(tmp_path / "cut" / "model-average"), read_rows(shards), "packed", None, 0.2)["ntp_loss"]
    assert last["average_loss"] == pytest.approx(want, abs=1e-4)
    assert abs(last["loss"] - want) > 1e-4


def test_the_average_is_of_the_exports(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """last:3 is the mean of what three exports hold; the model beside it is that of a run without the option."""
    settings: dict = {"max_steps": 5, "export_every": 1, "export_dtype": "float32", "checkpoint_every": 0}
    run(tmp_path / "out", annotated["packed"], models["base"], average="last:3", **settings)
    run(tmp_path / "plain", annotated["packed"], models["base"], **settings)
    folders = ["exports/step-000003", "exports/step-000004", "model"]
    parts = [load_file(tmp_path / "out" / name / "model.safetensors") for name in folders]
    got = load_file(tmp_path / "out" / "model-average" / "model.safetensors")
    for name, value in got.items():
        want = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
    models_there = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("out", "plain")]
    assert models_there[0] == models_there[1]


def poison(base: Path, out: Path, token: int) -> Path:
    """A copy of a base that gives NaN wherever `token` is read."""
    model = load(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (base / name).exists():
            (out / name).write_bytes((base / name).read_bytes())
    return out


@pytest.fixture(scope="module")
def bad(
    tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]
) -> tuple[Path, int]:
    """A base with a token that gives NaN, and the only one of the first six steps whose batch of two rows has it."""
    steps = [{i for row in rows_of_step(annotated["packed"], s, 2, 0) for i in row["input_ids"]} for s in range(6)]
    for step in (3, 2, 4):
        alone = steps[step] - set().union(*(ids for other, ids in enumerate(steps) if other != step))
        if alone:
            return poison(models["base"], tmp_path_factory.mktemp("bad") / "base", min(alone)), step + 1
    raise AssertionError("no step has a token of its own")


def test_a_bad_batch_is_passed(tmp_path: Path, annotated: dict[str, Path], bad: tuple[Path, int]) -> None:
    """It stops and names the step; --skip-steps goes on, as does --on-nonfinite skip:1, with the weights of one another."""
    base, step = bad
    settings: dict = {"max_steps": 6, "global_batch_size": 2, "checkpoint_every": 1, "average": "ema:0.5"}
    out, shards = tmp_path / "skip", annotated["packed"]
    with pytest.raises(
        FloatingPointError, match=rf"step {step}: loss nan.*--skip-steps {step}\.\.{step} goes on past this batch"
    ):
        run(out, shards, base, **settings)
    with pytest.raises(FloatingPointError, match=f"step {step}: loss nan"):
        run(out, shards, base, **settings)
    with pytest.raises(
        ValueError, match=rf"--skip-steps {step - 1}\.\.{step}: the run in .* has trained to step {step - 1}"
    ):
        run(out, shards, base, skip_steps=(f"{step - 1}..{step}",), **settings)
    lines = run(out, shards, base, skip_steps=(f"{step}..{step}",), **settings)
    assert [line["step"] for line in lines] == [number for number in range(1, 7) if number != step]
    assert [line.get("skipped_steps") for line in lines] == [None if line["step"] < step else 1 for line in lines]
    assert json.loads((out / "run.json").read_text())["changes"] == {"skip_steps": [[step, step]]}
    left_out = run(tmp_path / "left-out", shards, base, on_nonfinite="skip:1", **settings)
    assert [line["skipped_nonfinite"] for line in left_out] == [int(line["step"] > step) for line in left_out]
    for name in ("model", "model-average"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (out, tmp_path / "left-out"))
        for weight, value in one.items():
            # AdamW counts its own steps, so a step that is left out leaves no trace but in the learning rate
            assert torch.equal(value.nan_to_num(9), other[weight].nan_to_num(9)), weight


def test_too_many_in_a_row_end_the_run(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    model = load(models["base"])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    notes: list[str] = []
    config = TrainConfig(
        str(annotated["packed"]), str(tmp_path / "model"), tmp_path / "out", max_steps=9, global_batch_size=2,
        dtype="float32", on_nonfinite="skip:2", checkpoint_every=1,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 3: .* 3 in a row is more than --on-nonfinite skip:2"):
        train(config, note=notes.append)
    assert [note for note in notes if note.startswith("step ")][1].endswith("left out (2 in a row, up to 2 may be)")
    with pytest.raises(FloatingPointError, match=r"step 3: .* 3 in a row"):  # the count goes on after a resume
        train(config)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_run_goes_on_where_its_schedule_allows(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], schedule: str
) -> None:
    """As if it had been planned longer: bit for bit, also from a finished run, and with the first length's warm-up."""
    shards, base = annotated["packed"], models["base"]
    settings: dict = {"schedule": schedule, "global_batch_size": 2, "checkpoint_every": 2, "decay_fraction": 0.5}
    settings["micro_batch_size"] = 2
    whole = run(tmp_path / "whole", shards, base, max_steps=8, warmup_steps=1, **settings)
    config = TrainConfig(str(shards), str(base), tmp_path / "out", max_steps=4, dtype="float32", **settings)
    if schedule == "constant":
        train(config)
        first = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    else:  # two of four steps stay at the peak
        with pytest.raises(Killed):
            train(config, lambda done, total, metrics: (_ for _ in ()).throw(Killed()) if done == 3 else None)
    lines = run(tmp_path / "out", shards, base, max_steps=8, **settings)
    assert strip(lines) == strip(whole)
    for name in ("model/model.safetensors",):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["max_steps"], record["changes"]["max_steps"]) == (4, 8)
    if schedule == "constant":
        assert (tmp_path / "out/exports/step-000004/model.safetensors").read_bytes() == first
        exported = json.loads((tmp_path / "out/exported.json").read_text())["models"]
        assert {name: entry["step"] for name, entry in exported.items()} == {"model": 8, "exports/step-000004": 4}
    assert run(tmp_path / "out", shards, base, max_steps=8, **settings) == lines  # nothing to do
    with pytest.raises(ValueError, match="is a run of 8 steps, of which 8 are done; 4 asked for now"):
        run(tmp_path / "out", shards, base, max_steps=4, **settings)


def test_other_schedules_say_how(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """A finished cosine does not go on; a decay that branches off its checkpoint has weights and optimizer of it."""
    shards, base, out = annotated["packed"], models["base"], tmp_path / "out"
    settings: dict = {"global_batch_size": 2, "checkpoint_every": 3, "learning_rate": 1e-3}
    run(out, shards, base, max_steps=3, **settings)
    with pytest.raises(
        ValueError, match=r"--schedule cosine .*--resume-from .*out/checkpoints/step-000003 --max-steps N --out NEW"
    ):
        run(out, shards, base, max_steps=6, **settings)
    assert (out / "model").exists()
    decays: dict = settings | {"schedule": "wsd", "decay_fraction": 0.5, "checkpoint_every": 1, "keep_checkpoints": 4}
    run(tmp_path / "wsd", shards, base, max_steps=4, **decays)
    with pytest.raises(
        ValueError, match=r"--resume-from .*wsd/checkpoints/step-000002 --max-steps N"
    ):  # before its decay
        run(tmp_path / "wsd", shards, base, max_steps=8, **decays)
    run(tmp_path / "none", shards, base, max_steps=3, **settings | {"checkpoint_every": 0, "schedule": "constant"})
    with pytest.raises(ValueError, match="has no checkpoint of its last step to go on from"):
        run(tmp_path / "none", shards, base, max_steps=6, **settings | {"schedule": "constant"})


def test_a_decay_branches_off_a_checkpoint(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """From a constant run's checkpoint, a line to zero: equal to the last steps of a wsd run, which never stopped."""
    shards, base = annotated["packed"], models["base"]
    settings: dict = {"global_batch_size": 2, "checkpoint_every": 4, "learning_rate": 1e-3, "min_learning_rate": 0.0}
    settings["micro_batch_size"] = 2
    want = run(
        tmp_path / "wsd", shards, base, max_steps=8, schedule="wsd", decay_fraction=0.5, warmup_steps=1, **settings
    )
    run(
        tmp_path / "stable",
        shards,
        base,
        max_steps=6,
        schedule="constant",
        warmup_steps=1,
        average="ema:0.5",
        **settings,
    )
    source = tmp_path / "stable/checkpoints/step-000004"
    branch: dict = settings | {"schedule": "linear", "max_steps": 8, "resume_from": source, "eval_shards": str(shards)}
    config = TrainConfig(str(shards), str(base), tmp_path / "branch", dtype="float32", **branch)
    notes: list[str] = []
    with pytest.raises(Killed):  # before its first own checkpoint
        train(
            config,
            lambda done, total, metrics: (_ for _ in ()).throw(Killed()) if done == 6 else None,
            note=notes.append,
        )
    assert any(
        "begins with step 4 of" in note and note.endswith("max_steps, schedule, warmup_steps, average")
        for note in notes
    ), notes
    source.rename(tmp_path / "moved")
    with pytest.raises((ValueError, OSError), match="step-000004"):
        train(config)
    (tmp_path / "moved").rename(source)
    lines = run(tmp_path / "branch", shards, base, **branch)
    assert strip(lines) == strip(want)[4:]
    assert [line["step"] for line in lines_of(tmp_path / "branch", "evaluation.jsonl")] == [4, 8]
    models_there = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("branch", "wsd")]
    assert models_there[0] == models_there[1]
    (tmp_path / "moved").mkdir()
    cases = [
        ({"max_steps": 4}, "expected more steps than that, not 4"),
        ({"global_batch_size": 4}, "--global-batch-size is not that of the run"),
        ({"resume_from": tmp_path / "moved"}, "is not a checkpoint of a run"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "other", shards, base, **branch | change)
    with pytest.raises(ValueError, match="--model is not that of the run"):
        run(tmp_path / "other", shards, make_model(tmp_path / "other-base", seed=9), **branch)


def test_a_branch_has_its_own_decay(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """Weight decay and its groups are those of the branch, whatever the checkpoint's optimizer had."""
    shards, base = annotated["packed"], models["base"]
    settings: dict = {"global_batch_size": 2, "checkpoint_every": 1, "schedule": "constant", "warmup_steps": 0}
    run(tmp_path / "one", shards, base, max_steps=1, weight_decay=0.1, decay_embeddings=True, **settings)
    source = tmp_path / "one/checkpoints/step-000001"
    outs = []
    for decay in (0.0, 0.5):
        outs.append(tmp_path / f"{decay}")
        run(outs[-1], shards, base, max_steps=2, weight_decay=decay, resume_from=source, **settings)
    before = load_file(tmp_path / "one/model/model.safetensors")
    zero, half = (load_file(out / "model/model.safetensors") for out in outs)
    for name, value in zero.items():
        decays = value.ndim >= 2 and "embed_tokens" not in name
        want = value - (3e-4 * 0.5 * before[name] if decays else 0)
        torch.testing.assert_close(half[name], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("z_loss", 1e-5, "--z-loss is not set there, 1e-05 asked for now"),
        ("skip_spikes", 6.0, "--skip-spikes is not set there, 6.0 asked for now"),
        ("average", "ema:0.9", "--average is not set there, 'ema:0.9' asked for now"),
        (
            "decay_embeddings",
            False,
            "--decay-embeddings is not set there, false asked for now (runs of earlier releases",
        ),
    ],
)
def test_old_runs_are_refused_by_field(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], option: str, value: object, message: str
) -> None:
    settings: dict = {"max_steps": 2, "decay_embeddings": True, "checkpoint_every": 1}
    run(tmp_path / "out", annotated["packed"], models["base"], **settings)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert {"z_loss", "skip_spikes", "average", "decay_embeddings", "changes"}.isdisjoint(record)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path / "out", annotated["packed"], models["base"], **settings | {option: value})


def test_profile_and_prometheus(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    lines = run(
        tmp_path / "out", annotated["packed"], models["base"], max_steps=3, profile=2, prometheus=tmp_path / "p" / "remit.prom"
    )  # fmt: skip
    plain = run(tmp_path / "plain", annotated["packed"], models["base"], max_steps=3)
    assert strip(lines) == strip(plain)
    trace = json.loads((tmp_path / "out/profile/step-000002.json").read_text())
    assert any("optimizer" in event.get("name", "").lower() for event in trace["traceEvents"])
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "p" / "remit.prom").read_text())}
    assert families["remit_train_step"].samples[0].value == 3
    assert families["remit_train_loss"].samples[0].value == lines[-1]["loss"]
    sources = {sample.labels.get("source") for sample in families["remit_train_loss"].samples}
    assert sources >= set(lines[-1]["sources"]) if len(lines[-1]["sources"]) > 1 else sources == {None}
    odd = {'a"b\\c\nd': {"loss": 1.0}, "é": {"loss": 2.0}}
    write_prometheus(tmp_path / "odd.prom", {"step": 1, "loss": 1.5, "sources": odd}, 9)
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "odd.prom").read_text())}
    assert {sample.labels.get("source") for sample in families["remit_train_loss"].samples} == {None, *odd}
    with pytest.raises(ValueError, match="--profile is 4, expected a step of the run, 1 to 3"):
        run(tmp_path / "late", annotated["packed"], models["base"], max_steps=3, profile=4)


def test_numbers_that_are_read_a_step_later_are_the_same(
    tmp_path: Path,
    annotated: dict[str, Path],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    bad: tuple[Path, int],
) -> None:
    """As on a GPU: the same lines in the same order, and a step that is not finite still ends the run."""
    settings: dict = {
        "max_steps": 6,
        "checkpoint_every": 4,
        "skip_steps": ("3",),
        "average": "last:2",
        "global_batch_size": 2,
    }
    want = run(tmp_path / "now", annotated["packed"], models["base"], **settings)
    before = __import__("trainer.reporter", fromlist=["Reporter"]).Reporter
    original = before.__init__

    def later(self: object, *arguments: object, **more: object) -> None:
        original(self, *arguments, **more)
        self.lag = 1  # type: ignore[attr-defined]

    monkeypatch.setattr(before, "__init__", later)
    assert strip(run(tmp_path / "later", annotated["packed"], models["base"], **settings)) == strip(want)
    files = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("now", "later")]
    assert files[0] == files[1]
    base, step = bad
    with pytest.raises(FloatingPointError, match=f"step {step}: loss nan"):
        run(tmp_path / "bad", annotated["packed"], base, max_steps=6, global_batch_size=2)
    assert [line["step"] for line in lines_of(tmp_path / "bad")] == list(range(1, step))


# --- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_files_that_config_takes(path: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        "--config",
        str(path),
        "--shards",
        "scored",
        "--model",
        "base",
        "--out",
        str(tmp_path / "out"),
    ]
    config = parse(expand_config_file(arguments))
    values = yaml.safe_load(path.read_text())
    for name, value in values.items():
        assert getattr(config, name) == value, name
    assert config.decay_embeddings is False
    steps = config.max_steps
    assert learning_rate_at(steps, config, steps) == 0
    assert learning_rate_at(1, config, steps) == pytest.approx(config.learning_rate, rel=1e-3)


def test_the_four_recipes_are_there() -> None:
    assert [path.stem for path in RECIPES] == ["olmo2-1b", "olmo2-7b", "olmo3-7b", "smollm3"]
