"""The real verl, from its wheel: found or downloaded, unpacked, and its functions taken out of their source.

verl itself is not importable where its dependencies (ray, transformers, ...) are missing, so nothing here imports it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch

VERSION = "0.9.1"
WHEEL_NAME = f"verl-{VERSION}-py3-none-any.whl"
WHEEL_VARIABLE = "FUSED_CRITIC_VERL_WHEEL"  # an already downloaded wheel
CACHE_VARIABLE = "FUSED_CRITIC_CACHE"  # the folder that keeps the wheel and its content
DOWNLOAD_TIMEOUT = 120  # seconds

CORE_ALGOS = "verl/trainer/ppo/core_algos.py"
TORCH_FUNCTIONAL = "verl/utils/torch_functional.py"


class VerlUnavailable(RuntimeError):
    """The wheel cannot be had; the message says why."""


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "fused-critic")


def wheel(download: bool = True) -> Path:
    """The wheel named by the environment, else the cached one, else a download by pip into the cache."""
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise VerlUnavailable(f"{WHEEL_VARIABLE}={named}: no such file")
        return Path(named)
    path = cache_dir() / WHEEL_NAME
    if not path.is_file():
        if not download:
            raise VerlUnavailable(f"{path} does not exist, and downloading was not asked for")
        _download(path)
    return path


def _download(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # verl's upper bound on the Python version comes from its dependencies, which are not wanted here.
        pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--ignore-requires-python", "--only-binary=:all:", "--dest", folder]
        try:
            done = subprocess.run([*pip_download, *options, f"verl=={VERSION}"], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise VerlUnavailable(f"pip download verl=={VERSION} took more than {DOWNLOAD_TIMEOUT} s") from None
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise VerlUnavailable(f"pip download verl=={VERSION} failed: {reason}")
        os.replace(Path(folder) / WHEEL_NAME, path)


def unpacked(download: bool = True) -> Path:
    """The folder with the wheel's content: the package ``verl`` and its ``tests``."""
    source = wheel(download)
    target = cache_dir() / f"{source.stem}-{source.stat().st_size}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            content = Path(folder) / "content"
            with zipfile.ZipFile(source) as archive:
                archive.extractall(content)
            try:
                os.rename(content, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was first
                    raise
    return target


def functions(download: bool = True) -> SimpleNamespace:
    """verl's ``compute_value_loss`` and ``compute_gae_advantage_return``, and all that they call, executed from the wheel's source.

    ``compute_gae_advantage_return.__globals__["verl_F"]`` is a namespace of its own in every call, for a caller to change.
    """
    root = unpacked(download)
    verl_F = _execute(root / TORCH_FUNCTIONAL, ["clip_by_value", "masked_sum", "masked_mean", "masked_var", "masked_whiten"])
    core_algos = _execute(root / CORE_ALGOS, ["agg_loss", "compute_value_loss", "compute_gae_advantage_return"], verl_F=verl_F)
    return SimpleNamespace(**vars(verl_F), **vars(core_algos))


def _execute(path: Path, names: list[str], **scope: Any) -> SimpleNamespace:
    """The named functions of a source file, without their decorators, in a scope that holds what they use."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names}
    missing = set(names) - set(found)
    if missing:
        raise VerlUnavailable(f"{path} has no function {', '.join(sorted(missing))}")
    for node in found.values():
        node.decorator_list = []
    tree.body = list(found.values())
    scope.update(torch=torch, Optional=Optional)
    exec(compile(tree, str(path), "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
