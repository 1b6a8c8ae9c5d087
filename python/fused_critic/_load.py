"""Loads the extension, and explains what to do where it cannot be loaded."""

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load_extension():
    """Import fused_critic._C; operators register as it is loaded. torch must be imported before it."""
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(_explain(error)) from error
    return _C


def _explain(error: ImportError) -> str:
    try:
        from ._build_stamp import BUILD
    except ImportError:
        return f"fused_critic is not built here; in its source folder run: {REBUILD}"
    built_for = BUILD["torch_version"]
    if built_for != torch.__version__:
        cause = f"fused_critic was built for torch {built_for}, but torch {torch.__version__} is installed"
    else:
        cause = f"fused_critic was built for this torch ({built_for}), but its library cannot be loaded"
    return f"{cause}; in its source folder run: {REBUILD}  [{error}]"
