"""Pages are written whole; and tests of pages that cannot run, for want of a browser, do not pass in silence."""

import os
import subprocess
import sys
from pathlib import Path

import browser
import pytest

from pipelines.pages import write_page

HELPERS = Path(browser.__file__).parent


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize(
    ("variables", "code", "shown"),
    [
        ({}, 0, "NOT TESTED: 2 tests of pages were skipped, because there is no Chromium that works on this machine"),
        ({"REMIT_REQUIRE_BROWSER": "1"}, 1, "no Chromium that works on this machine; apt-get install chromium"),
    ],
)
@pytest.mark.usefixtures("starts_processes")
def test_skipped_tests_of_pages_are_counted(tmp_path: Path, variables: dict[str, str], code: int, shown: str) -> None:
    (tmp_path / "test_a.py").write_text("def test_x(browser): pass\ndef test_y(browser): pass\ndef test_z(): pass\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "browser", "--rootdir", tmp_path, tmp_path],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HELPERS), "REMIT_NO_BROWSER": "1", **variables},
    )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert shown in ran.stdout
    assert "1 passed" in ran.stdout


def test_a_page_replaces_another_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    write_page(page, "first \ud83d\r\n")
    assert page.read_bytes() == "first \ufffd\r\n".encode()

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(page, "second")
    assert page.read_bytes() == "first \ufffd\r\n".encode()
    assert list(tmp_path.iterdir()) == [page]
