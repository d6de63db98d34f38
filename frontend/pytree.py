"""Nested inputs and outputs: lists, tuples, dicts, dataclasses and what derives from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted path, in a fixed order."""
    children = _children(tree)
    if children is None:
        yield path, tree
        return
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else name)


def map_leaves(f: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same make with `f(leaf)` at each leaf."""
    if isinstance(tree, Mapping):
        items = {k: map_leaves(f, v) for k, v in tree.items()}  # pyright: ignore
        return _rebuild_mapping(tree, items)  # pyright: ignore[reportUnknownArgumentType]
    if _is_dataclass(tree):
        fields = {
            d.name: map_leaves(f, getattr(tree, d.name)) for d in dataclasses.fields(tree) if d.init
        }
        return dataclasses.replace(tree, **fields)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*(map_leaves(f, v) for v in tree))  # pyright: ignore
    if isinstance(tree, (list, tuple)):
        made = [map_leaves(f, v) for v in tree]  # pyright: ignore[reportUnknownVariableType]
        return made if type(tree) is list else type(tree)(made)  # pyright: ignore
    return f(tree)


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    if isinstance(tree, Mapping):
        return [(str(k), v) for k, v in tree.items()]  # pyright: ignore
    if _is_dataclass(tree):
        return [(d.name, getattr(tree, d.name)) for d in dataclasses.fields(tree) if d.init]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))  # pyright: ignore
    if isinstance(tree, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(tree)]  # pyright: ignore
    return None


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _rebuild_mapping(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(tree) is dict:
        return items
    if _is_dataclass(tree):  # Hugging Face's ModelOutput is both
        return type(tree)(**items)
    return type(tree)(items)  # type: ignore[call-arg]
