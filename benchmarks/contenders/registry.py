"""The list of contenders, and what all of them need."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # the tests take verl's functions from the same wheel in the same way
import wheel_source  # noqa: E402

OURS = "fused_critic"
COPY = "torch copy of the same bytes"

SKIPPING = ("none", "full", "padding", "random", "turns")
ENDING = ("none", "full", "padding")  # of contenders that know where a sequence ends, not how to skip a token
WHEELS = ROOT / "build" / "peers"


class LeftOut(Exception):
    """This contender does not take part in this case; the message says why."""


@dataclass(frozen=True)
class Contender:
    name: str
    operator: str  # "value_loss" or "gae"
    build: Callable[[Any], Callable[[], Any]]
    longest: Optional[int] = None  # steps over time; what takes over a second is not waited for
    too_long: str = "take over a second"
    masks: tuple[str, ...] = SKIPPING
    layouts: tuple[str, ...] = ("rows", "time-major")
    dtypes: tuple[str, ...] = ("float32",)  # of the values
    devices: tuple[str, ...] = ("cpu", "cuda")
    reductions: tuple[str, ...] = ("token-mean",)
    starts_slowly: bool = False  # a compiler has to run first

    def prepare(self, inputs) -> Callable[[], Any]:
        device, dtype = inputs.values.device.type, str(inputs.values.dtype).removeprefix("torch.")
        if device not in self.devices:
            raise LeftOut(f"does not run on {device}")
        if dtype not in self.dtypes:
            raise LeftOut(f"not with {dtype} values")
        if self.operator == "value_loss":
            if inputs.reduction not in self.reductions:
                raise LeftOut(f"has no {inputs.reduction}")
        else:
            if inputs.mask_kind not in self.masks:
                raise LeftOut("cannot skip masked tokens")
            if inputs.layout not in self.layouts:
                raise LeftOut(f"does not take the layout: {inputs.layout}")
            if self.longest and inputs.steps > self.longest:
                raise LeftOut(f"{inputs.steps:,} steps {self.too_long}")
        return self.build(inputs)


CONTENDERS: list[Contender] = []
download_allowed = False  # of pinned wheels; set by the command line


def contender(name: str, operator: str, **limits):
    def register(build):
        CONTENDERS.append(Contender(name, operator, build, **limits))
        return build

    return register


def wheel_folder(package: str, version: str) -> Path:
    """The content of a pinned wheel."""
    try:
        return wheel_source.unpacked(wheel_source.wheel(package, version, WHEELS, download_allowed), WHEELS)
    except wheel_source.Unavailable as reason:
        raise LeftOut(str(reason)) from None


def functions_of(package: str, version: str, path: str, names: list[str], **scope):
    """Functions out of a pinned wheel's source. `path` may be a pattern."""
    found = sorted(wheel_folder(package, version).glob(path))
    if not found:
        raise LeftOut(f"{package} {version} has no {path}")
    try:
        return wheel_source.execute(found[0], names, **scope)
    except wheel_source.Unavailable as reason:
        raise LeftOut(str(reason)) from None
