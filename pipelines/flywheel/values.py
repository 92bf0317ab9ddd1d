"""The values of a YAML file: read as the texts that they are, and checked by type, with the key in each message."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

EXPECTED = {  # in plain words, by pydantic's name of the error
    "dict_type": "a mapping of options",
    "list_type": "a list such as [sft: {data: sft.jsonl}, rl: {data: prompts.jsonl}]",
    "string_pattern_mismatch": "letters, digits, - and _, of them at least one letter or digit",
}


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError("expected a mapping of keys to values, for instance base: path/to/model")
    return values


class TextLoader(yaml.SafeLoader):
    """YAML whose values stay the texts that they are, where plain YAML makes 43200 of 12:00:00, 8 of 010 and False of off;
    null alone is None. A key that stands twice in one mapping is refused, where plain YAML forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.YAMLError(f"line {node.value[index][0].start_mark.line + 1}: {key!r} stands twice")
        return super().construct_mapping(node, deep)


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def check(where: str, model: type[BaseModel], values: Any) -> Any:
    """The values as `model`; ValueError with key, value and expectation. where: the key that they stand under."""
    try:
        return model.model_validate(values)
    except ValidationError as failed:
        error = failed.errors()[0]
    key = where + "".join(
        f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in error["loc"] if part != "[key]"
    )
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable to")[0]
    if error["type"] == "missing":
        wanted = model.model_fields[str(error["loc"][-1])].description
        said = f" is missing{f', expected: {wanted}' if wanted else f'; remit {model.__name__} needs it'}"
    elif error["type"] != "value_error":
        said = f" is {error['input']!r}, expected {EXPECTED.get(error['type'], said)}"
    else:
        said = f"{' ' if said.startswith('is ') else ': ' if key else ''}{said}"
    raise ValueError(f"{key}{said}".removeprefix("."))


def known_keys(names: Iterable[str], value: Any, decided: Mapping[str, str] = {}) -> dict[str, Any]:
    """A mapping of the file: - and _ are alike in its keys, and what is null is left out; ValueError for keys that are
    not in `names`. decided: why a key cannot be given."""
    if not isinstance(value, dict):
        raise ValueError(f"is {value!r}, expected a mapping with some of {', '.join(names)}")
    found = {str(name).replace("-", "_"): entry for name, entry in value.items() if entry is not None}
    for name in found:
        if name in decided:
            raise ValueError(f"{name} cannot be given here: {decided[name]}")
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
            raise ValueError(f"{name} is no key; {hint}")
    return found


def to_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"is {value!r}, expected a text that is not empty")
    return value


def to_words(value: Any, least: int = 1) -> list[str]:
    """A list of words; a single one may stand without brackets."""
    entries = value if isinstance(value, list) else [value]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, str) or not entry.strip():
            which = f", of which number {number} is {entry!r}; null needs quotes" if entries is value else ""
            raise ValueError(f"is {value!r}, expected a list of words{which}")
    if len(entries) < least:
        raise ValueError(f"is {value!r}, expected a list of words")
    return entries


def as_yaml_spells(kind: Any, value: Any) -> Any:
    """The value of an option in the words of the command line: on for true and yes, inf for .inf."""
    if "on" in get_args(kind) and str(value).lower() in ("true", "yes", "false", "no"):
        return "on" if str(value).lower() in ("true", "yes") else "off"
    return "inf" if value in (".inf", "+.inf") else value


Text = Annotated[str, BeforeValidator(to_text)]
Words = Annotated[list[str], BeforeValidator(to_words)]
