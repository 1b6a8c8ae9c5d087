"""pytest plugin: every issue fails the test that caused it, unless the test asks for it with
@pytest.mark.fakecuda(expect="out-of-bounds") - then it must occur; allow="kind" lets a kind pass. Both take a name or a set."""

import os

import pytest

from . import active


def pytest_configure(config):
    config.addinivalue_line("markers", "fakecuda(expect=kinds, allow=kinds): issues that must / may occur in the test and are not counted")


def _set(x):
    return {x} if isinstance(x, str) else set(x or ())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if active():
        from . import engine

        engine.CONTEXT[0] = item.nodeid
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    if not active():
        yield
        return
    from . import engine

    engine.take_host_issues()
    start = len(engine.ISSUES)
    out = yield
    engine.take_host_issues()
    new = engine.ISSUES[start:]
    mark = item.get_closest_marker("fakecuda")
    want, may = (_set(mark.kwargs.get(k) if mark else None) for k in ("expect", "allow"))
    allow = os.environ.get("FAKECUDA_ALLOW", "").split(",")
    rest = [i for i in new if i["kind"] not in want | may]
    engine.ISSUES[start:] = rest
    bad = [i for i in rest if i["kind"] not in allow]
    missing = want - {i["kind"] for i in new}
    if out.excinfo is not None:
        if bad:
            item.add_report_section("call", "fakecuda", "\n".join(f"{i['kind']}: {i['text']}" for i in bad))
        return
    if bad:
        out.force_exception(pytest.fail.Exception("fakecuda found:\n" + "\n".join(f"{i['kind']}: {i['text']}" for i in bad), pytrace=False))
    elif missing:
        out.force_exception(pytest.fail.Exception(f"fakecuda did not find the expected {sorted(missing)}", pytrace=False))


def pytest_sessionfinish():
    """A pytest-xdist worker may end without running its atexit functions."""
    if os.environ.get("FAKECUDA_REPORT_DIR") and active():
        from . import engine

        engine.write_record()
