"""Statements of a wheel's file that are no function of their own, found by how they begin."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import CodeType

import peers
import wheel_source


@functools.cache
def block(distribution: str, path: str, first: str, last: str | None = None) -> CodeType:
    """For exec(): of the one body, however deep, that has such statements, those from the one that begins with `first` to the one that begins
    with `last` (without `last`: the first alone). Beginnings are as ast.unparse writes them."""
    file = peers.root(distribution) / path
    found = []
    for body in _bodies(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        texts = [ast.unparse(statement) for statement in body]
        begins = [i for i, text in enumerate(texts) if text.startswith(first)]
        if begins:
            ends = [i for i, text in enumerate(texts) if text.startswith(last or first) and i >= begins[0]]
            found += [body[begins[0] : ends[0] + 1]] if ends else []
    if len(found) != 1:
        raise wheel_source.Unavailable(f"{file} has {len(found)} blocks from {first!r} to {last!r}")
    return compile(ast.Module(body=found[0], type_ignores=[]), str(file), "exec")


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                yield body
