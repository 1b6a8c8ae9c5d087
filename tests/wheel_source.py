"""Functions of a package that need not be importable: its wheel is found or downloaded, unpacked, and they are taken out of the source.

What the functions use of their module is handed in as their scope, so the package's own dependencies are not needed.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, TypeVar

DOWNLOAD_TIMEOUT = 120  # seconds
T = TypeVar("T")


class Unavailable(RuntimeError):
    """The wheel cannot be had, or is not what was expected; the message says why."""


def or_skip(get: Callable[..., T], *arguments: Any) -> T:
    """For tests, what get(*arguments) returns. Without its wheel the test is skipped, in CI it fails."""
    import pytest  # which the benchmarks do without

    try:
        return get(*arguments)
    except Unavailable as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))


def wheel(name: str, version: str, cache: Path, download: bool) -> Path:
    """The wheel in the cache; else, if it may be downloaded, by pip, into the cache."""
    pattern = f"{name}-{version}-*.whl"
    if not any(cache.glob(pattern)):
        if not download:
            raise Unavailable(f"{cache / pattern} does not exist, and downloading was not asked for")
        _download(name, version, cache)
    return next(cache.glob(pattern))


def _download(name: str, version: str, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # A wheel's bounds on Python and its dependencies are those of the whole package, of which a few functions are wanted; and it is read,
        # not installed: one made for Python 3.11, which every version pinned here has, serves any.
        pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--ignore-requires-python", "--python-version", "3.11", "--only-binary=:all:", "--dest", folder]
        try:
            command = [*pip_download, *options, f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"pip download {name}=={version} took more than {DOWNLOAD_TIMEOUT} s") from None
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Unavailable(f"pip download {name}=={version} failed: {reason}")
        for path in Path(folder).glob("*.whl"):
            os.replace(path, cache / path.name)


def unpacked(source: Path, cache: Path) -> Path:
    """The folder with the wheel's content."""
    target = cache / f"{source.stem}-{source.stat().st_size}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            content = Path(folder) / "content"
            with zipfile.ZipFile(source) as archive:
                archive.extractall(content)
            try:
                os.rename(content, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was first
                    raise
    return target


def execute(path: Path, names: list[str], **scope: Any) -> SimpleNamespace:
    """The named functions and classes of a source file ("Class.method": that method, as a function), without their decorators.

    They are executed in `scope`, which holds what they use. Annotations are not evaluated.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found.update({f"{node.name}.{method.name}": method for method in node.body if isinstance(method, ast.FunctionDef)})
    missing = set(names) - set(found)
    if missing:
        raise Unavailable(f"{path} has no {', '.join(sorted(missing))}")
    chosen = [found[name] for name in names]
    for node in chosen:
        node.decorator_list = []
    future = ast.ImportFrom(module="__future__", names=[ast.alias("annotations")], level=0)
    tree.body = [future, *chosen]
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), scope)
    return SimpleNamespace(**{node.name: scope[node.name] for node in chosen})


@functools.cache
def statements(path: Path, first: str, last: str | None = None) -> CodeType:
    """For exec(): of the one body of a source file, however deep, that has such statements, those from the one that begins with `first` to the
    last one that begins with `last` (without `last`: the first alone). Beginnings are as ast.unparse writes them."""
    found = []
    for body in _bodies(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        texts = [ast.unparse(statement) for statement in body]
        begins = [i for i, text in enumerate(texts) if text.startswith(first)]
        ends = [i for i, text in enumerate(texts) if text.startswith(last)] if last else begins[:1]
        if begins and ends and begins[0] <= ends[-1]:
            found.append(body[begins[0] : ends[-1] + 1])
    if len(found) != 1:
        raise Unavailable(f"{path} has {len(found)} blocks from {first!r} to {last!r}")
    return compile(ast.Module(body=found[0], type_ignores=[]), str(path), "exec")


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                yield body
