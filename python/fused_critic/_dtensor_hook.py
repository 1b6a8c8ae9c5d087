"""Registers the operators' rules for DTensor as soon as torch.distributed.tensor is there: importing it takes ten times as long as this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PACKAGE = "torch.distributed.tensor"


def _register() -> None:
    from . import _dtensor  # noqa: F401  (registers)


class _AfterImport(MetaPathFinder):
    """Finds nothing of its own: has the loader of the package register after it, and is gone then. The loader stays what it was."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            del loader.exec_module
            load(module)
            _register()

        loader.exec_module = load_and_register
        return spec


def install() -> None:
    if _PACKAGE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
