"""A YAML file whose values are checked by type, with messages that name file and key.

The options of a stage are checked by the stage's own settings: each value by its type, all of them by __post_init__.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from pipelines.flywheel.sections import SECTIONS
from pipelines.terminal import BadUsage

EXAMPLES = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rl": ("prompt",)}
SCRIPTED = re.compile(r"python[\d.]*|bash|sh")  # programs whose first word, if no option, is a script
NOWHERE = f"{os.devnull}/none"  # stands for a path that the loop decides


class _Loader(yaml.SafeLoader):
    """YAML whose values stay the texts that they are, where plain YAML makes 43200 of 12:00:00, 8 of 010 and False of off;
    null alone is None. A key that stands twice in one mapping is refused, where plain YAML forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.YAMLError(f"line {node.value[index][0].start_mark.line + 1}: {key!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YamlFile:
    """The content of the file, with messages that name file and key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise BadUsage(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(self.values, dict):
            raise BadUsage(f"--config {path}: expected a mapping of keys to values, for instance base: path/to/model")

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\.?\d[\w.+-]*", value)
        shown = value if is_number else repr(value)  # numbers are texts here
        raise BadUsage(f"{self.path}: {key} is {shown}, expected {expected}")

    def known(self, where: str, keys: Any, names: tuple[str, ...]) -> None:
        """BadUsage for a key that is not in `names`."""
        for key in keys:
            if key not in names:
                near = get_close_matches(str(key), names, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                raise BadUsage(f"{self.path}: {where}{key} is no key; {hint}")

    def typed(self, key: str, value: Any, kind: Any) -> Any:
        """The value as `kind`, a type of Python."""
        from pydantic import TypeAdapter, ValidationError

        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if "on" in choices and str(value).lower() in ("true", "yes", "false", "no"):
            value = "on" if value.lower() in ("true", "yes") else "off"  # which YAML takes for the same
        if value in (".inf", "+.inf"):  # as YAML spells it
            value = "inf"
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ").partition(", unable to")[0]
            self.fail(key, value, expected)

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(key, value, "a text")
        return value

    def texts(self, key: str, value: Any, least: int = 1) -> tuple[str, ...]:
        """A list of words; a single one may stand without brackets."""
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, str) or not entry.strip():
                which = f", of which number {number} is {entry!r}; null needs quotes" if entries is value else ""
                self.fail(key, value, f"a list of words{which}")
        if len(entries) < least:
            self.fail(key, value, "a list of words")
        return tuple(entries)

    def there(self, key: str, path: Any) -> None:
        if not Path(path).exists():
            self.fail(key, str(path), "a file or folder that is there")

    def program(self, key: str, words: tuple[str, ...]) -> None:
        """BadUsage unless a command can be started, and its script is there where its program runs one."""
        if shutil.which(words[0]) is None:
            if len(words) == 1 and len(words[0].split()) > 1:
                self.fail(key, words[0], f"a list of words, here [{', '.join(words[0].split())}]")
            self.fail(key, words[0], "a program that can be started; a script needs bash or python in front of it")
        script = words[1] if len(words) > 1 and SCRIPTED.fullmatch(Path(words[0]).name) else "-"
        if not script.startswith("-") and not Path(script).is_file():
            self.fail(key, script, "a script that is there, seen from where remit is started")

    def mapping(self, key: str, value: Any, expected: str) -> dict[str, Any]:
        """Its keys with _ for -; what is null is left out."""
        if not isinstance(value, dict):
            self.fail(key, value, expected)
        return {str(name).replace("-", "_"): entry for name, entry in value.items() if entry is not None}

    def section(self, where: str, section: str, value: Any, **beside: Any) -> dict[str, Any]:
        """The options of a stage, as its own settings take them together with those `beside` them in the file."""
        known = SECTIONS[section]
        settings, hints = known.settings_class(), get_type_hints(known.settings_class())
        entries = self.mapping(where, value, f"a mapping of options of {known.title}")
        for name, why in known.decided.items():
            if name in entries:
                raise BadUsage(f"{self.path}: {where}.{name} cannot be given here: {why}")
        self.known(f"{where}.", entries, tuple(known.options()))
        options = {name: self.typed(f"{where}.{name}", entry, hints[name]) for name, entry in entries.items()}
        for name in known.files:
            if options.get(name) is not None:
                self.there(f"{where}.{name}", options[name])
        for entry in fields(settings):
            if (
                entry.default is MISSING
                and entry.default_factory is MISSING
                and entry.name not in {**options, **beside}
            ):
                if entry.name not in known.decided:
                    raise BadUsage(f"{self.path}: {where}.{entry.name} is missing; {known.title} needs it")
                beside[entry.name] = self.typed(
                    where, [NOWHERE] if entry.name == "corpus" else NOWHERE, hints[entry.name]
                )
        try:
            settings(**options, **beside)
            _read_examples(section, options)
        except ValueError as error:
            raise BadUsage(f"{self.path}: {where}: {error}") from None
        return options


def _read_examples(section: str, options: Mapping[str, Any]) -> None:
    """Read the data of post-training now, and not after days of mid-training."""
    if section in EXAMPLES:
        from pipelines.posttrain.data import read_examples

        answer = ("answer",) if section == "rl" and options.get("reward", "answer") == "answer" else ()
        read_examples(Path(options["data"]), (*EXAMPLES[section], *answer))
