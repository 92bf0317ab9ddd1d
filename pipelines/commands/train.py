"""remit train: mid-train a base from annotated shards."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from pipelines.models import resolve_model
from pipelines.report.runs import EVALUATION, read_lines
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar, quiet_libraries
from shards.folder import require_shards
from shards.modelfolder import require_base
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.run_folder import TrainResult


def run(config: TrainConfig, should_stop: ShouldStop) -> int:
    began = monotonic()
    for folder in filter(None, (*config.mixture.folders, config.eval_shards)):
        require_shards(folder)
    model = resolve_model("--model", config.model)
    require_base(model.path)  # before Ray starts workers, or the corpus is looked at
    from trainer.model_flops import speed  # a mistyped path is told before these seconds
    from trainer.train import train

    quiet_libraries()
    tokens_at_start: int | None = None
    clips = config.objective == "remit" and config.epsilon < 1
    rank = int(os.environ.get("RANK", "0"))  # of torchrun; the others are quiet
    with progress_bar(desc="train", unit=" steps", disable=rank > 0) as bar:

        def progress(done: int, total: int, metrics: dict[str, Any]) -> None:
            nonlocal tokens_at_start
            if tokens_at_start is None:
                tokens_at_start = metrics["tokens"]
                bar.total = total
                bar.initial = bar.n = done - 1
            numbers = f"loss {metrics['ntp_loss']:.3f}, "
            if clips:
                numbers += f"clipped {metrics['clipped_low']:.0%}/{metrics['clipped_high']:.0%}, "
            if metrics.get("kd_loss") is not None:  # of the switch none where nothing is gated
                numbers += f"KL {metrics['kd_loss']:.3f}, "
            numbers += f"{metrics['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in metrics:
                numbers += f", MFU {metrics['mfu']:.1%}"
            elif "model_flops_per_token" in metrics:
                numbers += f", {speed(metrics)['teraflops_per_second']:.3g} TFLOP/s"
            bar.set_postfix_str(numbers, refresh=False)
            bar.update(done - bar.n)

        def phase(name: str) -> None:
            bar.set_description_str(name, refresh=sys.stderr.isatty())  # shown at once: an evaluation may take minutes

        config = replace(config, model=str(model.path))
        if config.ray_workers:
            from pipelines.ray_train import train_on_ray
            from trainer.experts import check_experts

            check_experts(model.path, config.router_aux_loss)  # here, and not in each worker
            result = with_remedy(partial(train_on_ray, config, should_stop))
        else:
            result = with_remedy(partial(train, config, progress, should_stop, note, phase))
    if not result.finished:
        return STOPPED
    if rank:
        return DONE
    has_trained = config.ray_workers or tokens_at_start is not None
    what = "trained" if has_trained else "nothing to do, trained before:"
    took = f" ({monotonic() - began:.0f} s)" if has_trained else ""
    print(f"{what} {counted(result.steps, 'step')} -> {result.out / 'model'}{took}")
    if config.eval_shards is not None:
        print(held_out_summary(result.out))
    if clips:
        low, high = 1 - config.epsilon, 1 + config.epsilon
        print(
            f"weights clipped low (to {low:g}): {result.clipped_low:.1%}, high (to {high:g}): {result.clipped_high:.1%}, "
            f"in between: {1 - result.clipped_low - result.clipped_high:.1%}"
        )
    return DONE


def with_remedy(work: Callable[[], "TrainResult"]) -> "TrainResult":
    """What `work` returns. Where it stops at a step that is not finite, the command that goes on is put on a line of its own."""
    try:
        return work()
    except (FloatingPointError, RuntimeError) as error:
        step = re.search(r"--skip-steps (\d+\.\.\d+)", str(error))
        if step and os.environ.get("RANK", "0") == "0":
            note(f"to go on past that step: remit {shlex.join(with_step(sys.argv[1:], step[1]))}")
        raise


def with_step(arguments: list[str], step: str) -> list[str]:
    """The words of a command with `step` among those of --skip-steps."""
    if "--skip-steps" not in arguments:
        return [*arguments, "--skip-steps", step]
    place = arguments.index("--skip-steps") + 1
    return [*arguments[:place], step, *arguments[place:]]


def held_out_summary(out: Path) -> str:
    """One line about the evaluations of a finished run: before, after, of the exported model where rounding changed it."""
    lines = list(read_lines(out / EVALUATION, lambda damaged: None))
    if not lines:  # finished before without --eval-shards
        return (
            "held-out loss: none, the run finished without --eval-shards; train it again with them into another --out"
        )
    first, last = lines[0], lines[-1]
    text = f"held-out loss: {last['loss']:.4f} nat per token after {last['step']:,} steps"
    if first["step"] == 0:
        text += f", {first['loss']:.4f} before"
    exported = last.get("exported_loss", last["loss"])
    if f"{exported:.4f}" != f"{last['loss']:.4f}":
        text += (
            f"; {exported:.4f} of the exported model, whose weights are rounded (--export-dtype {last['export_dtype']})"
        )
    if "average_loss" in last:
        text += f"; {last['average_loss']:.4f} of the average in model-average"
    return text
