"""Functions of a package that need not be importable: its wheel is found or downloaded, unpacked, and they are taken out of the source.

What the functions use of their module is handed in as their scope, so the package's own dependencies are not needed.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

DOWNLOAD_TIMEOUT = 120  # seconds


class Unavailable(RuntimeError):
    """The wheel cannot be had, or is not what was expected; the message says why."""


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


def statements(path: Path, function: str, first: str, last: str) -> CodeType:
    """A part of a function ("Class.method" or "function"), for exec(): of the block (a body of statements, however deep) that assigns both
    names, the statements from the first that assigns `first` to the last that assigns `last`."""
    body = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    for name in function.split("."):
        body = next((node.body for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name), [])
    for block in _blocks(body):
        begins = [i for i, node in enumerate(block) if first in _assigned(node)]
        ends = [i for i, node in enumerate(block) if last in _assigned(node)]
        if begins and ends and begins[0] <= ends[-1]:
            module = ast.Module(body=block[begins[0] : ends[-1] + 1], type_ignores=[])
            return compile(module, str(path), "exec")
    raise Unavailable(f"{path}: no block of {function} assigns {first} and then {last}")


def _blocks(body: list[ast.stmt]):
    """The body, and every body within it."""
    yield body
    for node in body:
        for field in ("body", "orelse", "finalbody"):
            yield from _blocks(getattr(node, field, []))


def _assigned(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
