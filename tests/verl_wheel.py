"""The real verl, from its wheel (wheel_source.py): its folder, its functions, and the batches that its loss takes.

verl itself is not importable where its dependencies (ray, transformers, ...) are missing, so nothing here imports it.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import wheel_source
from wheel_source import Unavailable as VerlUnavailable

VERSION = "0.9.1"
WHEEL_VARIABLE = "FUSED_CRITIC_VERL_WHEEL"  # an already downloaded wheel
CACHE_VARIABLE = "FUSED_CRITIC_CACHE"  # the folder that keeps the wheel and its content

CORE_ALGOS = "verl/trainer/ppo/core_algos.py"
TORCH_FUNCTIONAL = "verl/utils/torch_functional.py"


class Batch(dict[str, Any]):
    """What verl's loss uses of a TensorDict."""

    def select(self, *keys: str) -> Batch:
        return Batch({key: self[key] for key in keys})

    def to_padded_tensor(self) -> Batch:
        return Batch({key: x.to_padded_tensor(0.0) if x.is_nested else x for key, x in self.items()})


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


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
    return wheel_source.wheel("verl", VERSION, cache_dir(), download)


def unpacked(download: bool = True) -> Path:
    """The folder with the wheel's content: the package ``verl`` and its ``tests``."""
    return wheel_source.unpacked(wheel(download), cache_dir())


def functions(download: bool = True) -> SimpleNamespace:
    """verl's ``compute_value_loss`` and ``compute_gae_advantage_return``, and all that they call, executed from the wheel's source.

    ``compute_gae_advantage_return.__globals__["verl_F"]`` is a namespace of its own in every call, for a caller to change.
    """
    root, scope = unpacked(download), {"torch": torch}
    helpers = ["clip_by_value", "masked_sum", "masked_mean", "masked_var", "masked_whiten"]
    verl_F = wheel_source.execute(root / TORCH_FUNCTIONAL, helpers, **scope)
    own = ["agg_loss", "compute_value_loss", "compute_gae_advantage_return"]
    core_algos = wheel_source.execute(root / CORE_ALGOS, own, verl_F=verl_F, **scope)
    return SimpleNamespace(**vars(verl_F), **vars(core_algos))
