"""A trainer that is imported from its wheel's folder, with stand-ins for modules that its critic has no use of."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import peers


class SilentWriter:
    """In the place of tensorboard's SummaryWriter."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __getattr__(self, name: str):
        return lambda *arguments, **options: None


@contextlib.contextmanager
def importable(distribution: str, stand_ins: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Within the block the wheel's packages can be imported; behind it sys.modules and sys.path are as before.

    `stand_ins`: what these modules hold, whether they are installed or not.
    """
    folder, modules, path = str(peers.root(distribution)), dict(sys.modules), list(sys.path)
    for name, attributes in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if name in stand_ins or (getattr(module, "__file__", None) or "").startswith(folder):
                del sys.modules[name]
        sys.modules.update({name: modules[name] for name in stand_ins if name in modules})
