"""Registers the operators' rules for DTensor as soon as torch.distributed.tensor is there: importing it takes ten times as long as this package."""

from __future__ import annotations

import sys
import threading
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
    """Finds nothing of its own: has the loader of the package register after it, and is gone then. The loader stays what it was.

    A search without an import, and an import that fails, leave it waiting.
    """

    def __init__(self) -> None:
        self._search = threading.local()  # .running: in this thread the other finders are being asked

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _PACKAGE or getattr(self._search, "running", False):
            return None
        self._search.running = True
        try:
            spec = find_spec(fullname)
        finally:
            self._search.running = False
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # a finder may have given one loader to two searches
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = load_and_register
        return spec


def install() -> None:
    if _PACKAGE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
