"""What a parsed chat template does that would give wrong rows: marks in the wrong place, and what is drawn at random.

In: the template as jinja2 parses it. transformers takes the length of what is written so far for the first character of a
marked span. So a mark is wrong inside whatever jinja2 puts together in memory before it writes it.
"""

from collections.abc import Iterator

from jinja2 import nodes

RANDOM = ("random", "lipsum")
BUFFERED: dict[type[nodes.Node], str] = {
    nodes.Macro: "a macro",
    nodes.AssignBlock: "a {% set %} block",
    nodes.FilterBlock: "a {% filter %} block",
    nodes.CallBlock: "a {% call %} block",
}


def marks_within(template: nodes.Template) -> list[str | None]:
    """For each {% generation %} in the template what it must not stand in, None where it may stand there."""
    # self.NAME() gives the text of a block once more, as a call of a macro does
    repeats = any(name.name == "self" for name in template.find_all(nodes.Name))
    return list(_marks(template, None, repeats))


def _marks(node: nodes.Node, within: str | None, repeats: bool) -> Iterator[str | None]:
    for child in node.iter_child_nodes():
        if _is_mark(child):
            yield within
            yield from _marks(child, within, repeats)  # what a mark around it marks has all of this one
        else:
            yield from _marks(child, within or _buffered(child, repeats), repeats)


def _is_mark(node: nodes.Node) -> bool:
    called = node.call.node if isinstance(node, nodes.CallBlock) else None
    return isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support"


def _buffered(node: nodes.Node, repeats: bool) -> str | None:
    """What a part of a template is that puts its text together before it is written; None for others."""
    if isinstance(node, nodes.For) and node.recursive:
        return "a recursive loop"
    if isinstance(node, nodes.Block) and repeats:
        return "a block that self repeats"
    return BUFFERED.get(type(node))


def what_draws(template: nodes.Template) -> str | None:
    """The filter or function with which a template draws at random, None where it has none."""
    names = [(one.name, "filter") for one in template.find_all(nodes.Filter)]
    # map("random") names it as a text
    maps = [one for one in template.find_all(nodes.Filter) if one.name == "map" and one.args]
    names += [(one.args[0].value, "filter") for one in maps if isinstance(one.args[0], nodes.Const)]
    names += [(one.name, "function") for one in template.find_all(nodes.Name) if one.name == "lipsum"]
    return next((f"the {kind} {name}" for name, kind in names if name in RANDOM), None)
