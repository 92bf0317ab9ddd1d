"""remit rmt as a function: the processes, the right to write, Ray and the engines around the loop of train.py."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.rmt.engine import Engines, RolloutEngine
from pipelines.rmt.policy import on_first
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.setup import Run, prepare
from pipelines.rmt.train import train_steps
from scorer.cluster import ray_cluster, ray_errors
from scorer.installed import installed_vllm
from scorer.placement import alive_nodes
from scorer.stopping import Stopped
from shards.folder import ShardFolder
from shards.output_folder import MODEL, writing_run
from trainer.distributed import connect
from trainer.session import Progress, Session

SEQUENCES = 256
"""Rollouts that an engine has in work at once, at most."""


@dataclass(frozen=True)
class RmtResult:
    """Where the run is, and the last line of its metrics."""

    out: Path
    finished: bool
    last: dict[str, Any]


def rmt(
    config: RmtConfig,
    progress: Progress = lambda done, total, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
    phase: Callable[[str], None] = lambda name: None,
    count: Callable[[ShardFolder, int], None] = lambda folder, rows: None,
) -> RmtResult:
    """Run or resume the run that `config` describes.

    progress, should_stop, note, phase: as of trainer.train.train. count: told the rows done while the tiers are counted.

    Raises ValueError with value, expectation and remedy for input that does not fit together, RuntimeError where another
    process trains into --out or an engine fails, LeaseLost where another process has taken --out over, and
    FloatingPointError, before the optimizer step, where a loss or gradient is not finite.
    """
    require_libraries()
    with (
        connect(config.timeout_seconds) as world,
        writing_run(config.out, "a run of remit rmt", world.first, note) as lease,
    ):
        if not world.first:
            progress, note, phase = lambda done, total, metrics: None, lambda line: None, lambda name: None
        session = Session(world, lease, progress, should_stop, note, phase)
        run = prepare(config, session, count)
        if run is not None:
            for line in described(run):
                note(line)
            phase("start engines")
            # a signal may have gone to Ray's processes too: the run goes on from its newest checkpoint then
            with contextlib.suppress(Stopped), engines(run, session) as started:
                phase("train")
                train_steps(run, session, started)
        world.meet()  # the first process may still save or export
        return world.from_first(result(config.out) if world.first else None)


def require_libraries() -> None:
    """ValueError where TRL or vLLM is not installed."""
    from importlib.util import find_spec

    if find_spec("trl") is None or find_spec("accelerate") is None:
        raise ValueError(
            "remit rmt needs TRL, which is not installed; in your checkout of remit: pip install '.[flywheel]'"
        )
    if installed_vllm() is None:
        raise ValueError(
            "remit rmt needs vLLM, which is not installed; in your checkout of remit: pip install '.[cpu]' or '.[gpu]'"
        )


@contextlib.contextmanager
def engines(run: Run, session: Session) -> Iterator[Engines | None]:
    """The engines, ready; None on all processes but the first."""
    started: list[Engines] = []
    with contextlib.ExitStack() as stack:

        def start() -> None:
            if session.world.first:
                stack.enter_context(ray_cluster(run.config.debug, session.note))
                stack.enter_context(ray_errors(session.should_stop))
                started.append(
                    Engines(engine_settings(run, session), run.config.num_engines, run.config.timeout_seconds)
                )
                started[0].start()

        on_first(session, start)
        yield started[0] if started else None


def engine_settings(run: Run, session: Session) -> RolloutEngine:
    """What each engine is told, with the cluster there."""
    config, prompter = run.config, run.prompter
    cpus = max(int(node.resources.get("CPU", 1)) for node in alive_nodes().values())
    longest = (
        prompter.max_prefix + prompter.overhead + len(prompter.close_ids) + config.most_thought + config.most_answer
    )
    positions = run.base.max_position
    rollouts = config.positions_per_step * config.num_generations
    return RolloutEngine(
        model=Path(config.model).absolute(),
        tokenizer=Path(prompter.tokenizer.name_or_path).absolute(),
        dtype=str(run.base.dtype).removeprefix("torch."),
        longest=longest if positions is None else min(longest, positions),
        num_sequences=min(SEQUENCES, -(-rollouts // config.num_engines)),
        device=session.world.device.type,
        cores=max(1, cpus // config.num_engines),
        tensor_parallel_size=config.tensor_parallel_size,
        memory=config.engine_memory,
    )


def described(run: Run) -> list[str]:
    """What a run does with what the papers leave open, in lines for the user."""
    config, prompter = run.config, run.prompter
    counts = run.index.counts
    shares: Callable[[tuple[float, ...]], str] = lambda values: "/".join(f"{value:g}" for value in values)  # noqa: E731
    tiers = {
        "tiers": f"easy/medium/hard from {shares(config.thresholds)} nat of {config.reference}_entropy "
        f"({'/'.join(f'{count:,}' for count in counts[1:])} positions), drawn {shares(config.first_distribution)} until 30 % of "
        f"the steps, {shares(config.last_distribution)} from 70 %",
        "filter": f"positions from {config.thresholds[0]:g} nat of {config.reference}_entropy up ({counts[-1]:,} of {sum(counts):,})",
        "off": f"all {sum(counts):,} positions alike",
    }[config.curriculum]
    if run.index.beyond:
        why = {
            "prefix": "no \\boxed{} can hold their token",
            "gain": f"a prompt does not hold the text before them ({prompter.max_prefix:,} tokens), which the baseline has seen",
        }.get(config.reward, "")
        tiers += f", and {run.index.beyond:,} more are not drawn: {why}"
    budget = "none"
    if config.budget == "on":
        budget = (
            f"from {config.first_budget} tokens, by {config.budget_decay:g} over the steps, at least {config.least_budget}; reward "
            f"{1 - config.length_weight:g} {config.reward} + {config.length_weight:g} length, up to {config.length_most:g}"
        )
    lines = [
        f"curriculum: {tiers}; {config.positions_per_step} positions per step",
        f"budget: {budget}",
        f"rollouts: {config.num_generations} per position, temperature {config.temperature:g}, clip {config.clip:g}, KL "
        f"{config.kl:g}, loss {config.loss_type}, {'chat' if prompter.chat else 'plain'} prompts with at most "
        f"{prompter.max_prefix:,} tokens of text, new weights every {config.sync_every} step(s)",
        f"loss: L_RL + {config.ntp_weight:g} L_NTP, learning rate {config.learning_rate:g} ({config.schedule})",
    ]
    if config.format_steps:
        lines.append(
            f"warm-up: {config.format_steps} steps of supervised learning before, on thoughts that the base samples itself, "
            f"learning rate {config.format_learning_rate:g}"
        )
    return lines


def result(out: Path) -> RmtResult:
    """Summary of a run from its files."""
    last: dict[str, Any] = {}
    path = out / "metrics.jsonl"
    if path.exists():
        *_, line = [{}, *map(json.loads, path.read_text(encoding="utf-8").splitlines())]
        last = line
    return RmtResult(out, (out / MODEL).exists(), last)
