"""Tests are written once and run on every device there is: cpu, and cuda where torch finds one (--devices selects)."""

from pathlib import Path

import hypothesis
import pytest
import torch

collect_ignore = ["fakecuda"]  # tests of a tool, which have their own command
TRAINERS = Path(__file__).parent / "trainers"  # long, and in need of the trainers themselves: only where the command line names them

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("quick", parent=hypothesis.settings.get_profile("default"), max_examples=15)


def pytest_addoption(parser):
    parser.addoption("--devices", default=None, help="comma-separated devices to test (default: cpu, and cuda if torch finds one)")
    parser.addoption("--quick", action="store_true", help="fewer examples in the property tests")
    parser.addoption("--write-parity", action="store_true", help="write the table of docs/parity.md (a run of all of tests/parity)")


def pytest_ignore_collect(collection_path, config):
    named = (Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args)
    if collection_path == TRAINERS and not any(path.is_relative_to(TRAINERS) for path in named):
        return True
    return None


def pytest_configure(config):
    hypothesis.settings.load_profile("quick" if config.getoption("--quick") else "default")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--devices")
        devices = chosen.split(",") if chosen else ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        metafunc.parametrize("device", devices)


def pytest_collection_modifyitems(config, items):
    """With --devices that leaves the CPU out, only what runs on a device is left: everything else has been tested without it."""
    chosen = config.getoption("--devices")
    if chosen and "cpu" not in chosen.split(","):
        on_device = [item for item in items if {"device", "simulator"} & set(item.fixturenames)]
        config.hook.pytest_deselected(items=[item for item in items if item not in on_device])
        items[:] = on_device


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
