"""The trainers whose code the parity suite runs: versions, and functions taken out of their wheels (wheel_source.py)."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import trl_wheel
import verl_wheel
import wheel_source

# Names as wheels spell them. Raise a version here, run the suite, and the table of docs/parity.md follows with --write-parity.
VERSIONS = {
    "cleanrl": "1.2.0",
    "rl_games": "1.6.5",
    "rsl_rl_lib": "5.5.1",
    "skrl": "2.1.1",
    "stable_baselines3": "2.9.2",
    "torchrl": "0.14.1",
    "skyrl": "0.3.0",
    "trl": trl_wheel.VERSION,
    "verl": verl_wheel.VERSION,
    "openrlhf": "0.11.2",
    "areal": "1.0.4",
}


PAGES = Path(__file__).parents[2] / "docs" / "trainers"


def snippets(trainer: str) -> list[str]:
    """The python blocks of docs/trainers/<trainer>.md, in order."""
    return re.findall(r"^```python\n(.*?)^```", (PAGES / f"{trainer}.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def root(distribution: str) -> Path:
    """The folder with the wheel's content."""
    cache = verl_wheel.cache_dir()
    return wheel_source.unpacked(wheel_source.or_skip(wheel_source.wheel, distribution, VERSIONS[distribution], cache, True), cache)


def functions(distribution: str, path: str, names: list[str], **scope: Any) -> SimpleNamespace:
    """The named functions or classes ("Class.method": as a function) of the wheel's file `path`, executed in `scope`."""
    return wheel_source.execute(root(distribution) / path, names, **scope)


def statements(distribution: str, path: str, first: str, last: str | None = None) -> CodeType:
    """Statements of the wheel's file `path` that are no function of their own, for exec() (wheel_source.statements)."""
    return wheel_source.statements(root(distribution) / path, first, last)
