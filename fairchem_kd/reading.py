"""Files that someone else may have written, or a crash cut off: read within bounds, or refused.

Cards, manifests, records, tables and configs are small. What is read here is a regular file of a
size that such a file may have, of plain values that are not nested without end, and text that can
be written again; everything else is an :class:`Unreadable` of a few words, to which the caller adds
which file that is, what for, and what to do.
"""

from __future__ import annotations

import os
from typing import Any

import yaml

from fairchem_kd.json_file import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_JSON,
    MAX_LINE,
    Unreadable,
    check_unicode,
    opened,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
)

MAX_YAML = 8_000_000
MAX_VALUES = 1_000_000  # of a YAML file, what its aliases stand for included

__all__ = [
    "MAX_DEPTH",
    "MAX_DIGITS",
    "MAX_JSON",
    "MAX_LINE",
    "MAX_VALUES",
    "MAX_YAML",
    "Unreadable",
    "opened",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_json_lines",
    "read_text",
    "read_yaml",
]


def read_yaml(path: str | os.PathLike[str], loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML file, whose aliases do not stand for more than a file could hold.

    Args:
        loader: makes the values.

    Raises:
        OSError: there is none, or it cannot be read.
        Unreadable: it is not YAML, or too much of it.
    """
    return parse_yaml(read_text(path, MAX_YAML), loader)


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value that a text stands for; see :func:`read_yaml`."""
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"it is more than {MAX_DEPTH} levels deep") from None
    except Exception as error:  # a tag's own reader fails in its own way: IndexError, KeyError, ...
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse keys that stand twice, of which YAML's own reader takes the last without a word."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            raise Unreadable(f"it has the key '{key.value[:60]}' twice")
        seen.add((key.tag, key.value))


def _check_nodes(root: yaml.Node) -> None:
    """Refuse a tree whose aliases, written out, make too much of it, or go round in a circle."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise Unreadable(f"it is more than {MAX_DEPTH} levels deep")
        if id(node) in open_nodes:
            raise Unreadable("an alias of it stands inside what it stands for")
        if id(node) in sizes:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            check_unicode(node.value)
            found = 1 + len(node.value) // 64
        else:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            inner = (
                [part for pair in node.value for part in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
            )
            found = 1
            for one in inner:
                found += size(one, depth + 1)
                if found > MAX_VALUES:
                    raise Unreadable(f"it stands for more than {MAX_VALUES:,} values")
            open_nodes.discard(id(node))
        sizes[id(node)] = found
        return found

    size(root, 0)
