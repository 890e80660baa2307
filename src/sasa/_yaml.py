"""Reading the YAML of recipes and studies: plain values only, and nothing that lets a small file expand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

LARGEST = 100_000
"""Maximum bytes of a file."""

DEEPEST = 20
"""Maximum nesting of mappings and lists."""

LONGEST_NUMBER = 64
"""Maximum characters of a number. Python is slow or raises errors for thousands of digits."""

_TAG = "tag:yaml.org,2002:"


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags, dates, merged, repeated or unusual keys, and with bounds."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next value, checked before anything is built from it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"expected values written out, got the alias *{event.anchor}")
        tag = getattr(event, "tag", None)
        if tag:
            self._refuse(event, f"expected values without tags, got {tag}")
        self.depth += 1
        if self.depth > DEEPEST:
            self._refuse(event, f"expected at most {DEEPEST} levels of nesting, got more")
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self.depth -= 1
        kind = "" if node is None else node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode):
            if kind not in ("str", "int", "float", "bool", "null"):
                self._refuse(node, f"expected text or a number, got the {kind} {node.value}; put text in quotes")
            if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
                self._refuse(node, f"expected a number of at most {LONGEST_NUMBER} characters, got {len(node.value)}")
        elif isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if key.tag != f"{_TAG}str":
                got = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                self._refuse(key, f"expected text as key, got {got}")
            if key.value in seen:
                self._refuse(key, f"{key.value}: expected each key once, got it twice")
            seen.add(key.value)

    def _refuse(self, place: yaml.Event | yaml.Node, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


# As in jsonargparse and YAML 1.2: PyYAML reads 1e-4 as text.
_PlainLoader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file: strings, numbers, true, false, null, and lists and mappings of them.

    Raises:
        ValueError: it contains anything else, or can't be read. The message names the file, and the line if known.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of YAML")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise ValueError(f"{path}: expected at most {LARGEST:,} bytes of YAML, got more")
    try:
        found = yaml.load(content.decode("utf-8"), _PlainLoader)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}: line {mark.line + 1}" if mark else f"{path}"
        raise ValueError(f"{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        got = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{path}: expected keys with values, got {got}")
    return found
