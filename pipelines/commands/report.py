"""remit report: training runs as one page."""

from pipelines.report.runs import METRICS, read_settings
from pipelines.report.settings import ReportConfig
from pipelines.terminal import DONE, ShouldStop, counted, progress_bar


def run(config: ReportConfig, should_stop: ShouldStop) -> int:
    for folder in config.runs:
        read_settings(folder)  # a mistyped path is told before the seconds of the imports
    from pipelines.report.page import write_report

    sizes = [(folder / METRICS).stat().st_size for folder in config.runs if (folder / METRICS).exists()]
    with progress_bar(desc="report", unit="B", unit_scale=True, total=sum(sizes)) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        runs = write_report(config, progress)
    names = ", ".join(
        f"{run.name} ({counted(len(run.steps), 'step')}{'' if run.finished else ', not finished'})" for run in runs
    )
    print(f"report of {names} -> {config.out} ({config.out.stat().st_size / 1e6:.1f} MB)")
    return DONE
