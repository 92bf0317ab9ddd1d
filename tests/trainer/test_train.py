"""Training against float64 from the equations, an online reference, and itself cut into pieces."""

import contextlib
import gc
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from annotated import annotate, by_model, rows_of_step, run
from conftest import make_model
from oracles import load, read_rows, remit_step
from safetensors.torch import load_file

from shards import logprobs_column
from shards.manifest import Manifest
from trainer.config import TrainConfig, learning_rate_at
from trainer.deterministic import deterministic
from trainer.distributed import World, connect, spread
from trainer.train import train


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize("objective", ["remit", "ntp"])
def test_first_step_equals_float64(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], context: str, objective: str
) -> None:
    shards = annotated[context]
    metrics = run(tmp_path / "out", shards, models["base"], objective=objective, seed=4)[0]
    base = load(models["base"])
    column = "rl_logprobs" if objective == "remit" else None
    rows = rows_of_step(shards, 0, 8, seed=4)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    want = remit_step(base, rows, context, column, 0.2)
    want["loss"].backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in base.parameters() if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    want["loss"] = want["loss"].item()
    for key, value in want.items():
        assert metrics[key] == (None if value is None else pytest.approx(value, abs=1e-4)), key
    if objective == "remit":
        assert metrics["clipped_low"] > 0.05
        assert metrics["clipped_high"] > 0.05
    assert metrics["tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_accumulation_equals_one_batch(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    for context in ("packed", "document"):
        runs = [
            run(
                tmp_path / f"{context}{size}",
                annotated[context],
                models["base"],
                max_steps=6,
                global_batch_size=4,
                micro_batch_size=size,
            )
            for size in (4, 1)
        ]
        for one, four in zip(*runs, strict=True):
            for key in ("loss", "ntp_loss", "weight_mean", "clipped_low", "clipped_high", "grad_norm"):
                assert one[key] == pytest.approx(four[key], abs=1e-5, rel=1e-5), key


@pytest.mark.parametrize(
    ("context", "step_size", "batch", "tolerance"),
    [
        ("packed", 0.0, 6, 2e-5), ("document", 0.0, 6, 2e-5), ("packed", 1 / 64, 48, 1e-3),
        pytest.param("document", 1 / 64, 48, 1e-3, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_twenty_steps_equal_an_online_reference(
    tmp_path: Path, small: Path, models: dict[str, Path], context: str, step_size: float, batch: int, tolerance: float
) -> None:
    """A loop written from the paper, with the reference's forward in every step and torch's own AdamW.

    Exact log-probs reproduce it; rounded ones add noise of at most 0.004 to a weight, which a batch averages out.
    """
    shards = annotate(small, tmp_path / "shards", by_model(models["reference"], context, step_size), context, step_size)
    metrics = run(
        tmp_path / "out",
        shards,
        models["base"],
        max_steps=20,
        global_batch_size=batch,
        warmup_steps=3,
        learning_rate=1e-3,
    )
    base, reference = load(models["base"]), by_model(models["reference"], context, 0)
    spared = {name for name, p in base.named_parameters() if p.ndim < 2} | {"model.embed_tokens.weight"}
    groups = [
        {"params": [p for name, p in base.named_parameters() if name not in spared], "weight_decay": 0.1},
        {"params": [p for name, p in base.named_parameters() if name in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        rows = rows_of_step(shards, step, batch, seed=0)
        online = [row | {"online": reference(row)} for row in rows]
        want = remit_step(base, online, context, "online", 0.2)
        optimizer.zero_grad()
        want["loss"].backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        n = step + 1
        rate = 1e-3 * n / 3 if n <= 3 else 1e-7 + (1e-3 - 1e-7) * (1 + math.cos(math.pi * (n - 3) / 17)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert metrics[step]["lr"] == pytest.approx(rate)
        assert metrics[step]["loss"] == pytest.approx(want["loss"].item(), abs=tolerance), step
        assert metrics[step]["ntp_loss"] == pytest.approx(want["ntp_loss"], abs=tolerance), step
    assert metrics[-1]["ntp_loss"] < metrics[0]["ntp_loss"] - 0.05


def strip(lines: list[dict]) -> list[dict]:
    volatile = ("tokens_per_second", "data_wait_seconds", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in volatile} for line in lines]


class Killed(BaseException):
    pass


def test_resume_is_bit_equal_also_over_an_epoch(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    shards = annotated["packed"]
    rows = Manifest.read(shards).rows
    settings: dict = {"max_steps": rows // 8 + 9, "micro_batch_size": 4, "checkpoint_every": 4, "seed": 3}
    whole = run(tmp_path / "whole", shards, models["base"], **settings)
    assert len(whole) == settings["max_steps"]

    config = TrainConfig(
        shards, str(models["base"]), tmp_path / "cut", global_batch_size=8, dtype="float32", **settings
    )
    for stop in (6, 10, rows // 8 + 3):

        def kill(done: int, total: int, metrics: dict, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            train(config, kill)
        if stop == 10:  # the newest checkpoint is damaged: the one before it is taken
            file = next((tmp_path / "cut" / "checkpoints" / "step-000008").glob("*.distcp"))
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        if stop == rows // 8 + 3:  # the process died while it wrote a line
            with open(tmp_path / "cut" / "metrics.jsonl", "a") as metrics_file:
                metrics_file.write('{"step": 9')
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert strip(lines) == strip(whole)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()
    assert train(config).steps == settings["max_steps"]  # a finished run is not trained again


def test_exports_in_mid_run_are_the_models_of_shorter_runs(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    settings: dict = {"schedule": "constant", "warmup_steps": 0, "objective": "remit"}
    shards = annotated["packed"]
    config = TrainConfig(
        str(shards), str(models["base"]), tmp_path / "cut", max_steps=5, global_batch_size=8, dtype="float32",
        checkpoint_every=3, export_every=2, **settings,
    )  # fmt: skip

    def kill(done: int, total: int, metrics: dict) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        train(config, kill)
    exports = tmp_path / "cut" / "exports"
    (exports / "step-000004" / "model.safetensors").write_bytes(b"of a run whose step 4 was another one, as on a GPU")
    train(config)  # from step 3: what was exported after it is made again
    assert sorted(path.name for path in exports.iterdir()) == ["step-000002", "step-000004"]
    for step in (2, 4):
        run(tmp_path / f"{step}", shards, models["base"], max_steps=step, micro_batch_size=1, **settings)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            written = (exports / f"step-{step:06d}" / name).read_bytes()
            assert written == (tmp_path / f"{step}" / "model" / name).read_bytes(), name


def test_epochs_visit_every_row_and_end_short(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    manifest = Manifest.read(annotated["packed"])
    metrics = run(
        tmp_path / "out",
        annotated["packed"],
        models["base"],
        max_steps=None,
        epochs=2,
        global_batch_size=25,
        micro_batch_size=25,
    )
    assert len(metrics) == math.ceil(2 * manifest.rows / 25)
    assert metrics[-1]["tokens"] == 2 * manifest.tokens
    assert metrics[-1]["lr"] == pytest.approx(1e-7)


def test_learning_rate_by_hand(tmp_path: Path) -> None:
    config = TrainConfig("shards", "m", tmp_path, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate_at(step, config, 12) for step in (1, 4, 8, 12)]
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"schedule": "linear"}, {4: 1.0, 8: 0.55, 12: 0.1}),
        ({"schedule": "constant"}, {1: 0.25, 4: 1.0, 5: 1.0, 12: 1.0}),
        ({"schedule": "wsd", "decay_fraction": 0.25}, {4: 1.0, 9: 1.0, 10: 0.7, 11: 0.4, 12: 0.1}),
        ({"schedule": "wsd", "decay_fraction": 1.0}, {4: 1.0, 8: 0.55, 12: 0.1}),
        ({"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.01}, {1: 1.0, 11: 1.0, 12: 0.1}),
    ],
)
def test_schedules_by_hand(tmp_path: Path, settings: dict, want: dict[int, float]) -> None:
    settings = {"warmup_steps": 4} | settings
    config = TrainConfig("s", "m", tmp_path, learning_rate=1.0, min_learning_rate=0.1, **settings)
    assert {step: learning_rate_at(step, config, 12) for step in want} == pytest.approx(want)


def test_evaluation_is_the_mean_over_all_tokens(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    run(
        tmp_path / "out",
        annotated["packed"],
        models["base"],
        max_steps=2,
        eval_shards=annotated["packed"],
        eval_every=1,
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    with torch.no_grad():
        want = remit_step(load(models["base"]), read_rows(annotated["packed"]), "packed", None, 0.2)
        after = remit_step(load(tmp_path / "out" / "model"), read_rows(annotated["packed"]), "packed", None, 0.2)
    assert lines[0]["loss"] == pytest.approx(want["ntp_loss"], abs=1e-5)
    assert lines[2]["loss"] == pytest.approx(after["ntp_loss"], abs=1e-5)


def test_dropout_is_off_and_kept_in_the_export(tmp_path: Path, annotated: dict[str, Path]) -> None:
    make_model(tmp_path / "model", "Llama", attention_dropout=0.3)
    metrics = run(tmp_path / "out", annotated["packed"], tmp_path / "model", objective="ntp", seed=4)[0]
    want = remit_step(load(tmp_path / "model"), rows_of_step(annotated["packed"], 0, 8, seed=4), "packed", None, 0.2)
    assert metrics["ntp_loss"] == pytest.approx(want["ntp_loss"], abs=1e-4)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["attention_dropout"] == 0.3


@pytest.mark.parametrize("family", ["Olmo2", "SmolLM3"])
def test_bfloat16_base_trains_in_float32_and_exports_bfloat16(
    tmp_path: Path, annotated: dict[str, Path], family: str
) -> None:
    make_model(tmp_path / "start", family, seed=1)
    load(tmp_path / "start").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    metrics = run(tmp_path / "out", annotated["packed"], tmp_path / "model", seed=4, dtype="bfloat16")[0]
    rows = rows_of_step(annotated["packed"], 0, 8, seed=4)
    want = remit_step(load(tmp_path / "model"), rows, "packed", "rl_logprobs", 0.2)
    assert metrics["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=0.02)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out/model"))
    assert before.keys() == after.keys()  # a tied head is not written twice
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_shapes_of_large_models(tmp_path: Path, annotated: dict[str, Path], dtype: str, tolerance: float) -> None:
    """Tied embeddings, four query heads on one key head, 151,936 embedding rows, unequal rows, document context."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}
    make_model(tmp_path / "model", "Qwen3", vocabulary=151_936, **shape)
    shards = annotated["document"]
    metrics = run(tmp_path / "out", shards, tmp_path / "model", seed=4, dtype=dtype, activation_checkpointing=True)[0]
    base = load(tmp_path / "model")
    want = remit_step(base, rows_of_step(shards, 0, 8, seed=4), "document", "rl_logprobs", 0.2)
    want["loss"].backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in base.parameters() if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=max(1e-3, tolerance))
    for key in ("loss", "ntp_loss", "weight_mean", "clipped_low", "clipped_high"):
        assert metrics[key] == pytest.approx(float(want[key]), abs=tolerance), key


def test_other_settings_do_not_resume(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    run(tmp_path / "out", annotated["packed"], models["base"])
    with pytest.raises(ValueError, match=r"epsilon is 0.2 there, 0.3 asked for now"):
        run(tmp_path / "out", annotated["packed"], models["base"], epsilon=0.3)


def test_column_names() -> None:
    assert logprobs_column("rl") == "rl_logprobs"
    for bad in ("", "Rl", "1x", "a-b", "a b", "x" * 65):
        with pytest.raises(ValueError, match="not usable as a column name"):
            logprobs_column(bad)


def test_deterministic_is_for_gpus_alone_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here has a GPU: that the switches are set, and set back."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    memory = torch.utils.deterministic
    for device, wanted, expected in (("cpu", True, False), ("cuda", False, False), ("cuda", True, True)):
        filled = memory.fill_uninitialized_memory
        with deterministic(torch.device(device), wanted):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert memory.fill_uninitialized_memory == (filled and not expected)
        assert not torch.are_deterministic_algorithms_enabled()
        assert memory.fill_uninitialized_memory == filled


def test_the_setting_reaches_the_run(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is within it; rows are padded to one length, which changes no loss but by rounding."""
    seen = []

    @contextlib.contextmanager
    def recording(device: torch.device, wanted: bool) -> Iterator[None]:
        seen.append((device.type, wanted))
        yield

    monkeypatch.setattr("trainer.train.deterministic", recording)
    plain = run(tmp_path / "plain", annotated["packed"], models["base"])
    padded = run(tmp_path / "padded", annotated["packed"], models["base"], deterministic=True)
    assert seen == [("cpu", False), ("cpu", True)]
    for ours, theirs in zip(padded, plain, strict=True):
        for key in ("loss", "ntp_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_the_model_is_gone_before_the_processes_part(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that goes after its process group waits for the group's threads, which wait for Python's lock: for ever."""
    spread_out: list[weakref.ref] = []
    alive: list[bool] = []

    def watched_spread(module: torch.nn.Module, *more: object) -> torch.nn.Module:
        spread_out.append(weakref.ref(module))
        return spread(module, *more)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def watched_connect(seconds: float) -> Iterator[World]:
        with connect(seconds) as world:
            yield world
            gc.collect()  # as connect does before it destroys the group of several processes
            alive.append(spread_out[0]() is not None)

    monkeypatch.setattr("trainer.model.spread", watched_spread)
    monkeypatch.setattr("trainer.train.connect", watched_connect)
    run(tmp_path / "out", annotated["packed"], models["base"], max_steps=1, checkpoint_every=1)
    assert alive == [False]
