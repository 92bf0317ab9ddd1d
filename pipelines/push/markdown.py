"""Pieces of a card: tables and code in Markdown, and the YAML in front of it, merged into what a repository has."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n?", re.DOTALL | re.MULTILINE)
NO_LICENSE = "# license: fill in, for instance apache-2.0\n"
LICENSE = """## Licence

**To be filled in by the owner of this repository**, here and as `license` in the metadata above. {what}
"""


def code(value: object) -> str:
    """A value as code, which no name of a file can break out of."""
    text = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its cells in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(key: str, text: str) -> str:
    """What remit writes between marks, and replaces with the next push."""
    begin, end = _marks(key)
    return f"{begin}\n{text.strip()}\n{end}\n"


def _marks(key: str) -> tuple[str, str]:
    return f"<!-- remit push: begins {key} -->", f"<!-- remit push: ends {key} -->"


def merge(before: str | None, title: str, metadata: dict[str, Any], key: str, text: str, about_license: str) -> str:
    """The card of a repository with the section `key`, which is replaced or put at the end; what others wrote there stays.

    before: the card that the repository has, None without one. metadata: wins over what is there, but for lists, which are
    joined, and mappings of one `config_name`, of which ours replaces the other. ValueError for a card whose metadata is damaged.
    """
    values, body = _split(before) if before is not None else ({}, f"# {title}\n\n{LICENSE.format(what=about_license)}")
    for name, value in metadata.items():
        there = values.get(name)
        values[name] = _join(there, value) if isinstance(value, list) and isinstance(there, list) else value
    begin, end = _marks(key)
    first, last = body.find(begin), body.find(end)
    if 0 <= first < last:
        body = body[:first] + section(key, text).rstrip("\n") + body[last + len(end) :]
    else:
        body = f"{body.rstrip()}\n\n{section(key, text)}"
    front = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}{'' if values.get('license') else NO_LICENSE}---\n\n{body.lstrip()}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    match = _FRONT.match(card)
    if match is None:
        return {}, card
    try:
        values = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"README.md of the repository: its metadata is no YAML ({' '.join(str(error).split())}); mend it"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"README.md of the repository: its metadata is a {type(values).__name__}; expected names and values"
        )
    return values, card[match.end() :]


def _join(there: list[Any], ours: list[Any]) -> list[Any]:
    names = {entry["config_name"] for entry in ours if isinstance(entry, dict) and "config_name" in entry}
    kept = [entry for entry in there if not (isinstance(entry, dict) and entry.get("config_name") in names)]
    return kept + [entry for entry in ours if entry not in kept]
