"""Which plots remit report draws of which runs: lines that name the curves they show, so that no number stands twice.

In: runs as report_data reads them. Out: plots in the order of the page; a figure that no run has gives none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.report.data import Run

Kind = Literal["lines", "held-out", "heat", "band"]
DASHES = ("solid", "dot", "dash", "dashdot")
COLORS = 8  # of the palette; after these, dashes tell runs and sources apart


@dataclass(frozen=True)
class Line:
    """A curve of run number `run`: `figure` of its curves, or of those of a source. color: number in the palette."""

    run: int
    figure: str
    label: str
    color: int
    dash: str = "solid"
    source: str | None = None


@dataclass(frozen=True)
class Plot:
    """format: of a value, as d3 writes it. scale: what values are multiplied with. note: a sentence below the title."""

    title: str
    unit: str
    lines: list[Line]
    kind: Kind = "lines"
    format: str = ".4g"
    scale: float = 1.0
    note: str = ""
    is_of_one_run: bool = False


@dataclass(frozen=True)
class Entry:
    """A plot of figures that runs share: (figure, label) each. idle: the value that says nothing: where all runs have
    nothing else, the plot is left out (weights under plain next-token prediction are 1)."""

    title: str
    unit: str
    figures: tuple[tuple[str, str], ...]
    idle: float | None = None
    format: str = ".4g"
    scale: float = 1.0
    note: str = field(default="")


ENTRIES = (
    Entry("Next-token loss", "nats per token", (("ntp_loss", ""),), note="Training batches, every token counted once."),
    Entry(
        "Loss of the objective", "nats per token", (("loss", ""),),
        note="What was minimised: with weights, the weighted loss. Runs with different objectives do not compare here.",
    ),
    Entry("Distillation loss", "nats per token", (("kd_loss", ""),), note="Mean KL divergence from the reference."),
    Entry("Probability outside of the stored top k", "share", (("missing_mass", ""),), format=".2%"),
    Entry("Mean weight", "weight", (("weight_mean", ""),), idle=1.0),
    Entry("Standard deviation of the weights", "weight", (("weight_std", ""),), idle=0.0),
    Entry(
        "Clipped weights", "share of tokens", (("clipped_low", "low"), ("clipped_high", "high")), idle=0.0,
        format=".2%", note="Tokens whose weight the clip raised to its lower bound (low) or cut to its upper one (high).",
    ),
    Entry(
        "Effective tokens", "share of tokens", (("effective_share", ""),), idle=1.0, format=".2%",
        note="As many equally weighted tokens would give a gradient of the same variance.",
    ),
    Entry("Mean excess loss", "nats", (("delta_mean", ""),), note="Loss of the base minus that of the reference."),
    Entry("Gradient norm", "before clipping", (("grad_norm", ""),)),
    Entry("Learning rate", "per step", (("lr", ""),), format=".3e"),
    Entry("Throughput", "tokens/s", (("tokens_per_second", ""),), format=",.0f"),
    Entry("Waiting for data", "share of the step", (("data_wait_share", ""),), format=".3%"),
    Entry("Peak memory", "GiB", (("peak_memory_bytes", ""),), scale=1 / 2**30),
)  # fmt: skip


def make_plots(runs: Sequence[Run]) -> tuple[list[Plot], list[str]]:
    """Plots, and the titles of those that are left out because no run has their figures."""
    shared = {entry.title: _shared(entry, runs) for entry in ENTRIES}
    held_out = [
        Line(index, "held_out", run.name, index, _dash(index)) for index, run in enumerate(runs) if run.held_out
    ]
    heat = [_heat(index, run) for index, run in enumerate(runs) if len(run.heat) > 1]
    bands = [_band(index, run) for index, run in enumerate(runs) if _quantiles(run)]
    groups: dict[str, list[Plot]] = {}
    for entry in ENTRIES:
        plot = shared[entry.title]
        groups[entry.title] = [plot] if plot.lines else []
        if entry.title == "Loss of the objective":
            note = "Over all tokens of --eval-shards."
            if any(
                f"{run.exported.get(step, loss):.4f}" != f"{loss:.4f}" for run in runs for step, _, loss in run.held_out
            ):
                note += " Of the weights before rounding; that of the exported models is in the table of totals."
            if _differ(runs):
                note += (
                    " They are not the same, or not in the same context, for all of these points: do not compare them."
                )
            plot = Plot("Held-out loss", "nats per token", held_out, "held-out", note=note)
            groups[plot.title] = [plot] if held_out else []
        elif entry.title == "Effective tokens":
            groups["Weights"] = heat
        elif entry.title == "Mean excess loss":
            groups["Excess loss"] = bands
    places = {source: place for place, source in enumerate(sorted({name for run in runs for name in run.sources}))}
    by_source = [
        _by_source(index, run, title, figure, places)
        for index, run in enumerate(runs)
        for title, figure in (("Next-token loss", "ntp_loss"), ("Mean weight", "weight_mean"))
    ]
    groups["By corpus source"] = [plot for plot in by_source if plot.lines]
    plots = [plot for group in groups.values() for plot in group]
    return plots, [title for title, group in groups.items() if not group]


def _differ(runs: Sequence[Run]) -> bool:
    """Whether held-out losses are over different tokens or in different contexts, as far as that is written."""
    evaluated = [run for run in runs if run.held_out_sets]
    tokens, manifests = zip(*(own for run in evaluated for own in run.held_out_sets)) if evaluated else ((), ())
    contexts = [run.settings.get("context") for run in evaluated]
    return any(len(set(values) - {None}) > 1 for values in (tokens, manifests, contexts))


def _dash(number: int, place: int = 0) -> str:
    """Of run or source `number`, which shows `place` figures before this one in the same colour."""
    return DASHES[(place + 2 * (number // COLORS)) % len(DASHES)]


def _is_idle(values: Sequence[float | None], idle: float | None) -> bool:
    return idle is not None and all(value is None or abs(value - idle) < 1e-9 for value in values)


def _shared(entry: Entry, runs: Sequence[Run]) -> Plot:
    lines = [
        Line(index, figure, f"{run.name}, {label}" if label else run.name, index, _dash(index, place))
        for index, run in enumerate(runs)
        for place, (figure, label) in enumerate(entry.figures)
        if figure in run.curves
    ]
    if all(_is_idle(runs[line.run].curves[line.figure], entry.idle) for line in lines):
        lines = []
    return Plot(entry.title, entry.unit, lines, "lines", entry.format, entry.scale, entry.note)


def _heat(index: int, run: Run) -> Plot:
    note = "Share of the tokens at each weight, in bins of 0.05"
    note += "; the bin at 2 holds what is above, too." if "2.00" in run.heat else "."
    if run.heat_window > 1:
        note += f" Each column counts the tokens of {run.heat_window:,} steps."
    lines = [Line(index, "heat", run.name, index)]
    return Plot(f"Weights: {run.name}", "weight", lines, "heat", ".2%", note=note, is_of_one_run=True)


def _quantiles(run: Run) -> dict[float, str]:
    """Curves of the quantiles of the excess loss, by share, ascending."""
    prefix = "delta_quantile_"
    found = {float(key.removeprefix(prefix)): key for key in run.curves if key.startswith(prefix)}
    return dict(sorted(found.items()))


def _band(index: int, run: Run) -> Plot:
    """Quantiles from the lowest to the highest: bands between the outer ones, a line for the median."""
    lines = [
        Line(index, key, f"{share:.0%}", index, "solid" if share == 0.5 else "dot")
        for share, key in _quantiles(run).items()
    ]
    note = "Quantiles over the tokens of a step of what the base's loss exceeds the reference's by; solid: the median."
    return Plot(f"Excess loss: {run.name}", "nats", lines, "band", note=note, is_of_one_run=True)


def _by_source(index: int, run: Run, title: str, figure: str, places: dict[str, int]) -> Plot:
    """places: of each source among those of all runs, so that it has the same colour in every plot."""
    having = sorted(source for source, curves in run.sources.items() if figure in curves)
    if figure == "weight_mean" and all(_is_idle(run.sources[source][figure], 1.0) for source in having):
        having = []
    lines = [
        Line(index, figure, source, places[source], _dash(places[source]), source)
        for source in (having if len(having) > 1 else [])
    ]
    unit = "weight" if figure == "weight_mean" else "nats per token"
    return Plot(f"{title} by corpus source: {run.name}", unit, lines, is_of_one_run=True)
