"""Loads the extension, and explains what to do where it cannot be loaded."""

from types import ModuleType

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load_extension() -> ModuleType:
    """Import fused_critic._C; operators register as it is loaded. torch must be imported before it.

    A library built for another minor version of torch is not loaded: where its symbols are found at all, it can still crash.
    """
    built_for = _built_for()
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        raise ImportError(_explain())
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(_explain(error)) from error
    return _C


def _built_for() -> str | None:
    """The torch of the build, None where nothing was built."""
    try:
        from ._build_stamp import BUILD
    except ImportError:
        return None
    return BUILD["torch_version"]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _explain(error: ImportError | None = None) -> str:
    built_for = _built_for()
    if built_for is None:
        return f"fused_critic is not built here; in its source folder run: {REBUILD}"
    if built_for != torch.__version__:
        cause = f"fused_critic was built for torch {built_for}, but torch {torch.__version__} is installed"
    else:
        cause = f"fused_critic was built for this torch ({built_for}), but its library cannot be loaded"
    wheel = f"install its wheel for torch {'.'.join(_minor(torch.__version__))}, or in its source folder run: {REBUILD}"
    return f"{cause}; {wheel}" + (f"  [{error}]" if error else "")
