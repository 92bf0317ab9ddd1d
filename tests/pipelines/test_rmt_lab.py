"""The comparison of reinforcement mid-training at equal compute: its graph, its arithmetic, its tables; nothing is trained."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from oracles import contexts, read_rows
from rmt_shards import THRESHOLDS, places_by_tier, with_entropy

from benchmarks.lab.claims import CONTRADICTED, MISSING, ONE_SEED, REPRODUCED, judge_all
from benchmarks.lab.results import Results, read_file, write
from benchmarks.rmt_lab import compute, measure, report
from benchmarks.rmt_lab.claims import CLAIMS, distance_from_budget, last_quarter, shorter
from benchmarks.rmt_lab.graph import RMT_ARMS, SLOW, RmtSeed
from benchmarks.rmt_lab.recipe import RECIPES
from benchmarks.rmt_lab.results import with_thought
from pipelines.cli import parse
from pipelines.flywheel.stages import Stage
from pipelines.rmt.evaluation import draw_held_out
from pipelines.rmt.settings import TIERS
from shards.folder import ShardFolder

ARMS = {"rmt", "rpt", "no-budget", "no-curriculum", "no-ntp", "rmt-slow", "ntp-steps", "remit-steps", "ntp", "remit"}


def parsed(stage: Stage) -> Any:
    assert stage.command[0] == "pipelines.cli"
    return parse([str(word) for word in (*stage.command[1:], *stage.more)])


@pytest.mark.parametrize("size", RECIPES)
def test_graph_can_run_in_two_parts(size: Any) -> None:
    first, whole = RmtSeed(size, 3), RmtSeed(size, 3, 10_000_000, 400_000)
    for seed in (first, whole):
        names = [stage.name for stage in seed.stages]
        assert len(set(names)) == len(names)
        for number, stage in enumerate(seed.stages):
            assert {source.name for source in stage.inputs.values()} <= set(names[:number])
    assert {stage.name for stage in first.stages} < {stage.name for stage in whole.stages}
    commands = {stage.name: stage.command for stage in whole.stages}
    assert all(
        commands[stage.name] == stage.command for stage in first.stages
    )  # so that the first part is not repeated
    assert {arm for arm, kind in whole.models if kind == "mid"} == ARMS
    assert whole.measured.keys() == whole.models.keys()


def test_arms_are_their_settings_and_nothing_else() -> None:
    seed = RmtSeed("small", 0, 50_000_000, 400_000)
    runs = {arm: parsed(seed.models[arm, "mid"]) for arm in ARMS}
    changed = {
        "rmt": {}, "rpt": {"reward": "prefix", "curriculum": "filter", "budget": "off", "ntp_weight": 0.0},
        "no-budget": {"budget": "off"}, "no-curriculum": {"curriculum": "off"}, "no-ntp": {"ntp_weight": 0.0},
    }  # fmt: skip
    assert changed.keys() == RMT_ARMS.keys()
    for arm, values in changed.items():
        differing = {name: value for name, value in vars(runs[arm]).items() if value != vars(runs["rmt"])[name]}
        assert differing == values
    more = {name for name, value in vars(runs[SLOW]).items() if value != vars(runs["rmt"])[name]}
    assert more == {"max_steps"}
    assert runs[SLOW].max_steps == 3 * runs["rmt"].max_steps
    tokens = 16 * 256
    for arm in ("ntp", "ntp-steps", "remit", "remit-steps"):
        assert runs[arm].global_batch_size * 256 == tokens
        assert runs[arm].learning_rate == runs["rmt"].format_learning_rate
    steps = runs["rmt"].format_steps + runs["rmt"].max_steps
    assert runs["ntp-steps"].max_steps == runs["remit-steps"].max_steps == steps
    assert runs["ntp"].max_steps == round(50_000_000 / 3 / tokens)
    assert runs["remit"].max_steps == round(49_600_000 / 3 / tokens)
    assert (runs["remit"].objective, runs["ntp"].objective, runs["remit"].reference) == ("remit", "ntp", "rl")
    for arm in (*RMT_ARMS, SLOW, "remit"):
        scored = seed.models[arm, "mid"].inputs["shards"]
        assert parsed(scored).entropy
        assert scored.inputs["model"] is seed.reference


def test_compute_by_hand() -> None:
    lines = [
        {"phase": "format", "tokens": 1000, "prompt_tokens": 80, "rollout_tokens": 20},
        {"phase": "policy", "tokens": 1300, "prompt_tokens": 160, "rollout_tokens": 40},
        {"phase": "policy", "tokens": 1500, "prompt_tokens": 160, "rollout_tokens": 40},  # without next-token loss
    ]
    format_step = (80 // 8 + 20) + 3 * (80 + 20) + 3 * 900
    policy = (160 // 8 + 40) + 4 * (160 + 40)
    assert compute.rmt_compute(lines, 8) == format_step + (policy + 3 * 100) + policy
    assert compute.equal_steps(3 * 4096 * 7 + 5000, 4096) == 7
    assert compute.equal_steps(5, 4096) == 1


def test_next_tokens_are_those_of_one_row_at_a_time() -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prefixes = [torch.randint(50, (length,)).tolist() for length in (1, 9, 3, 70, 2) * 14]
    double = [int(model.double()(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prefixes]
    assert measure.greedy_next(model.float(), prefixes) == double


def test_accuracy_is_that_of_the_tiers(packed: Path, reference_model: Path, tmp_path: Path) -> None:
    """Of the same positions, found again by pyarrow alone, with one forward for each."""
    shards = with_entropy(packed, tmp_path / "scored")
    model = transformers.AutoModelForCausalLM.from_pretrained(reference_model, dtype="float32").eval()
    config = measure.MeasureConfig(reference_model, tmp_path, shards, tmp_path, positions=12)
    found = measure.bare_accuracy(model, config)
    tiers, rows, hits = places_by_tier(shards, THRESHOLDS), read_rows(shards), {}
    for position in draw_held_out(ShardFolder(str(shards)), "rl", THRESHOLDS, 12, 10**6):
        assert (position.row, position.place) in tiers[position.tier]
        row = rows[position.row]
        start = max(start for start, _ in contexts(row, "document") if start <= position.place)
        guess = int(model(torch.tensor([row["input_ids"][start : position.place]])).logits[0, -1].argmax())
        hits.setdefault(TIERS[position.tier], []).append(guess == row["input_ids"][position.place])
    shares = {f"bare_{tier}": sum(right) / len(right) for tier, right in hits.items()}
    assert {tier: len(right) for tier, right in hits.items()} == {"easy": 12, "medium": 12, "hard": 12}
    assert found == pytest.approx(shares | {"bare_all": sum(shares.values()) / 3})


def made_up(seeds: int, lead: float) -> Results:
    """RMT with its thought `lead` above NTP, give or take a little by seed."""
    results = Results(list(range(seeds)), "small")
    for seed in range(seeds):
        for arm in ("rmt", "ntp", "base", "ntp-steps"):
            for metric in (
                "bare_easy",
                "bare_medium",
                "bare_hard",
                "bare_all",
                "greedy_all",
                "loss_solutions",
                "compute",
                "steps",
            ):
                stage = "pretrained" if arm == "base" else "mid"
                results.values.setdefault((arm, stage, metric), {})[seed] = 0.5 + 0.01 * seed
        results.values.setdefault(("rmt", "mid", "thought_all"), {})[seed] = 0.5 + lead + 0.012 * seed
        for arm, factor in (("rmt", 1.0), ("no-budget", 3.0)):
            curve = [(step, factor * (10.0 - step)) for step in range(1, 9)]
            results.curves.setdefault((arm, "mid", "thought_tokens"), {})[seed] = curve
        results.curves.setdefault(("rmt", "mid", "budget"), {})[seed] = [
            (step, 20.0 - 2 * step) for step in range(1, 9)
        ]
    return results


@pytest.mark.parametrize(
    ("seeds", "lead", "verdict"), [(3, 0.1, REPRODUCED), (3, -0.2, CONTRADICTED), (1, 0.1, ONE_SEED)]
)
def test_claims_can_be_contradicted(seeds: int, lead: float, verdict: str) -> None:
    results = made_up(seeds, lead)
    findings = {finding.claim.text: finding for finding in judge_all(results, CLAIMS)}
    first = findings[CLAIMS[0].text]
    assert first.verdict == verdict
    assert first.estimate.mean == pytest.approx(100 * lead + 0.2 * (seeds - 1) / 2)
    assert findings["RMT is above RPT, both with their thoughts"].verdict == MISSING
    text = report.to_markdown(results)
    assert f"{seeds} seed" in text
    assert ("nothing is claimed" in text) == (seeds == 1)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") > 2 for line in rows)
    assert any(line.startswith("| RMT | 1.00") for line in rows)  # its compute in its own


def test_lengths_of_thoughts() -> None:
    results = made_up(2, 0.0)
    assert last_quarter(results, "rmt") == {0: 2.5, 1: 2.5}  # steps 7 and 8: 3 and 2 tokens
    assert shorter(results) == pytest.approx({0: math.log(3), 1: math.log(3)})
    assert distance_from_budget("rmt")(results) == pytest.approx({0: -math.log(2), 1: -math.log(2)})
    assert distance_from_budget(SLOW)(results) == {}
    text = report.to_markdown(results)
    assert "| budget of RMT | 18.0 | 16.0 |" in text
    assert "budget of RMT, slow budget" not in text


def test_results_are_written_as_the_laboratory_reads_them(tmp_path: Path) -> None:
    tiers = {name: {"accuracy_with_thought": share, "closed": 1.0} for name, share in (("easy", 0.5), ("hard", 0.1))}
    found = with_thought([{"tiers": {}}, {"tiers": tiers}])
    assert found == {"thought_easy": 0.5, "thought_hard": 0.1, "thought_all": pytest.approx(0.3), "closed_all": 1.0}
    rows = [
        {"arm": "rmt", "stage": "mid", "metric": name, "step": None, "value": value} for name, value in found.items()
    ]
    result = {"seed": 4, "size": "small", "recipe": {}, "seconds": {}, "versions": {}, "code": [], "measurements": rows}
    path = write(tmp_path, result)
    assert [about["seed"] for about in read_file(path)[0]] == [4]
    assert json.loads(pq.read_schema(path).metadata[b"seeds"])[0]["seed"] == 4
    text = report.write([tmp_path]).read_text()
    assert "| RMT | 50.0 | 10.0 | 30.0 |" in text
