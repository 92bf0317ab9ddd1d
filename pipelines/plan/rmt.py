"""What reinforcement mid-training (remit rmt) would cost: tokens of the rollouts, and the hours of engine and trainer.

T = steps, |C| = positions of a step, G = rollouts of a position, B_t = tokens of thought asked for in step t.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.plan.costs import Rates
from pipelines.plan.hardware import Machine
from pipelines.plan.settings import PlanConfig
from pipelines.rmt.budget import budget_at
from trainer.memory import Layout, memory
from trainer.model_shape import ModelShape

LONGEST_PREFIX = 4096  # of remit rmt, unless --max-prefix says otherwise
Assumption = tuple[str, float | None, str, str]


@dataclass(frozen=True)
class RmtJob:
    """A run of remit rmt. prompt: tokens before the thought on average; answer: closing tag and answer."""

    steps: int
    positions: int
    generations: int
    first_budget: int
    least_budget: int
    budget_decay: float
    prompt: float
    answer: float
    seq_len: int


@dataclass(frozen=True)
class RmtTokens:
    """Tokens of a whole run. prefilled: by the engines, the prompt of a position once for all its rollouts; decoded: thoughts
    and answers; learned: prompts and completions of all rollouts, as the trainer sees them; predicted: of the rows that are
    learned by next-token prediction; most_decoded: where every thought goes on to twice its budget."""

    prefilled: float
    decoded: float
    learned: float
    predicted: float
    most_decoded: float


def tokens_of(job: RmtJob) -> RmtTokens:
    """A thought has as many tokens as its prompt asks for; each position lies in a row of its own."""
    budgets = sum(
        budget_at(step, job.steps, job.first_budget, job.least_budget, job.budget_decay) for step in range(1, job.steps + 1)
    )  # fmt: skip
    rollouts = job.positions * job.generations
    decoded = rollouts * (budgets + job.steps * job.answer)
    return RmtTokens(
        prefilled=job.steps * job.positions * job.prompt,
        decoded=decoded,
        learned=rollouts * job.steps * job.prompt + decoded,
        predicted=job.steps * job.positions * job.seq_len,
        most_decoded=rollouts * (2 * budgets + job.steps * job.answer),
    )


def seconds_of(
    tokens: RmtTokens, base: ModelShape, rates: Rates, prefill_rate: float, decode_rate: float, num_gpus: int
) -> dict[str, float]:
    """Wall seconds by part, of all GPUs. Rollouts cost the trainer a step of NTP and a forward: TRL asks for their log-probs
    again, to weigh those of the engine. Engines and training take turns."""
    again = rates.train * base.forward_flops / base.train_flops
    return {
        "rollouts, prefill": tokens.prefilled / prefill_rate / num_gpus,
        "rollouts, decode": tokens.decoded / decode_rate / num_gpus,
        "train on rollouts": tokens.learned * (rates.train + again) / num_gpus,
        "train on all other tokens": tokens.predicted * rates.train / num_gpus,
        "start": rates.train_start_seconds + rates.score_start_seconds,
    }


def rmt_assumptions(config: PlanConfig) -> list[Assumption]:
    """name, default, unit and source, as figures.assume lists them; no defaults without --rmt-steps."""
    prompt = min(config.seq_len, LONGEST_PREFIX) / 2
    listed: list[Assumption] = [
        ("rmt_positions", 128, "per step", "|C| of remit rmt, as RMT's batch; each in a row of its own"),
        ("rmt_generations", 8, "per position", "G, RMT's"),
        ("rmt_first_budget", 800, "tokens", "B_0, RMT's; thoughts are as long as B_t asks"),
        ("rmt_least_budget", 1, "tokens", "B_min, RMT's"),
        ("rmt_budget_decay", 0.2, "over the steps", "g, RMT's"),
        ("rmt_prompt", prompt, "tokens", f"half of a row, of at most {LONGEST_PREFIX:,}: documents fill it"),
        ("rmt_answer", 4, "tokens", "a guess: closing tag and one token"),
        ("prefill_rate", None, "tokens/s per GPU", "--mfu-prefill"),
        ("mfu_prefill", 0.4 if config.prefill_rate is None else None, "of the peak", "a guess, as for scoring"),
        ("decode_rate", None, "tokens/s per GPU", "--mfu-decode"),
        ("mfu_decode", 0.05 if config.decode_rate is None else None, "of the peak",
         "a guess: decoding waits for memory; measure it and give --decode-rate"),
    ]  # fmt: skip
    return listed if config.rmt_steps else [(name, None, unit, source) for name, _, unit, source in listed]


def rmt_figures(
    config: PlanConfig, value: Mapping[str, Any], base: ModelShape, machine: Machine, rates: Rates, ntp_epoch: float
) -> dict[str, Any]:
    """The part of the figures under "rmt". value: of the assumptions by name; ntp_epoch: wall seconds of an epoch of NTP."""
    assert config.rmt_steps is not None
    job = RmtJob(
        config.rmt_steps, int(value["rmt_positions"]), int(value["rmt_generations"]), int(value["rmt_first_budget"]),
        int(value["rmt_least_budget"]), value["rmt_budget_decay"], value["rmt_prompt"], value["rmt_answer"], config.seq_len,
    )  # fmt: skip
    tokens = tokens_of(job)
    rate = {
        name: value.get(f"{name}_rate") or machine.peak_flops * value[f"mfu_{name}"] / base.forward_flops
        for name in ("prefill", "decode")
    }
    seconds = seconds_of(tokens, base, rates, rate["prefill"], rate["decode"], machine.num_gpus)
    total = sum(seconds.values())
    return {
        "steps": job.steps,
        "tokens": {
            "prefilled": tokens.prefilled, "decoded": tokens.decoded, "decoded at most": tokens.most_decoded,
            "learned from rollouts": tokens.learned, "predicted in rows": tokens.predicted,
        },
        "costs": {
            name: {"wall_seconds": spent, "gpu_hours": spent * machine.num_gpus / 3600}
            for name, spent in (*seconds.items(), ("remit rmt in all", total))
        },
        "ntp_epochs": total / ntp_epoch,
    }  # fmt: skip


def rmt_warnings(config: PlanConfig, base: ModelShape, machine: Machine, value: Mapping[str, Any]) -> list[str]:
    """Where remit rmt would refuse, or fail."""
    lines = []
    longest = value["rmt_prompt"] + 2 * value["rmt_first_budget"] + value["rmt_answer"]
    if base.max_position is not None and longest > base.max_position:
        lines.append(
            f"a rollout has up to {longest:,.0f} tokens (--rmt-prompt and twice --rmt-first-budget), {base.name} takes at most "
            f"{base.max_position:,}; remit rmt would shorten the prompts or refuse"
        )
    needed = sum(memory(base, machine, Layout("replicate", 1, 1, True), config.seq_len).values())
    if needed > machine.usable_bytes:
        lines.append(
            f"remit rmt trains replicas only, of which one needs {needed / 1e9:,.4g} GB per GPU, of "
            f"{machine.usable_bytes / 1e9:,.4g} GB that may be filled, and its engines need more; take a smaller base"
        )
    if value["rmt_positions"] % machine.num_gpus:
        lines.append(
            f"--rmt-positions is {value['rmt_positions']:g}, expected a multiple of --num-gpus ({machine.num_gpus}): remit rmt "
            "gives each process as many"
        )
    return lines
