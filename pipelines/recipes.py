"""The published recipes of docs/recipes by their name, as in --config olmo2-1b; an installed package has them too."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the packages
FOLDERS = (ROOT / "docs" / "recipes", ROOT / "share" / "remit" / "recipes")
"""In a checkout, and where pip install --target puts them; other installations list them among their files."""


def recipes() -> dict[str, Path]:
    """The file of each recipe, by its name."""
    found = [file for folder in FOLDERS for file in folder.glob("*.yaml")]
    if not found:
        try:
            found = [Path(str(entry.locate())) for entry in files("remit") or [] if entry.match("recipes/*.yaml")]
        except PackageNotFoundError:
            return {}
    return {file.stem: file.resolve() for file in sorted(found)}


def config_file(text: str) -> Path:
    """The file that --config names: one that is there, else the recipe of that name."""
    path = Path(text)
    return path if path.exists() else recipes().get(text, path)
