"""YAML that knows where it stands: every value with file, line and key, for the errors about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_ext.extras import require

if TYPE_CHECKING:
    import yaml

_MERGE = "tag:yaml.org,2002:merge"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message begins with file, line and key."""


@dataclass(frozen=True)
class Entry:
    """A YAML value and its place.

    Attributes:
        node: of PyYAML.
        file: shown in errors.
        key: dotted path from the top of the document, as in `models[1].parameters.weight`.
        line: counted from 0; of the key where there is one.
    """

    node: yaml.Node = field(repr=False)
    file: str
    key: str = ""
    line: int = 0

    @property
    def place(self) -> str:
        line = f"{self.file}, line {self.line + 1}"
        return f"{line}, {self.key}" if self.key else line

    def error(self, text: str) -> RecipeError:
        return RecipeError(f"{self.place}: {text}")

    @property
    def shape(self) -> str:
        """scalar, sequence or mapping."""
        return self.node.id

    @property
    def value(self) -> Any:
        """Plain Python data."""
        import yaml

        if self.shape == "sequence":
            return [item.value for item in self.items()]
        if self.shape == "mapping":
            return {key: entry.value for key, entry in self.mapping().items()}
        return yaml.SafeLoader("").construct_object(self.node)

    def is_null(self) -> bool:
        return self.shape == "scalar" and self.value is None

    def mapping(self, allowed: Iterable[str] | None = None) -> dict[str, Entry]:
        """Key to entry, without those that are null.

        Raises:
            RecipeError: no mapping, a key twice, or one that is not `allowed`.
        """
        if self.shape != "mapping":
            raise self.error(f"expected keys with values, got {_short(self)}")
        found: dict[str, Entry] = {}
        known = None if allowed is None else list(allowed)
        for key_node, node in self.node.value:
            line = key_node.start_mark.line
            if key_node.id != "scalar":
                raise Entry(key_node, self.file, self.key, line).error("expected text as a key")
            name = key_node.value
            entry = Entry(node, self.file, f"{self.key}.{name}" if self.key else name, line)
            if name in found:
                raise entry.error("given twice")
            if known is not None and name not in known:
                raise entry.error(f"unknown key; {suggest(name, known)}")
            found[name] = entry
        return {name: entry for name, entry in found.items() if not entry.is_null()}

    def items(self) -> list[Entry]:
        """The entries of a list."""
        if self.shape != "sequence":
            raise self.error(f"expected a list, got {_short(self)}")
        return [
            Entry(node, self.file, f"{self.key}[{index}]", node.start_mark.line)
            for index, node in enumerate(self.node.value)
        ]

    def text(self) -> str:
        value = self.value if self.shape == "scalar" else None
        if value is None or isinstance(value, bool):
            raise self.error(f"expected text, got {_short(self)}")
        return str(self.node.value)

    def boolean(self) -> bool:
        if self.shape != "scalar" or not isinstance(self.value, bool):
            raise self.error(f"expected true or false, got {_short(self)}")
        return self.value

    def integer(self) -> int:
        if self.shape != "scalar" or type(self.value) is not int:
            raise self.error(f"expected a whole number, got {_short(self)}")
        return self.value

    def choice(self, *names: str) -> str:
        value = self.text()
        if value not in names:
            raise self.error(f"expected one of {', '.join(names)}, got {value}")
        return value


def read_yaml(text: str, file: str) -> list[Entry]:
    """The documents of a YAML stream, those that hold nothing left out.

    Raises:
        RecipeError: not YAML.
        ImportError: PyYAML is missing.
    """
    require("a recipe", "merge", "yaml")
    import yaml

    try:
        nodes = [node for node in yaml.compose_all(text, _loader()) if node is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{file}{line}: not YAML: {problem}") from None
    entries = [Entry(node, file, line=node.start_mark.line) for node in nodes]
    return [entry for entry in entries if not entry.is_null()]


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def _loader() -> Any:
    """SafeLoader whose mappings come with their merge keys (`<<`) resolved."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            own = [pair for pair in node.value if pair[0].tag != _MERGE]
            if len(own) < len(node.value):
                self.flatten_mapping(node)  # puts what is inherited first
                inherited = {
                    str(key.value): (key, item)
                    for key, item in node.value[: len(node.value) - len(own)]
                }
                names = {str(key.value) for key, _ in own}
                node.value = [pair for name, pair in inherited.items() if name not in names] + own
            return node

    return Loader


def _short(entry: Entry) -> str:
    if entry.shape == "scalar":
        return "nothing" if entry.is_null() else repr(entry.value)
    return {"sequence": "a list", "mapping": "keys with values"}[entry.shape]
