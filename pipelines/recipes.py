"""The published recipes of docs/recipes, which an installation without the checkout has too: --config olmo2-1b."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent / "docs" / "recipes"


def recipes() -> dict[str, Path]:
    """The file of each recipe, by its name: of the checkout that this is, or of the installed package."""
    found = sorted(CHECKOUT.glob("*.yaml"))
    if not found:
        try:
            own = [Path(str(entry.locate())) for entry in files("remit") or [] if entry.parts[-2:-1] == ("recipes",)]
        except PackageNotFoundError:
            own = []
        found = sorted(file for file in own if file.suffix == ".yaml" and file.exists())
    return {file.stem: file for file in found}


def config_file(text: str) -> Path:
    """The file that --config names: one that is there, else the recipe of that name."""
    path = Path(text)
    return path if path.exists() else recipes().get(text, path)
