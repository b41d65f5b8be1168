"""YAML as people write configs: numbers read as numbers, nothing guessed, nothing executed.

PyYAML follows YAML 1.1, where `7e-5` is text, `on` and `yes` are booleans, `010` is eight and
`1:30` is ninety. Here scalars follow YAML 1.2's core schema with underscores allowed in numbers;
repeated keys, tags beyond the plain types, non-text keys and cycles are refused. Anchors, aliases
and merge keys (`<<: *defaults`) are read as YAML 1.1 defines them. Every value's line is kept, so
that an error can name it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from activation_cache.runtime.errors import UserError

Path = tuple[str | int, ...]

_DIGITS = r"[0-9](?:_?[0-9])*"
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(rf"^[-+]?{_DIGITS}$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            rf"^(?:[-+]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)
_PREFIX = "tag:yaml.org,2002:"
_MERGE = "<<"
# Aliases of aliases can stand for more values than any memory holds.
_MOST_VALUES = 50_000


class _Loader(yaml.SafeLoader):
    """SafeLoader's grammar with our reading of plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or ours would read as something else, so both agree."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_PREFIX + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # YAML's own line breaks beyond \n: only between double quotes, escaped, do they survive.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(_PREFIX + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Document:
    """A parsed YAML text: its value, and the line (from 1) of each path."""

    value: Any
    lines: dict[Path, int]


def dotted(path: Path) -> str:
    """('cache', 'sites', 0, 'site') -> 'cache.sites[0].site'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse(text: str, *, name: str) -> Document:
    """Read one YAML document; `name` is its name in errors (a file, an override).

    Raises:
        UserError: not YAML, more than one document, a repeated key, a key that isn't text, a tag
            other than the plain types, a value that contains itself, or a merge of what isn't a
            mapping. Says name, line and path.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if "\\t" in problem:
            problem += ". Indent with spaces: YAML takes no tabs there"
        raise UserError(f"{name}{where}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise UserError(f"{name}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name}: not a config: nested too deeply") from error
    if node is None:
        return Document(value=None, lines={})
    reader = _NodeReader(name)
    value = reader.read(node, path=(), inside=())
    return Document(value=value, lines=reader.lines)


def dump(value: Any) -> str:
    """Write plain data as block YAML, keys in their order; `parse` gives the same data back."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2
    )


def _is_merge(key: yaml.Node) -> bool:
    """Is this the merge key, and not a text in quotes?"""
    return isinstance(key, yaml.ScalarNode) and key.value == _MERGE and key.style is None


class _NodeReader:
    """Turns PyYAML's node tree into plain data, noting the line of every path."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.read_so_far = 0

    def fail(self, node: yaml.Node, path: Path, message: str) -> UserError:
        at = f", {dotted(path)}" if path else ""
        return UserError(f"{self.name}, line {node.start_mark.line + 1}{at}: {message}")

    def read(self, node: yaml.Node, *, path: Path, inside: tuple[int, ...]) -> Any:
        if id(node) in inside:
            raise self.fail(node, path, "the value contains itself")
        self.read_so_far += 1
        if self.read_so_far > _MOST_VALUES:
            raise self.fail(node, path, f"aliases repeat more than {_MOST_VALUES} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        inside = (*inside, id(node))
        kind = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path=path, inside=inside)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [
                self.read(child, path=(*path, index), inside=inside)
                for index, child in enumerate(node.value)
            ]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind, path=path)
        raise self._bad_tag(node, path)

    def _mapping(
        self, node: yaml.MappingNode, *, path: Path, inside: tuple[int, ...]
    ) -> dict[str, Any]:
        merges = [pair for pair in node.value if _is_merge(pair[0])]
        if len(merges) > 1:
            raise self.fail(
                merges[1][0], (*path, _MERGE), f"the key is given twice: write {_MERGE}: [*a, *b]"
            )
        # The mapping's own keys win over merged ones, and of those the first.
        result: dict[str, Any] = {}
        for other in reversed(self._merged(merges[0][1], path) if merges else []):
            result |= self.read(other, path=path, inside=inside)
        own: set[str] = set()
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
                found = getattr(key_node, "value", "")
                shown = f"{found!r}" if isinstance(found, str) else "a list or mapping"
                raise self.fail(key_node, path, f"a key must be text, not {shown}")
            key = key_node.value
            if key in own:
                first = self.lines[(*path, key)]
                raise self.fail(
                    key_node, (*path, key), f"the key is given twice (first on line {first})"
                )
            own.add(key)
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.read(value_node, path=(*path, key), inside=inside)
        return result

    def _merged(self, node: yaml.Node, path: Path) -> list[yaml.Node]:
        """The mappings that a merge key names: one, or a list of them."""
        found = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for one in found:
            if not isinstance(one, yaml.MappingNode):
                raise self.fail(
                    one, (*path, _MERGE), f"{_MERGE} merges mappings: write {_MERGE}: *anchor"
                )
        return found

    def _scalar(self, node: yaml.ScalarNode, kind: str, *, path: Path) -> Any:
        text = node.value
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text, flags=re.IGNORECASE))
        except (ValueError, KeyError) as error:
            raise self.fail(node, path, f"{text!r} is not a valid {kind}") from error
        raise self._bad_tag(node, path)

    def _bad_tag(self, node: yaml.Node, path: Path) -> UserError:
        tag = node.tag.replace(_PREFIX, "!!")
        return self.fail(
            node, path, f"the tag {tag} is not allowed: a config holds plain values only"
        )
