"""The models' projects, one for the whole run; the commands start their own Ray, as on a user's machine."""

from collections.abc import Iterator

import pytest

from . import table
from .models import MODELS
from .project import Project

RESULTS: list[table.Result] = []


@pytest.fixture(scope="session", autouse=True)
def ray_session() -> None:
    """In the place of the Ray of the other tests."""


@pytest.fixture(scope="session", params=list(MODELS))
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    return Project(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def results() -> list[table.Result]:
    """What the tests measured; shown at the end of the run."""
    return RESULTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RESULTS:
        terminalreporter.section("real models against a float32 forward of transformers")
        terminalreporter.write_line(table.render(RESULTS))
