"""remit compare: runs beside each other on held-out loss."""

from pipelines.report.compare import CompareConfig, compare
from pipelines.terminal import DONE, ShouldStop


def run(config: CompareConfig, should_stop: ShouldStop) -> int:
    print(compare(config.runs))
    return DONE
