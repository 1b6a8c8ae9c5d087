"""Inside a process of its own: the real, unmodified verl, importable where its heavy dependencies are missing.

Also a pytest plugin (``-p verl_session``): it installs fused_critic into verl before the tests are collected, profiles every test, and
writes the calls of fused_critic's operators per test, as JSON, to the file that the variable below names.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections import Counter

import pytest
import torch

CALLS_VARIABLE = "FUSED_CRITIC_VERL_CALLS"

# What verl.trainer.ppo.core_algos and verl.workers.utils.losses import on their way, and the tests never use.
DEPENDENCIES = ("codetiming", "datasets", "omegaconf", "orjson", "pandas", "ray", "tensordict", "transformers")
STUB_VERSION = "0.10.0"  # verl compares tensordict's with this one

_calls: dict[str, Counter] = {}


class _Stub(type):
    """A class that has every attribute, each again such a class: enough for annotations, base classes and decorators' names."""

    def __getattr__(cls, name: str):
        return _stub(name)


def _stub(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Stub(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        module.__version__ = STUB_VERSION
        module.__getattr__ = _stub


def stub_missing_dependencies() -> None:
    sys.meta_path.append(_StubFinder([name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]))


def pytest_configure(config):
    stub_missing_dependencies()
    import fused_critic.integrations.verl as fused_verl

    fused_verl.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = yield
    names = (event.name for event in profile.events())
    _calls[item.nodeid] = Counter(name for name in names if name.startswith("fused_critic::"))
    return result


def pytest_sessionfinish(session):
    with open(os.environ[CALLS_VARIABLE], "w") as file:
        json.dump(_calls, file)
