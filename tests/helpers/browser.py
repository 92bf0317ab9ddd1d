"""A Chromium that opens pages, cut off from the network; what becomes of the tests of pages where there is none.

Run as a script: says which Chromium the tests would take.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

NONE = "no Chromium that works on this machine"
REMEDY = "apt-get install chromium, or python -m playwright install chromium"
QUIET = ("background-networking", "component-update", "sync", "gpu")
ARGUMENTS = ["--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in QUIET)]


class NoBrowser(Exception):
    """No Chromium that works; the message says what was tried."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The first Chromium of this machine that opens a page of the folder for temporary files. NoBrowser: none does.

    REMIT_NO_BROWSER=1: as if there were none.
    """
    with sync_playwright() as playwright:
        browser = _launch(playwright)
        yield browser
        browser.close()


def _launch(playwright: Playwright) -> Browser:
    reasons = []
    for name, options in _candidates(playwright):
        browser = None
        try:
            browser = playwright.chromium.launch(args=ARGUMENTS, **options)
            # a browser in a container of its own (snap) starts, and sees none of our files
            with tempfile.NamedTemporaryFile(suffix=".html") as file:
                page = browser.new_page()
                page.goto(Path(file.name).as_uri())
                page.close()
            return browser
        except Exception as error:
            if browser is not None:
                browser.close()
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
    raise NoBrowser(NONE + "".join(f"; {reason}" for reason in reasons))


def _candidates(playwright: Playwright) -> Iterator[tuple[str, dict[str, Any]]]:
    if os.environ.get("REMIT_NO_BROWSER") == "1":
        return
    if Path(playwright.chromium.executable_path).exists():
        yield "playwright's own", {}
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            yield path, {"executable_path": path}
    yield "Chrome", {"channel": "chrome"}  # where its installer puts it, also on macOS


@dataclass
class Opened:
    """page; problems: console errors and warnings, exceptions; requests: what it asked for beside itself."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextmanager
def open_page(
    browser: Browser, file: Path, width: int = 1280, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Opened]:
    """`file` in a window of that width."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    opened = Opened(context.new_page())
    opened.page.on(
        "console",
        lambda message: opened.problems.append(message.text) if message.type in ("error", "warning") else None,
    )
    opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(file.absolute().as_uri(), wait_until="load")
    opened.requests.remove(file.absolute().as_uri())
    opened.requests[:] = [url for url in opened.requests if not url.startswith(("data:", "blob:"))]
    yield opened
    context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium without a window. Where there is none, the test is skipped, or with REMIT_REQUIRE_BROWSER=1 fails."""
    try:
        with open_browser() as found:
            yield found
    except NoBrowser as error:
        if os.environ.get("REMIT_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{error}; {REMEDY}", pytrace=False)
        pytest.skip(f"{error}; {REMEDY}")


def pytest_terminal_summary(terminalreporter: "TerminalReporter") -> None:
    """One line, at the end, on the tests of pages that were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    if count := sum(NONE in str(report.longrepr) for report in skipped):
        line = f"NOT TESTED: {count} tests of pages were skipped, because there is {NONE}; {REMEDY}"
        terminalreporter.write_line(line, yellow=True, bold=True)


if __name__ == "__main__":
    try:
        with open_browser() as found:
            print(f"pages are tested in Chromium {found.version}")
    except NoBrowser as error:
        sys.exit(f"{error}; until there is one ({REMEDY}) the tests of pages are skipped")
